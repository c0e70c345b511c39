"""MixMask in stable-pretraining: one call around a model, before it is trained.

    model = wrap(SimCLR("resnet18"), mixmask.MixMask(grid_size=4))

The loss of every training step then includes the mixed term. The methods `SimCLR`, `BYOL`,
`SimSiam`, `MoCov2`, `BarlowTwins` and `VICReg` are supported, called directly or from your own
`forward`; so is `Module(forward=...)` with `stable_pretraining.forward.simclr`, `byol`,
`barlow_twins`, `vicreg` or a function that calls the same parts by the same names. Forward hooks
record the clean outputs of public parts, and a function around `queue.append` what MoCo v2 reads.
Probes and kNN callbacks see clean images only.

Needs stable-pretraining 0.1.8 or newer, the extra `stable-pretraining`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask import losses
from mixmask.integrations._steps import (
    Mixing,
    View,
    check_mixing,
    mix_views,
    weigh_squares,
)
from mixmask.losses.cosine import squared_distance

try:
    import stable_pretraining as theirs
    from stable_pretraining import methods
    from stable_pretraining.losses import BYOLLoss, NTXEntLoss, VICRegLoss
except ImportError as error:
    raise ImportError(
        "mixmask.integrations.stable_pretraining needs stable-pretraining, which could not be "
        f"imported ({error}); run pip install '.[stable-pretraining]' in the checkout of mixmask"
    ) from error

# What their step compares: (z, target).
Pair = tuple[Tensor, Tensor]


def wrap(
    module: theirs.Module, mixing: Mixing, *, switch: bool = True, symmetric: bool = False
) -> theirs.Module:
    r"""Add the mixed term to the loss of every training step of a module.

    $L = L_\mathrm{theirs} + \frac{1}{N} \sum_i \lambda_i \ell(z^m_i, t_i) + (1 - \lambda_i)
    \ell(z^m_i, t_{\pi(i)})$, where view 1 is mixed and t are the targets from view 2. ℓ is one
    direction of their loss: NT-Xent, 2 - 2 cos (BYOL), - cos (SimSiam), InfoNCE against the queue
    of their own logits, which already holds the keys of this batch (MoCo v2), or the
    cross-correlation (Barlow Twins). For VICReg, λ weights the invariance; variance and covariance
    of the mixed view count once.

    Args:
        module: A method, or a `Module` with one of the losses above.
        mixing: From images (N, C, H, W) to their mix, for instance `MixMask(grid_size=4)`.
            One mask per sample is supported by all methods except Barlow Twins.
        switch: False keeps the term of λ alone (the paper's ablation).
        symmetric: Mix view 2 as well, for one more forward pass; the term is the mean of both.
            Not supported by MoCo v2, which has one direction.

    Returns:
        The module itself, with hooks. In training, the dictionary that its `forward` returns also
        holds "mixmask_loss" and "mixmask_lambda", which are logged under these names.

    Raises:
        TypeError: If the module is not of stable-pretraining, or `mixing` cannot be called.
        ValueError: If the method is not supported; in a step, if its parts were not called as
            expected.

    Source:
        MixMask, eq. 1-4.

    Example:
        >>> import mixmask
        >>> net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        >>> model = wrap(theirs.SimCLR(net, (8, 4)), mixmask.MixMask(grid_size=2))
        >>> view1, view2 = torch.rand(2, 4, 3, 8, 8)
        >>> model(view1, view2).loss.shape
        torch.Size([])
    """
    if not isinstance(module, theirs.Module):
        raise TypeError(
            f"module must be a Module of stable-pretraining, got {type(module).__name__}; wrap "
            "the method or Module itself, before it goes to a Trainer or Manager"
        )
    check_mixing(mixing)
    if isinstance(module, methods.MoCov2) and symmetric:
        raise ValueError("symmetric=True is not supported by MoCov2, which has one direction")
    if hasattr(module, "mixmask"):
        raise ValueError("module is wrapped already; build a new one to change the options")
    module.mixmask = _Step(mixing, switch=switch, symmetric=symmetric, method=_method(module))
    module.mixmask.attach(module)
    return module


class _Step:
    """What one training step computed for the clean images, and the mixed term made of it."""

    def __init__(self, mixing: Mixing, *, switch: bool, symmetric: bool, method: str) -> None:
        self.mixing = mixing
        self.switch = switch
        self.symmetric = symmetric
        self.method = method
        self.start(None, None)

    def attach(self, module: Any) -> None:
        """Register the hooks: before and after a step, and on the parts that are recorded."""
        if self.method in ("MoCov2", "SimSiam"):
            part = module.projector.teacher if self.method == "MoCov2" else module.projector
        else:
            part = getattr(module, self.method)
        module.register_forward_pre_hook(self.start)
        _student(module.backbone).register_forward_hook(self.record_images)
        part.register_forward_hook(self.record_pair)
        module.register_forward_hook(self.finish)
        if self.method == "MoCov2":
            # The device alone knows how full the queue is, so that reading it again would wait.
            module.queue.append = partial(self.record_queue, module.queue.append)

    def start(self, module: nn.Module | None, _arguments: object) -> None:
        """Forget the last step, and record this one if it trains."""
        self.recording = module is not None and module.training and torch.is_grad_enabled()
        self.images: list[Tensor] = []
        self.pairs: list[Pair] = []
        self.queue = torch.empty(0)

    def record_images(self, _part: nn.Module, arguments: tuple[Tensor, ...], _out: object) -> None:
        """Record the online backbone's images; a teacher that is the student has no gradient."""
        if self.recording and torch.is_grad_enabled():
            self.images.append(arguments[0])

    def record_pair(self, _part: nn.Module, arguments: Any, out: Any) -> None:
        """Record what their loss compares."""
        if not self.recording:
            return
        if self.method == "SimSiam":
            # Targets of either view, or of both at once.
            self.pairs.append((out.detach(), out.detach()))
        elif self.method != "MoCov2":
            self.pairs.append((arguments[0], arguments[1]))
        elif not torch.is_grad_enabled():
            # Where the teacher is the student, queries pass here too, with a gradient.
            keys = F.normalize(out, dim=-1)
            self.pairs.append((keys, keys))

    def record_queue(self, append: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        """Record the queue that their logits meet, with this batch's keys in it already."""
        queue = append(keys)  # (K, C)
        if self.recording:
            self.queue = queue
        return queue

    def finish(self, module: object, _arguments: object, output: Any) -> object:
        """Add the mixed term to the loss of the output."""
        images, pairs, queue, recorded = self.images, self.pairs, self.queue, self.recording
        # Under DistributedDataParallel the module is called around its own call.
        self.start(None, None)
        # In evaluation there is no loss, and without a backbone's call nothing to mix.
        if not recorded or not images or "loss" not in output:
            return output
        targets = self.targets(pairs)
        embed, criterion = partial(self.embed, module), self.criterion(module, queue)
        # (2N, C, H, W), whether the backbone saw the views one by one or at once.
        both = self.views(torch.cat(images), len(targets[0]))
        views: list[View] = [
            (view, embed, [(criterion, target)])
            for view, target in zip(both, targets, strict=False)
        ]
        term, share = mix_views(self.mixing, views, switch=self.switch)
        return _add(module, output, term, share)

    def targets(self, pairs: list[Pair]) -> list[Tensor]:
        """Return the targets of view 1 and, where there are any, of view 2."""
        if not pairs:
            raise ValueError(
                f"expected a call of {self.method} in every training step, got none; call it by "
                "this name, or write the two lines of the README into your forward"
            )
        if self.method == "SimSiam":
            first, second = torch.cat([z for z, _ in pairs]).chunk(2)  # (2N, C) -> (N, C) each
            return [second, first]
        (z, target), *others = pairs  # (N, C) each
        # One call compares both views; BYOL has a call per direction.
        return [target, others[0][1] if others else z]

    def views(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the views to mix; the backbone may have seen both at once."""
        count = 1 + self.symmetric
        if len(images) not in (n, 2 * n) or len(images) < count * n:
            raise ValueError(
                f"expected two views of {n} images, got {len(images)} images at the backbone; "
                "pass two views of equal size, or write the two lines of the README into your "
                "forward"
            )
        return list(images.split(n))[:count]

    def embed(self, module: Any, images: Tensor) -> Tensor:
        """Return what the online branch passes to their loss."""
        z: Tensor = _student(module.projector)(_student(module.backbone)(images))  # (N, C)
        if self.method in ("SimSiam", "byol_loss"):
            z = module.predictor(z)
        return F.normalize(z, dim=-1) if self.method == "MoCov2" else z

    def criterion(self, module: Any, queue: Tensor) -> losses.Criterion:
        """Return one direction of their loss, per image where it has a loss per image."""
        if self.method == "SimSiam":
            return losses.NegativeCosine()
        if self.method == "MoCov2":
            return losses.InfoNCE(queue, module.temperature)
        own = getattr(module, self.method)
        build = _CRITERIA.get(type(own))
        return own if build is None else build(own)


# A loss of another class under one of their names is taken as it is.
_CRITERIA: dict[type, Callable[[Any], losses.Criterion]] = {
    NTXEntLoss: lambda own: losses.NTXent(own.temperature, gather_distributed=True),
    BYOLLoss: lambda _: squared_distance,
    VICRegLoss: lambda own: weigh_squares(own.sim_coeff, own.vcreg_loss),
}
_METHODS = (methods.BarlowTwins, methods.BYOL, methods.SimCLR, methods.VICReg)
_LOSSES = ("simclr_loss", "byol_loss", "barlow_loss", "vicreg_loss")


def _method(module: Any) -> str:
    """Return the source of the targets: a method with its own loss, or a loss module."""
    for method in (methods.MoCov2, methods.SimSiam):
        if isinstance(module, method):
            return str(method.__name__)
    names = [name for name in _LOSSES if hasattr(module, name)]
    parts = hasattr(module, "backbone") and hasattr(module, "projector")
    # Others of their methods may hold a loss of the same name, and more terms beside it.
    modules = (cls.__module__ for cls in type(module).__mro__ if cls not in _METHODS)
    other = any(name.startswith("stable_pretraining.methods.") for name in modules)
    if len(names) != 1 or not parts or other:
        raise ValueError(
            f"expected SimCLR, BYOL, SimSiam, MoCov2, BarlowTwins, VICReg or a Module with a "
            f"backbone, a projector and one of {', '.join(_LOSSES)}, got "
            f"{type(module).__name__}; write the two lines of the README into its forward"
        )
    return names[0]


def _student(part: object) -> Any:
    return part.student if isinstance(part, theirs.TeacherStudentWrapper) else part


def _add(module: Any, output: Any, term: Tensor, share: Tensor) -> object:
    """Return their output with the mixed term in its loss, and log it where a Trainer runs."""
    output["loss"] = output["loss"] + term
    if type(output) is dict:
        logged = {"mixmask_loss": term.detach(), "mixmask_lambda": share}
        output.update(logged)
        if getattr(module, "_trainer", None) is not None:
            module.log_dict(logged, on_step=True, on_epoch=True, sync_dist=True)
    return output
