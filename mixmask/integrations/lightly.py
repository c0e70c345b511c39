"""MixMask around lightly's criteria: the existing call, plus what was mixed.

    criterion = wrap(NTXentLoss(memory_bank_size=(4096, 128)))
    loss = criterion(query, key, query_mixed, mixed)

Needs lightly 1.5.26 or newer, the extra `lightly`. README.md in this folder lists the criteria with
their mixed terms; those without one work as usual, and refuse mixed views with the reason.
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
from mixmask.integrations._steps import SplitCriterion, weigh_squares
from mixmask.losses._inputs import Embeddings, Records, as_list, as_pairs, check_sizes
from mixmask.losses._rows import upcast
from mixmask.losses.redundancy import _regularize
from mixmask.mixing import MixedBatch

__all__ = [
    "WrappedCriterion",
    "WrappedDINO",
    "WrappedLeJEPA",
    "WrappedNTXent",
    "WrappedSwaV",
    "wrap",
]

try:
    from lightly import loss as theirs
    from lightly.loss.lejepa_loss import LeJEPALoss
    from lightly.loss.vicreg_loss import variance_loss
    from lightly.utils.dist import gather

    from mixmask.integrations._lightly_crops import LikeIts, WrappedDINO, WrappedLeJEPA, WrappedSwaV
except ImportError as error:
    raise ImportError(
        "mixmask.integrations.lightly needs lightly 1.5.26 or newer, which could not be "
        f"imported ({error}); run pip install '.[lightly]' in the checkout of mixmask"
    ) from error

# By the class that defines `forward`: none of these takes (z, target) of whole images.
_LEFT_OUT = {
    **dict.fromkeys(("MSNLoss", "PMSNLoss", "PMSNCustomLoss"), "its anchors are masked already"),
    **dict.fromkeys(
        ("CAPILoss", "DetConBLoss", "DetConSLoss", "IBOTPatchLoss", "IBOTPlusPlusPatchLoss",
         "PatchKernelAlignmentLoss", "VICRegLLoss"),
        "it compares patches or places, and a mixture has those of two images",
    ),
    **dict.fromkeys(
        ("EMPSSLLoss", "FroSSLLoss", "VISRegLoss", "WMSELoss"),
        "all views of an image or a batch enter one statistic, without a target",
    ),
    "LeWMLoss": "it predicts the frames of a clip, and a mixture has those of two",
    "SymNegCosineSimilarityLoss": "it takes pairs; wrap NegativeCosineSimilarity",
}  # fmt: skip


def wrap(
    criterion: nn.Module, *, switch: bool = True, ignore: Sequence[str] = (), save_bank: bool = True
) -> nn.Module:
    """Wrap a criterion of lightly, so that it takes mixed views beside its own arguments.

    The result behaves like the criterion: it takes the same arguments, its attributes can be read
    and set, and isinstance sees the same class. Banks, queues, centers and covariances are updated
    once per step, by the clean call. A call also takes, by name, or after the criterion's own
    arguments (not for `SwaVLoss`, `DINOLoss` and `LeJEPALoss`),

    - `z_mixed`: what the criterion compares, (N, ...), of a mixed view; or a list of them;
    - `mixed`: what was mixed, or a list in the same order;
    - `view` (`SwaVLoss`, `DINOLoss`): which crop was mixed, counting the large ones first; a list
      for lists. Its targets are those of the other large crops. Default: 0.

    It returns the criterion's loss, in lightly's shape, plus the mixed terms. Before any state
    moves, it raises a ValueError if sizes do not fit or a gathered batch is split unevenly over the
    processes, and a TypeError if the criterion does not take mixed views.

    Args:
        criterion: A module of `lightly.loss`. Any other module (z, target), and a subclass with
            a `forward` of its own, gets `losses.LambdaWeightedLoss`.
        switch: False keeps the term of λ alone (the paper's ablation).
        ignore: See `losses.LambdaWeightedLoss`.
        save_bank: Save the memory bank in the `state_dict`, which lightly does not do, so that a
            resumed run keeps its negatives. Pass False to load checkpoints without a bank.

    Returns:
        `WrappedNTXent`, `WrappedSwaV`, `WrappedDINO`, `WrappedLeJEPA` or `WrappedCriterion`.

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
    if forward in _CROPS:
        return _CROPS[forward](criterion, switch=switch)
    return WrappedCriterion(criterion, switch=switch, ignore=ignore)


class WrappedCriterion(LikeIts, losses.LambdaWeightedLoss):
    """Any criterion (z, target, ...), with mixed views.

    One λ per sample works with `NegativeCosineSimilarity`, `VICRegLoss`, `TiCoLoss` and others
    that return a loss per image.
    """

    def __init__(
        self, criterion: nn.Module, *, switch: bool = True, ignore: Sequence[str] = ()
    ) -> None:
        losses.LambdaWeightedLoss.__init__(self, criterion, switch=switch, ignore=ignore)
        self._names = tuple(inspect.signature(criterion.forward).parameters)

    def forward(
        self,
        *arguments: Any,
        z_mixed: Embeddings | None = None,
        mixed: Records | None = None,
        **options: object,
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms, (); see `wrap` for the arguments."""
        # Mixed views come after the criterion's own arguments, which may be fewer than it takes.
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
        # Before the clean call, which moves the state.
        term = self.mixed_loss(z_mixed, target, mixed, z=z)  # type: ignore[arg-type]
        return self._clean(z, target, more) + term

    def _split(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, object]]:
        """Return the two batches of embeddings, and the criterion's other arguments."""
        module: Any = self.criterion
        name = module.forward.__qualname__.partition(".")[0]
        if name in _LEFT_OUT:
            raise TypeError(
                f"mixed views are not supported for {name}: {_LEFT_OUT[name]}; call it without "
                "z_mixed and mixed"
            )
        batches = self._names[:2]
        if len(batches) < 2 or not given.keys() >= {*batches}:
            raise TypeError(
                f"mixed views need a criterion called with (z, target), got {name} called with "
                f"({', '.join(given)}); call it without z_mixed and mixed"
            )
        z, target = (given.pop(batch) for batch in batches)
        return z, target, given

    def _clean(self, z: Tensor, target: Tensor, options: dict[str, object]) -> Tensor:
        loss: Tensor = self.criterion(z, target, **options)
        return loss.mean()

    def _mixed_terms(
        self, pairs: list[tuple[Tensor, MixedBatch]], targets: list[Tensor], z: list[Tensor]
    ) -> list[Tensor]:
        # lightly gathers without a look at the sizes, and would take other rows for the targets.
        if getattr(self.criterion, "gather_distributed", False):
            check_even(len(targets[0]), targets[0].device)
        return super()._mixed_terms(pairs, targets, z)

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        own: Any = self.criterion
        build = _PAIRS.get(type(own).forward)
        if build is None:
            return super()._mixed_term(z_mixed, target, mixed, z)
        return losses.lambda_weighted_loss(build(own), z_mixed, target, mixed, switch=self.switch)


class WrappedNTXent(WrappedCriterion):
    """`NTXentLoss`, with or without a memory bank, with mixed views.

    Every term contrasts with the bank as it is before the step, without a copy of it and without
    an (N, K) matrix; then the keys are enqueued, once.
    """

    def __init__(
        self, criterion: nn.Module, *, switch: bool = True, save_bank: bool = True
    ) -> None:
        WrappedCriterion.__init__(self, criterion, switch=switch)
        bank = self.memory_bank
        if save_bank and bank.size[0] > 0:
            # The same tensors again, persistent this time.
            bank.register_buffer("bank", bank.bank, persistent=True)
            bank.register_buffer("bank_ptr", bank.bank_ptr, persistent=True)

    def _clean(self, z: Tensor, target: Tensor, options: dict[str, object]) -> Tensor:
        del options
        rows, keys = F.normalize(z, dim=1), F.normalize(target, dim=1)  # (N, C)
        loss = self._contrast(keys)(rows, keys)
        if self.memory_bank.size[0] > 0 and rows.requires_grad:
            # The bank's forward would copy it beside this.
            self.memory_bank._dequeue_and_enqueue(keys)
        return loss

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        del z
        rows, keys = F.normalize(z_mixed, dim=1), F.normalize(target, dim=1)  # (N, C)
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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: object) -> None:
        # This comes before the bank's own turn, which would refuse the other shape.
        bank = self.memory_bank
        saved = state_dict.get(f"{prefix}criterion.memory_bank.bank")
        if bank.bank.ndim == 1 and saved is not None:
            bank.bank = bank.bank.new_empty(saved.shape)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *more)


def _are_records(argument: object) -> bool:
    records = as_list(argument)
    return bool(records) and all(isinstance(record, MixedBatch) for record in records)


def _vicreg(criterion: Any) -> losses.Criterion:
    def rest(z: Tensor) -> Tensor:
        if criterion.gather_distributed and world_size() > 1:
            z = torch.cat(gather(z))  # (W * N, C)
        # Theirs is half of the sum over both views.
        variance: Tensor = criterion.mu_param * 0.5 * variance_loss(x=z, eps=criterion.eps)
        # Theirs is the mean over places, (N, ..., C), and chooses by a mask, which waits.
        places = upcast(z).reshape(len(z), -1, z.shape[-1]).unbind(1)  # (N, C) each
        terms = [_regularize(place, 0.0, criterion.nu_param, gather=False) for place in places]
        return variance + torch.stack(terms).mean()

    return weigh_squares(float(criterion.lambda_param), rest)


def _tico(criterion: Any) -> losses.Criterion:
    r"""$1 - \cos(z_i, t_i) + \rho\, z_i^T C z_i$, of which λ weights the cosine.

    The mixed view meets $C = \beta C_{t-1} + (1 - \beta) z^T z / N$ with its own $z^T z$ in it,
    without a gradient; only the clean call moves C.
    """

    def distance(z: Tensor, target: Tensor) -> Tensor:
        return 1 - (F.normalize(z, dim=1) * F.normalize(target, dim=1)).sum(dim=1)  # (N,)

    def rest(z: Tensor) -> Tensor:
        # The cosine of a view and itself is one: what is left is the second part.
        contrast: Tensor = criterion(z, z, update_covariance_matrix=False)
        return contrast

    return SplitCriterion(distance, rest)


def _cosine(criterion: Any) -> losses.Criterion:
    def rows(z: Tensor, target: Tensor) -> Tensor:
        similarity = F.cosine_similarity(z, target, criterion.dim, criterion.eps)
        return -similarity.reshape(len(z), -1).mean(dim=1)  # (N,)

    return rows


# Their state, if any, is left alone by these forms, so nothing has to be copied. By `forward`, so
# that a derived criterion with its own is not taken for lightly's.
_PAIRS: dict[Callable[..., object], Callable[[Any], losses.Criterion]] = {
    theirs.NegativeCosineSimilarity.forward: _cosine,
    theirs.VICRegLoss.forward: _vicreg,
    theirs.TiCoLoss.forward: _tico,
    **dict.fromkeys(
        (theirs.BarlowTwinsLoss.forward, theirs.DCLLoss.forward, theirs.MMCRLoss.forward),
        lambda own: own,
    ),
}
_CROPS: dict[Callable[..., object], Callable[..., nn.Module]] = {
    theirs.SwaVLoss.forward: WrappedSwaV,
    theirs.DINOLoss.forward: WrappedDINO,
    LeJEPALoss.forward: WrappedLeJEPA,
}
