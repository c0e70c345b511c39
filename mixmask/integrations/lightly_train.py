"""MixMask in lightly-train's pretraining: one call before theirs.

    import lightly_train, mixmask
    from mixmask.integrations.lightly_train import patch

    patch(mixmask.MixMask(grid_size=4))
    lightly_train.pretrain(out="out", data="images", model="torchvision/resnet18", method="simclr")

The methods `simclr` and `dino` are supported; others are refused with the reason, before training
starts. With several devices, every process runs the script and therefore this call.

lightly-train has no public interface for this, so untested versions are refused. `patch` replaces
the look-up of methods by name, and a run gets subclasses; their own classes are not changed.
README.md in this folder names the private parts that are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from mixmask import losses
from mixmask.integrations._steps import Mixing, View, check_mixing, mix_views

TESTED = ("0.18.0",)
_LEFT_OUT = {
    "densecl": "half of its loss matches places, and a mixture has places of two images",
    "dinov2": "it masks patches itself, and its patch and KoLeo losses have no weighted form",
    "dinov31": "it masks patches itself, and its patch and KoLeo losses have no weighted form",
    "distillation": "its targets are a teacher's features of the very image, already mixed",
    "distillationv1": "it mixes its images itself",
    "distillationv2": "it mixes its images itself",
    "distillationv3": "its targets are a teacher's features of the very image",
}


def patch(mixing: Mixing, *, switch: bool = True, symmetric: bool = False) -> Callable[[], None]:
    r"""Add the mixed term to `lightly_train.pretrain`; a second call replaces the first.

    $L = L_\mathrm{theirs} + \frac{1}{N} \sum_i \lambda_i \ell(z^m_i, t_i) + (1 - \lambda_i)
    \ell(z^m_i, t_{\pi(i)})$: the first view is mixed, and t are the projections (SimCLR) or the
    teacher's distributions (DINO, with the center from before the step) of the other global view.

    Args:
        mixing: From images (N, C, H, W) to their mix, for instance `MixMask(grid_size=4)`.
        switch: False keeps the term of λ alone (the paper's ablation).
        symmetric: Mix the second view as well; the term is the mean of both.

    Returns:
        A function that undoes the patch.

    Raises:
        ImportError: If lightly-train cannot be imported or its version was not tested.
        TypeError: If `mixing` cannot be called.

    Source:
        MixMask, eq. 1-4.
    """
    check_mixing(mixing)
    helpers = _helpers()
    original = getattr(helpers.get_method_cls, "original", helpers.get_method_cls)
    options = {"mixing": staticmethod(mixing), "switch": switch, "symmetric": symmetric}

    def get_method_cls(method: object) -> type:
        theirs: type = original(method)
        if issubclass(theirs, _Mixed):
            return theirs
        name = method if isinstance(method, str) else theirs.__name__.lower()
        if name not in _MIXED:
            reason = _LEFT_OUT.get(name, "it was not tested")
            raise ValueError(
                f"mixmask does not support the method {name!r}: {reason}; use one of "
                f"{', '.join(_MIXED)}, or leave the call of mixmask's patch out"
            )
        more = {**options, "__module__": theirs.__module__}
        return type(theirs.__name__, (_MIXED[name], theirs), more)

    get_method_cls.original = original  # type: ignore[attr-defined]
    helpers.get_method_cls = get_method_cls

    def undo() -> None:
        helpers.get_method_cls = original

    return undo


def _helpers() -> Any:
    """Return the module of theirs that is patched, if its version is known."""
    try:
        installed = version("lightly-train")
        from lightly_train._methods import method_helpers
    except (ImportError, PackageNotFoundError) as error:
        raise ImportError(
            "mixmask.integrations.lightly_train needs lightly-train, which could not be imported "
            f"({error}); run pip install 'lightly-train=={TESTED[-1]}'"
        ) from error
    if installed not in TESTED:
        raise ImportError(
            "mixmask.integrations.lightly_train uses private parts of lightly-train, so it needs a "
            f"version that was tested, {', '.join(TESTED)}, got {installed}; run pip install "
            f"'lightly-train=={TESTED[-1]}'"
        )
    return method_helpers


def _note(
    calls: list[dict[str, object]],
    criterion: object,
    arguments: tuple[object, ...],
    options: dict[str, object],
) -> None:
    """Record what their step passes to the criterion, and DINO's center before its update."""
    center = getattr(criterion, "center", torch.zeros(0)).flatten().clone()  # (K,)
    calls.append({"arguments": arguments, "center": center, **options})


class _Mixed:
    """A method of theirs with the mixed term; goes before it in the order of classes."""

    # The options of `patch`.
    mixing: Mixing
    switch: bool
    symmetric: bool
    # Provided by their class.
    criterion: Any
    # Provided by the classes below: the criterion with the target that another view gives, and
    # what the online branch gives to it.
    _towards: Callable[[dict[str, object], int], tuple[losses.Criterion, Tensor]]
    _embed: Callable[[Tensor], Tensor]

    def training_step_impl(self, batch: Any, batch_idx: int) -> object:
        """Return their loss plus the mixed term."""
        calls: list[dict[str, object]] = []
        handle = self.criterion.register_forward_pre_hook(partial(_note, calls), with_kwargs=True)
        try:
            result = super().training_step_impl(batch, batch_idx)  # type: ignore[misc]
        finally:
            handle.remove()
        # Both methods call their criterion once per step, with both global views.
        (call,) = calls
        views: list[View] = [
            # A view's target is that of the other one.
            (batch["views"][view], self._embed, [self._towards(call, 1 - view)])
            for view in range(1 + self.symmetric)
        ]
        term, share = mix_views(self.mixing, views, switch=self.switch)
        logged = {"mixmask/loss": term.detach(), "mixmask/lambda": share}
        return type(result)(result.loss + term, {**(result.log_dict or {}), **logged})


class _SimCLR(_Mixed):
    embedding_model: Any
    flatten: Any
    projection_head: Any

    def _towards(self, call: dict[str, Any], other: int) -> tuple[losses.Criterion, Tensor]:
        gather: bool = self.criterion.gather_distributed
        criterion = losses.NTXent(self.criterion.temperature, gather_distributed=gather)
        return criterion, call["arguments"][other]

    def _embed(self, images: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.flatten(self.embedding_model(images)))
        return z


class _DINO(_Mixed):
    _forward_student: Callable[[Tensor], Tensor]

    def _towards(self, call: dict[str, Any], other: int) -> tuple[losses.Criterion, Tensor]:
        # Their loss makes a tensor of it, in the default dtype.
        teacher = float(torch.as_tensor(call["teacher_temp"]))
        criterion = losses.DINO(call["center"], self.criterion.student_temp, teacher)
        return criterion, call["teacher_out"][other]

    def _embed(self, images: Tensor) -> Tensor:
        return self._forward_student(images)


_MIXED: dict[str, type[_Mixed]] = {"dino": _DINO, "simclr": _SimCLR}
