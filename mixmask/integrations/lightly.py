"""MixMask around lightly's criteria: the call you have, plus what was mixed.

    criterion = wrap(NTXentLoss(memory_bank_size=(4096, 128)))
    loss = criterion(query, key, query_mixed, mixed)

Needs lightly 1.5.22 or newer, the extra `mixmask[lightly]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask import losses
from mixmask._distributed import check_even, world_size
from mixmask.losses._inputs import as_pairs, check_sizes
from mixmask.mixing import MixedBatch

try:
    from lightly.loss import (
        BarlowTwinsLoss,
        DCLLoss,
        DINOLoss,
        NegativeCosineSimilarity,
        NTXentLoss,
        SwaVLoss,
        VICRegLoss,
    )
    from lightly.loss.swav_loss import sinkhorn
    from lightly.loss.vicreg_loss import covariance_loss, variance_loss
    from lightly.utils.dist import gather
except ImportError as error:
    raise ImportError(
        "mixmask.integrations.lightly needs lightly, which could not be imported "
        f"({error}); install it with pip install 'mixmask[lightly]'"
    ) from error

Mixed = MixedBatch | Sequence[MixedBatch] | None
Embeddings = Tensor | Sequence[Tensor] | None


def wrap(
    criterion: nn.Module,
    *,
    switch: bool = True,
    ignore: Sequence[str] = (),
    save_bank: bool = True,
) -> losses.LambdaWeightedLoss | WrappedDINO | WrappedSwaV:
    """Wrap one of lightly's criteria, so that it takes mixed views beside its own arguments.

    The result is called as the criterion is, with two more arguments, `z_mixed` and `mixed`;
    without them it is the criterion. Banks, queues and centers move once a step.

    Args:
        criterion: `NTXentLoss`, `NegativeCosineSimilarity`, `BarlowTwinsLoss`, `VICRegLoss`,
            `DCLLoss`, `SwaVLoss` or `DINOLoss`. Any other criterion (z, target), one derived
            from these with a `forward` of its own included, gets `losses.LambdaWeightedLoss`.
        switch: False keeps the term of λ alone (the paper's ablation).
        ignore: See `losses.LambdaWeightedLoss`.
        save_bank: Put a memory bank into the `state_dict`, where lightly leaves it out, so that
            a resumed run goes on with the negatives that it had. False also reads checkpoints
            from before.

    Returns:
        `WrappedNTXent`, `WrappedPair`, `WrappedSwaV`, `WrappedDINO` or
        `losses.LambdaWeightedLoss`.

    Raises:
        TypeError: If the criterion is not a module.

    Example:
        >>> import mixmask, torch
        >>> criterion = wrap(NTXentLoss(memory_bank_size=(64, 16)))
        >>> mixed = mixmask.mix_batch(torch.rand(4, 3, 8, 8), mixmask.BlockMaskGenerator(2))
        >>> query, key, query_mixed = torch.randn(3, 4, 16)
        >>> criterion(query, key, query_mixed, mixed).shape
        torch.Size([])
    """
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion must be one of lightly's modules, got {type(criterion).__name__}; "
            "pass for instance NTXentLoss()"
        )
    forward = type(criterion).forward
    if forward is NTXentLoss.forward:
        return WrappedNTXent(criterion, switch=switch, save_bank=save_bank)
    if forward in _ROWS:
        return WrappedPair(criterion, switch=switch, ignore=ignore)
    if forward is SwaVLoss.forward:
        return WrappedSwaV(criterion, switch=switch)
    if forward is DINOLoss.forward:
        return WrappedDINO(criterion, switch=switch)
    return losses.LambdaWeightedLoss(criterion, switch=switch, ignore=ignore)


class WrappedPair(losses.LambdaWeightedLoss):
    """`NegativeCosineSimilarity`, `BarlowTwinsLoss`, `VICRegLoss` or `DCLLoss`, with mixed views.

    Called as `losses.LambdaWeightedLoss` is. One λ a sample works with the first and the third;
    the others have no loss of a single image.
    """

    @property
    def _theirs(self) -> Any:
        return self.criterion

    def forward(  # type: ignore[override]  # One direction, as lightly's criteria take it.
        self, z: Tensor, target: Tensor, z_mixed: Embeddings = None, mixed: Mixed = None
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms; see `losses.LambdaWeightedLoss`."""
        _check_split(self._theirs, z)
        return super().forward(z, target, z_mixed, mixed)

    def mixed_loss(  # type: ignore[override]  # One direction, as lightly's criteria take it.
        self,
        z_mixed: Tensor | Sequence[Tensor],
        target: Tensor,
        mixed: MixedBatch | Sequence[MixedBatch],
        *,
        z: Tensor | None = None,
    ) -> Tensor:
        """Return the mixed terms alone; see `losses.LambdaWeightedLoss`."""
        _check_split(self._theirs, target)
        return super().mixed_loss(z_mixed, target, mixed, z=z)

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        del z
        criterion = _ROWS[type(self._theirs).forward](self._theirs)
        return losses.lambda_weighted_loss(criterion, z_mixed, target, mixed, switch=self.switch)


class WrappedNTXent(WrappedPair):
    """`NTXentLoss`, with or without a memory bank, with mixed views.

    With a bank, every term contrasts with the bank as it is before the step, without a copy of it
    and without an (N, K) matrix; then the keys are enqueued, once.
    """

    def __init__(
        self, criterion: NTXentLoss, *, switch: bool = True, save_bank: bool = True
    ) -> None:
        """Store the criterion, and let its bank be saved."""
        super().__init__(criterion, switch=switch)
        bank = criterion.memory_bank
        if save_bank and bank.size[0] > 0:
            bank.register_buffer("bank", bank.bank, persistent=True)
            bank.register_buffer("bank_ptr", bank.bank_ptr, persistent=True)

    def forward(  # type: ignore[override]  # One direction, as lightly's criteria take it.
        self, z: Tensor, target: Tensor, z_mixed: Embeddings = None, mixed: Mixed = None
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms, and enqueue the targets once.

        Args:
            z: (N, C) projections of the online branch, not normalised.
            target: (N, C) keys, not normalised.
            z_mixed: (N, C) projections of the mixed images, or a list of them.
            mixed: What was mixed, or a list in the same order.

        Returns:
            () scalar.

        Raises:
            ValueError: If sizes do not belong together, or if a gathered batch is split unevenly
                over the processes; before anything is enqueued.
        """
        check_sizes(len(z), z=z, target=target)
        _check_split(self._theirs, z)
        pairs = as_pairs(z_mixed, mixed)
        keys = F.normalize(target, dim=1)
        rows = F.normalize(z, dim=1)
        criterion = self._criterion(keys)
        total = criterion(rows, keys)
        for one, record in pairs:
            total = total + self._mixed_term(one, keys, record, None)
        bank = self._theirs.memory_bank
        if bank.size[0] > 0 and rows.requires_grad:
            # What its forward does beside this is to copy the bank.
            bank._dequeue_and_enqueue(keys)
        return total

    def _mixed_term(
        self, z_mixed: Tensor, target: Tensor, mixed: MixedBatch, z: Tensor | None
    ) -> Tensor:
        del z
        keys = F.normalize(target, dim=1)
        rows = F.normalize(z_mixed, dim=1)
        criterion = self._criterion(keys)
        return losses.lambda_weighted_loss(criterion, rows, keys, mixed, switch=self.switch)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        # This comes before the bank's own turn, which would refuse the other shape.
        bank = self._theirs.memory_bank
        saved = state_dict.get(f"{prefix}criterion.memory_bank.bank")
        if bank.bank.ndim == 1 and saved is not None:
            bank.bank = bank.bank.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def _criterion(self, keys: Tensor) -> losses.InfoNCE | losses.NTXent:
        theirs = self._theirs
        bank = theirs.memory_bank
        if bank.size[0] == 0:
            return losses.NTXent(theirs.temperature, gather_distributed=theirs.gather_distributed)
        if bank.bank.ndim == 1:
            # lightly 1.5 learns the width of a bank from the first keys.
            bank(keys)
        return losses.InfoNCE(bank.bank.to(keys.device), theirs.temperature)


class WrappedSwaV(nn.Module):
    """`SwaVLoss`, with mixed views: scores of a mixed crop meet the mixture of two clean codes."""

    def __init__(self, criterion: SwaVLoss, *, switch: bool = True) -> None:
        """Store the criterion."""
        super().__init__()
        self.criterion = criterion
        self.switch = switch

    def forward(
        self,
        high_resolution_outputs: list[Tensor],
        low_resolution_outputs: list[Tensor],
        queue_outputs: list[Tensor] | None = None,
        *,
        z_mixed: Embeddings = None,
        mixed: Mixed = None,
        view: int | Sequence[int] = 0,
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms.

        Args:
            high_resolution_outputs: (N, K) prototype scores, one a large crop.
            low_resolution_outputs: (N, K) prototype scores, one a small crop.
            queue_outputs: (Q, K) scores of queued features, one a large crop.
            z_mixed: (N, K) prototype scores of a mixed crop, or a list of them.
            mixed: What was mixed, or a list in the same order.
            view: Which crop was mixed, counting the large ones first; a list for lists. Its
                mixture is compared with the codes of the other large crops.

        Returns:
            The criterion's loss, (1,) as lightly has it.

        Raises:
            ValueError: If sizes do not belong together, or if a gathered batch is split unevenly.
        """
        theirs = self.criterion
        total = len(high_resolution_outputs) + len(low_resolution_outputs)
        pairs = as_pairs(z_mixed, mixed)
        views = _views(view, len(pairs), total)
        if theirs.sinkhorn_gather_distributed:
            check_even(len(high_resolution_outputs[0]), high_resolution_outputs[0].device)
        loss: Tensor = theirs(high_resolution_outputs, low_resolution_outputs, queue_outputs)
        if not pairs:
            return loss
        codes = [
            self._codes(high_resolution_outputs, queue_outputs, large)
            for large in range(len(high_resolution_outputs))
        ]
        criterion = losses.SwAV(theirs.temperature)
        for (scores, record), mixed_view in zip(pairs, views, strict=True):
            targets = _without(codes, mixed_view)
            loss = loss + _mean_term(criterion, scores, targets, record, switch=self.switch)
        return loss

    def _codes(
        self, outputs: list[Tensor], queue_outputs: list[Tensor] | None, view: int
    ) -> Tensor:
        theirs = self.criterion
        queued = [] if queue_outputs is None else [queue_outputs[view].detach()]
        codes: Tensor = sinkhorn(
            torch.cat([outputs[view].detach(), *queued]),
            iterations=theirs.sinkhorn_iterations,
            epsilon=theirs.sinkhorn_epsilon,
            gather_distributed=theirs.sinkhorn_gather_distributed,
        )
        return codes[: len(outputs[view])]


class WrappedDINO(nn.Module):
    """`DINOLoss`, with mixed views: a mixed crop meets the mixture of two clean targets."""

    def __init__(self, criterion: DINOLoss, *, switch: bool = True) -> None:
        """Store the criterion."""
        super().__init__()
        self.criterion = criterion
        self.switch = switch

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
        *,
        z_mixed: Embeddings = None,
        mixed: Mixed = None,
        view: int | Sequence[int] = 0,
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms; the center moves once, by clean crops.

        Args:
            teacher_out: (N, K) logits of the teacher, one a large crop.
            student_out: (N, K) logits of the student, one a crop, the large ones first.
            teacher_temp: As lightly takes it.
            epoch: As lightly takes it.
            z_mixed: (N, K) logits of the student for a mixed crop, or a list of them.
            mixed: What was mixed, or a list in the same order.
            view: Which crop was mixed; a list for lists. Its mixture is compared with the
                teacher's other crops.

        Returns:
            () scalar.

        Raises:
            ValueError: If sizes do not belong together; before the center moves.
        """
        theirs = self.criterion
        pairs = as_pairs(z_mixed, mixed)
        views = _views(view, len(pairs), len(student_out))
        temperature = self._temperature(teacher_temp, epoch)
        criterion = losses.DINO(theirs.center.flatten(), theirs.student_temp, temperature)
        terms = []
        for (logits, record), mixed_view in zip(pairs, views, strict=True):
            targets = _without(teacher_out, mixed_view)
            terms.append(_mean_term(criterion, logits, targets, record, switch=self.switch))
        loss: Tensor = theirs(teacher_out, student_out, teacher_temp, epoch)
        for term in terms:
            loss = loss + term
        return loss

    def _temperature(self, teacher_temp: float | None, epoch: int | None) -> float:
        """Return what lightly's criterion sharpens its targets with."""
        theirs = self.criterion
        if teacher_temp is not None:
            return float(teacher_temp)
        if epoch is not None and epoch < theirs.warmup_teacher_temp_epochs:
            return float(theirs.teacher_temp_schedule[epoch])
        return float(theirs.teacher_temp)


def _cosine(criterion: NegativeCosineSimilarity) -> losses.Criterion:
    def rows(z: Tensor, target: Tensor) -> Tensor:
        similarity = F.cosine_similarity(z, target, criterion.dim, criterion.eps)
        return -similarity.reshape(len(z), -1).mean(dim=1)

    return rows


class _VICReg:
    """λ weighs the distance; variance and covariance are taken once, of the mixed view."""

    def __init__(self, criterion: VICRegLoss) -> None:
        self.criterion = criterion

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(z, target)
        return loss

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        theirs = self.criterion
        distance = lam * _squares(z, target)
        if other is not None:
            distance = distance + (1 - lam) * _squares(z, other)
        if theirs.gather_distributed and world_size() > 1:
            z = torch.cat(gather(z))
        loss: Tensor = (
            theirs.lambda_param * distance.mean()
            + theirs.mu_param * 0.5 * variance_loss(x=z, eps=theirs.eps)
            + theirs.nu_param * covariance_loss(x=z)
        )
        return loss


# By `forward`, so that a criterion that was given one of its own is not taken for lightly's.
_ROWS: dict[Callable[..., Any], Callable[[Any], losses.Criterion]] = {
    NegativeCosineSimilarity.forward: _cosine,
    VICRegLoss.forward: _VICReg,
    BarlowTwinsLoss.forward: lambda criterion: criterion,
    DCLLoss.forward: lambda criterion: criterion,
}


def _squares(z: Tensor, target: Tensor) -> Tensor:
    return ((z - target) ** 2).flatten(1).mean(dim=1)


def _check_split(criterion: nn.Module, z: Tensor) -> None:
    if getattr(criterion, "gather_distributed", False):
        check_even(len(z), z.device)


def _views(view: int | Sequence[int], mixed: int, crops: int) -> list[int]:
    """Return which crop each mixed view was made of."""
    views = [view] * mixed if isinstance(view, int) and mixed <= 1 else view
    if isinstance(views, int) or len(views) != mixed or not all(0 <= v < crops for v in views):
        raise ValueError(
            f"view must name a crop from 0 to {crops - 1} for each of the {mixed} mixed views, "
            f"got {view}; pass for instance view=0, or view=[0, 1] for two"
        )
    return list(views)


def _without(targets: Sequence[Tensor], view: int) -> list[Tensor]:
    """Leave out the target that was made of the crop itself."""
    others = [target for index, target in enumerate(targets) if index != view]
    if not others:
        raise ValueError(
            "a mixed crop is compared with the other large crops, got none; pass at least two"
        )
    return others


def _mean_term(
    criterion: losses.Criterion,
    z_mixed: Tensor,
    targets: list[Tensor],
    mixed: MixedBatch,
    *,
    switch: bool,
) -> Tensor:
    terms = [
        losses.lambda_weighted_loss(criterion, z_mixed, target, mixed, switch=switch)
        for target in targets
    ]
    return torch.stack(terms).mean()
