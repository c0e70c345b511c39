"""MixMask around lightly's criteria: the existing call, plus what was mixed.

    criterion = wrap(NTXentLoss(memory_bank_size=(4096, 128)))
    loss = criterion(query, key, query_mixed, mixed)

Needs lightly 1.5.26 or newer, the extra `lightly`.

Which criteria are supported, and what the mixed term of each is:

| criterion | mixed term |
| --- | --- |
| `NTXentLoss`, `NegativeCosineSimilarity` | eq. 4, per image |
| `VICRegLoss`, `TiCoLoss` | λ weights the invariance; the rest does not see targets: once, of z_m |
| `LeJEPALoss` | the same, with the center of the global views as the target |
| `SwaVLoss`, `DINOLoss` | one soft target, λ t_i + (1 - λ) t_π(i) |
| `BarlowTwinsLoss`, `DCLLoss`, `MMCRLoss` and other (z, target) | eq. 4, one λ per batch |

`_LEFT_OUT` names the others and says why: they are called as ever, and refuse mixed views.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask import losses
from mixmask._distributed import check_even, world_size
from mixmask.losses._inputs import as_pairs, check_sizes
from mixmask.mixing import MixedBatch

__all__ = [
    "WrappedCriterion",
    "WrappedDINO",
    "WrappedLeJEPA",
    "WrappedNTXent",
    "WrappedPair",
    "WrappedSwaV",
    "wrap",
]

try:
    from lightly import loss as theirs
    from lightly.loss.lejepa_loss import LeJEPALoss
    from lightly.loss.vicreg_loss import covariance_loss, variance_loss
    from lightly.utils.dist import gather

    from mixmask.integrations._lightly_crops import (
        Embeddings,
        LikeIts,
        Mixed,
        WrappedDINO,
        WrappedLeJEPA,
        WrappedSwaV,
    )
except ImportError as error:
    raise ImportError(
        "mixmask.integrations.lightly needs lightly 1.5.26 or newer, which could not be "
        f"imported ({error}); run pip install '.[lightly]' in the checkout of mixmask"
    ) from error

# By the class that defines `forward`: nothing of these is (z, target) for whole images.
_LEFT_OUT = {
    "CAPILoss": "its targets are those of patches, and a mixture has patches of two images",
    "DetConBLoss": "its rows are regions, and a mixture has regions of two images",
    "DetConSLoss": "its rows are regions, and a mixture has regions of two images",
    "EMPSSLLoss": "all views of an image enter one statistic, without a target",
    "FroSSLLoss": "all views of a batch enter one statistic, without a target",
    "IBOTPatchLoss": "its targets are those of patches, and a mixture has patches of two images",
    "IBOTPlusPlusPatchLoss": "its targets are those of patches, which a mixture has of two images",
    "MSNLoss": "its anchors are masked already",
    "PMSNLoss": "its anchors are masked already",
    "PMSNCustomLoss": "its anchors are masked already",
    "PatchKernelAlignmentLoss": "it compares places, and a mixture has places of two images",
    "SymNegCosineSimilarityLoss": "it takes pairs; wrap NegativeCosineSimilarity",
    "VICRegLLoss": "it compares places, and a mixture has places of two images",
    "VISRegLoss": "its projections enter one statistic over all views",
    "WMSELoss": "it whitens all views of a batch together",
}


def wrap(
    criterion: nn.Module,
    *,
    switch: bool = True,
    ignore: Sequence[str] = (),
    save_bank: bool = True,
) -> nn.Module:
    """Wrap a criterion of lightly, so that it takes mixed views beside its own arguments.

    The result is the criterion to its user: it is called with the same arguments, has the same
    attributes, to read and to set, and is an instance of the same class. Two more arguments,
    `z_mixed` and `mixed`, come after its own or by name; without them the call is the
    criterion's. Banks, queues, centers and covariances move once per step, by the clean call.

    Args:
        criterion: A module of `lightly.loss`. A class derived from one, with a `forward` of its
            own, and any other module (z, target) gets `losses.LambdaWeightedLoss`.
        switch: False keeps the term of λ alone (the paper's ablation).
        ignore: See `losses.LambdaWeightedLoss`.
        save_bank: Put a memory bank into the `state_dict`, where lightly leaves it out, so that
            a resumed run continues with the negatives it had. False also reads checkpoints that
            hold no bank.

    Returns:
        `WrappedNTXent`, `WrappedPair`, `WrappedSwaV`, `WrappedDINO`, `WrappedLeJEPA` or
        `WrappedCriterion`.

    Raises:
        TypeError: If the criterion is not a module.

    Example:
        >>> import mixmask, torch
        >>> criterion = wrap(theirs.NTXentLoss(memory_bank_size=(64, 16)))
        >>> mixed = mixmask.mix_batch(torch.rand(4, 3, 8, 8), mixmask.BlockMaskGenerator(2))
        >>> query, key, query_mixed = torch.randn(3, 4, 16)
        >>> criterion(query, key, query_mixed, mixed).shape
        torch.Size([])
        >>> isinstance(criterion, theirs.NTXentLoss), criterion.temperature
        (True, 0.5)
    """
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion must be one of lightly's modules, got {type(criterion).__name__}; "
            "pass for instance NTXentLoss()"
        )
    forward = type(criterion).forward
    if forward is theirs.NTXentLoss.forward:
        return WrappedNTXent(criterion, switch=switch, save_bank=save_bank)
    if forward in _PAIRS:
        return WrappedPair(criterion, switch=switch, ignore=ignore)
    if forward in _CROPS:
        return _CROPS[forward](criterion, switch=switch)
    return WrappedCriterion(criterion, switch=switch, ignore=ignore)


class WrappedCriterion(LikeIts, losses.LambdaWeightedLoss):
    """Any criterion (z, target, …), with mixed views."""

    def __init__(
        self, criterion: nn.Module, *, switch: bool = True, ignore: Sequence[str] = ()
    ) -> None:
        """Store the criterion."""
        losses.LambdaWeightedLoss.__init__(self, criterion, switch=switch, ignore=ignore)
        self._names = tuple(inspect.signature(criterion.forward).parameters)

    def forward(
        self, *arguments: Any, z_mixed: Embeddings = None, mixed: Mixed = None, **options: Any
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms.

        Args:
            arguments: The criterion's own, as it takes them; `z_mixed` and `mixed` may follow
                them. Its first two are z (N, …), the online branch's embeddings of
                the clean images, and their targets (N, …).
            z_mixed: (N, …) embeddings of the mixed images, or a list of them.
            mixed: What was mixed, or a list in the same order.
            options: The criterion's own arguments by name.

        Returns:
            () scalar.

        Raises:
            ValueError: If sizes do not fit, if a gathered batch is split unevenly over the
                processes, or if the criterion keeps state of an unknown kind; before any state
                moves.
            TypeError: If the criterion does not take two batches of embeddings.
        """
        own = len(self._names)
        if arguments and _are_records(arguments[-1]):
            own = len(arguments) - 2
        if len(arguments) > own:
            arguments, (z_mixed, mixed) = arguments[:own], (*arguments[own:], None)[:2]
        pairs = as_pairs(z_mixed, mixed)
        if not pairs:
            loss: Tensor = self.criterion(*arguments, **options)
            return loss
        z, target, more = self._split(dict(zip(self._names, arguments, strict=False)) | options)
        check_sizes(len(pairs[0][1]), z=z, target=target)
        term = self.mixed_loss(z_mixed, target, mixed, z=z)  # type: ignore[arg-type]
        return self._clean(z, target, more) + term

    def _split(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the two batches of embeddings, and the criterion's other arguments."""
        module: Any = self.criterion
        name = module.forward.__qualname__.partition(".")[0]
        if name in _LEFT_OUT:
            raise TypeError(
                f"{name} takes no mixed views: {_LEFT_OUT[name]}; call it without z_mixed and mixed"
            )
        batches = self._names[:2]
        if len(batches) < 2 or not given.keys() >= {*batches}:
            raise TypeError(
                f"mixed views need a criterion called with (z, target), got {name} called with "
                f"({', '.join(given)}); call it without z_mixed and mixed"
            )
        z, target = (given.pop(batch) for batch in batches)
        return z, target, given

    def _clean(self, z: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        loss: Tensor = self.criterion(z, target, **options)
        return loss.mean()


class WrappedPair(WrappedCriterion):
    """A stateless criterion of two views or `TiCoLoss`, with mixed views.

    One λ per sample works with `NegativeCosineSimilarity`, `VICRegLoss` and `TiCoLoss`; the
    others have no loss per image.
    """

    def mixed_loss(  # type: ignore[override]  # One direction, as lightly's criteria take it.
        self,
        z_mixed: Tensor | Sequence[Tensor],
        target: Tensor,
        mixed: MixedBatch | Sequence[MixedBatch],
        *,
        z: Tensor | None = None,
    ) -> Tensor:
        """Return the mixed terms alone; see `losses.LambdaWeightedLoss`."""
        if getattr(self.criterion, "gather_distributed", False):
            check_even(len(target), target.device)
        return super().mixed_loss(z_mixed, target, mixed, z=z)

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        del z
        module: Any = self.criterion
        criterion = _PAIRS[type(module).forward](module)
        return losses.lambda_weighted_loss(criterion, z_mixed, target, mixed, switch=self.switch)


class WrappedNTXent(WrappedPair):
    """`NTXentLoss`, with or without a memory bank, with mixed views.

    With a bank, every term contrasts with the bank as it is before the step, without a copy of it
    and without an (N, K) matrix; then the keys are enqueued, once.
    """

    def __init__(
        self, criterion: nn.Module, *, switch: bool = True, save_bank: bool = True
    ) -> None:
        """Store the criterion, and let its bank be saved."""
        WrappedPair.__init__(self, criterion, switch=switch)
        bank = self.memory_bank
        if save_bank and bank.size[0] > 0:
            bank.register_buffer("bank", bank.bank, persistent=True)
            bank.register_buffer("bank_ptr", bank.bank_ptr, persistent=True)

    def _clean(self, z: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
        del options
        rows, keys = F.normalize(z, dim=1), F.normalize(target, dim=1)
        loss = self._contrast(keys)(rows, keys)
        if self.memory_bank.size[0] > 0 and rows.requires_grad:
            # The bank's forward would copy it beside this.
            self.memory_bank._dequeue_and_enqueue(keys)
        return loss

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        del z
        rows, keys = F.normalize(z_mixed, dim=1), F.normalize(target, dim=1)
        criterion = self._contrast(keys)
        return losses.lambda_weighted_loss(criterion, rows, keys, mixed, switch=self.switch)

    def _contrast(self, keys: Tensor) -> losses.InfoNCE | losses.NTXent:
        bank = self.memory_bank
        if bank.size[0] == 0:
            return losses.NTXent(self.temperature, gather_distributed=self.gather_distributed)
        if bank.bank.ndim == 1:
            # lightly 1.5 learns the width of a bank from the first keys.
            bank(keys)
        return losses.InfoNCE(bank.bank.to(keys.device), self.temperature)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        # This comes before the bank's own turn, which would refuse the other shape.
        bank = self.memory_bank
        saved = state_dict.get(f"{prefix}criterion.memory_bank.bank")
        if bank.bank.ndim == 1 and saved is not None:
            bank.bank = bank.bank.new_empty(saved.shape)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *more)


def _are_records(argument: Any) -> bool:
    records = argument if isinstance(argument, list | tuple) else [argument]
    return bool(records) and all(isinstance(record, MixedBatch) for record in records)


class _VICReg:
    """`VICRegLoss` whose λ weights the invariance; variance and covariance are those of z, once."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(z, target)
        return loss

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return both weighted terms; see `losses.SharingCriterion`."""
        distance = lam * self.distance(z, target)
        if other is not None:
            distance = distance + (1 - lam) * self.distance(z, other)
        if self.criterion.gather_distributed and world_size() > 1:
            z = torch.cat(gather(z))
        return distance.mean() + self.rest(z)

    def distance(self, z: Tensor, target: Tensor) -> Tensor:
        """Return (N,) weighted distances."""
        weight: float = self.criterion.lambda_param
        return weight * ((z - target) ** 2).flatten(1).mean(dim=1)

    def rest(self, z: Tensor) -> Tensor:
        """Return (), what does not see the targets."""
        own = self.criterion
        variance: Tensor = own.mu_param * 0.5 * variance_loss(x=z, eps=own.eps)
        covariance: Tensor = own.nu_param * covariance_loss(x=z)
        return variance + covariance


class _TiCo(_VICReg):
    r"""`TiCoLoss`, $1 - \cos(z_i, t_i) + \rho\, z_i^T C z_i$, whose λ weights the cosine.

    $C = \beta C_{t-1} + (1 - \beta) z^T z / N$ is made of z alone, without a gradient. So eq. 4
    weights the cosine and counts the second part once, which is what λ and 1 - λ of two calls add
    up to. The mixed view meets C from before the step with its own $z^T z$ in it; the clean call
    moves C.
    """

    def distance(self, z: Tensor, target: Tensor) -> Tensor:
        """Return (N,) one less the cosines."""
        return 1 - (F.normalize(z, dim=1) * F.normalize(target, dim=1)).sum(dim=1)

    def rest(self, z: Tensor) -> Tensor:
        """Return (), the weighted covariance contrast."""
        own, z = self.criterion, F.normalize(z, dim=1)
        covariance = (1 - own.beta) * (z.T @ z).detach() / len(z)  # (C, C)
        if own.C is not None:
            covariance = covariance + own.beta * own.C
        contrast: Tensor = own.rho * ((z @ covariance) * z).sum(dim=1).mean()
        return contrast


def _cosine(criterion: Any) -> losses.Criterion:
    def rows(z: Tensor, target: Tensor) -> Tensor:
        similarity = F.cosine_similarity(z, target, criterion.dim, criterion.eps)
        return -similarity.reshape(len(z), -1).mean(dim=1)

    return rows


def _itself(criterion: Any) -> losses.Criterion:
    own: losses.Criterion = criterion
    return own


# By `forward`, so that a derived criterion with its own is not taken for lightly's.
_PAIRS: dict[Callable[..., Any], Callable[[Any], losses.Criterion]] = {
    theirs.NegativeCosineSimilarity.forward: _cosine,
    theirs.VICRegLoss.forward: _VICReg,
    theirs.TiCoLoss.forward: _TiCo,
    theirs.BarlowTwinsLoss.forward: _itself,
    theirs.DCLLoss.forward: _itself,
    theirs.MMCRLoss.forward: _itself,
}
_CROPS: dict[Callable[..., Any], Callable[..., nn.Module]] = {
    theirs.SwaVLoss.forward: WrappedSwaV,
    theirs.DINOLoss.forward: WrappedDINO,
    LeJEPALoss.forward: WrappedLeJEPA,
}
