"""lightly's criteria over lists of crops, and what all wrapped criteria share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor, nn

from mixmask import losses
from mixmask._distributed import check_even
from mixmask.integrations._steps import weigh_squares
from mixmask.losses._inputs import Embeddings, Records, as_pairs
from mixmask.mixing import MixedBatch


class LikeIts(nn.Module):
    """A wrapper that looks like the criterion it holds: attributes, class and pickling."""

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "criterion"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_its(name):
            setattr(self.criterion, name, value)
        else:
            nn.Module.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_its(name):
            delattr(self.criterion, name)
        else:
            nn.Module.__delattr__(self, name)

    def _is_its(self, name: str) -> bool:
        # Read past __getattr__, which would ask for the criterion again before there is one.
        criterion = self.__dict__.get("_modules", {}).get("criterion")
        own = name == "criterion" or name in self.__dict__ or hasattr(type(self), name)
        return not own and hasattr(criterion, name)

    def __reduce__(self) -> Any:
        # The default would name the class that `__class__` shows.
        return _blank, (type(self),), self.__dict__

    def _get_name(self) -> str:
        return type(self).__name__

    # For isinstance. No method of this class may use `super()`, whose cell has the same name.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        criterion = self.__dict__.get("_modules", {}).get("criterion")
        return type(self) if criterion is None else type(criterion)


def _blank(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


class _Crops(LikeIts):
    """A criterion over lists of crops."""

    def __init__(self, criterion: nn.Module, *, switch: bool = True) -> None:
        nn.Module.__init__(self)
        self.criterion = criterion
        self.switch = switch

    def _mixed_terms(
        self,
        criterion: losses.Criterion,
        targets: Sequence[Tensor],
        pairs: list[tuple[Tensor, MixedBatch]],
        views: list[int],
    ) -> Tensor:
        """Return the sum over mixed views of the mean over the targets of other crops."""
        total = targets[0].new_zeros(())
        # A crop has no target in itself: lightly skips that pair, too.
        for (z, record), view in zip(pairs, views, strict=True):
            terms = [
                losses.lambda_weighted_loss(criterion, z, target, record, switch=self.switch)
                for index, target in enumerate(targets)
                if index != view
            ]
            if not terms:
                raise ValueError(
                    "a mixed crop is compared with the other large crops, got none; pass at "
                    "least two"
                )
            total = total + torch.stack(terms).mean()
        return total


class WrappedSwaV(_Crops):
    """`SwaVLoss`, with mixed views, whose target is the mixture of two clean codes."""

    def forward(
        self,
        high_resolution_outputs: list[Tensor],
        low_resolution_outputs: list[Tensor],
        queue_outputs: list[Tensor] | None = None,
        *,
        z_mixed: Embeddings | None = None,
        mixed: Records | None = None,
        view: int | Sequence[int] = 0,
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms, (1,); see `lightly.wrap`."""
        large = high_resolution_outputs  # (N, K) scores of each crop, (Q, K) of the queue
        pairs = as_pairs(z_mixed, mixed)
        views = _views(view, len(pairs), len(large) + len(low_resolution_outputs))
        # Sinkhorn-Knopp scales by N times the processes, and so would be wrong for uneven batches.
        if self.sinkhorn_gather_distributed:
            check_even(len(large[0]), large[0].device)
        loss: Tensor = self.criterion(large, low_resolution_outputs, queue_outputs)
        if not pairs:
            return loss
        queued = queue_outputs or [crop[:0] for crop in large]  # (0, K) where there is no queue.
        codes = [self._codes(*scores) for scores in zip(large, queued, strict=True)]
        return loss + self._mixed_terms(losses.SwAV(self.temperature), codes, pairs, views)

    def _codes(self, scores: Tensor, queued: Tensor) -> Tensor:
        codes: Tensor = sinkhorn(
            torch.cat([scores, queued]).detach(),
            iterations=self.sinkhorn_iterations,
            epsilon=self.sinkhorn_epsilon,
            gather_distributed=self.sinkhorn_gather_distributed,
        )
        return codes[: len(scores)]  # (N + Q, K) -> (N, K)


class WrappedDINO(_Crops):
    """`DINOLoss`, with mixed views, whose target is the mixture of two of the teacher's."""

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
        *,
        z_mixed: Embeddings | None = None,
        mixed: Records | None = None,
        view: int | Sequence[int] = 0,
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms, (); see `lightly.wrap`."""
        pairs = as_pairs(z_mixed, mixed)
        views = _views(view, len(pairs), len(student_out))
        # First, for the criterion moves its center; clean and mixed terms meet the same one.
        if pairs:
            temperature = self._teacher_temperature(teacher_temp, epoch)
            sharpened = losses.DINO(self.center.flatten(), self.student_temp, temperature)  # (K,)
            term = self._mixed_terms(sharpened, teacher_out, pairs, views)
        loss: Tensor = self.criterion(teacher_out, student_out, teacher_temp, epoch)
        return loss + term if pairs else loss

    def _teacher_temperature(self, given: float | None, epoch: int | None) -> float:
        if given is None and epoch is not None and epoch < self.warmup_teacher_temp_epochs:
            return float(self.teacher_temp_schedule[epoch])
        # Theirs is a tensor in the default dtype: rounded alike, all terms have one temperature.
        return float(torch.as_tensor(self.teacher_temp if given is None else given))


class WrappedLeJEPA(_Crops):
    r"""`LeJEPALoss`, with mixed views.

    LeJEPA is $(1 - w) \|z - \mu\|^2 + w\,\mathrm{SIGReg}$ with $\mu_i$ the mean of the global
    views of an image. SIGReg does not see $\mu$, so λ weights the distance alone: $(1 - w) [\lambda
    \|z^m_i - \mu_i\|^2 + (1 - \lambda) \|z^m_i - \mu_{\pi(i)}\|^2] + w\,\mathrm{SIGReg}(z^m)$.
    No gradient goes to the centers: it would draw different images together.
    """

    def forward(
        self,
        *,
        local_proj: Tensor,
        global_proj: Tensor,
        z_mixed: Embeddings | None = None,
        mixed: Records | None = None,
    ) -> Tensor:
        """Return the criterion's loss plus the mixed terms, (); see `lightly.wrap`."""
        pairs = as_pairs(z_mixed, mixed)
        loss: Tensor = self.criterion(local_proj=local_proj, global_proj=global_proj)
        if not pairs:
            return loss
        centers = global_proj.detach().mean(dim=0)  # (W, N, C) -> (N, C)
        weight = float(self.lambda_param)
        towards = weigh_squares(1 - weight, lambda z: weight * self.sigreg(z))
        return loss + self._mixed_terms(towards, [centers], pairs, [-1] * len(pairs))


def _views(view: int | Sequence[int], mixed: int, crops: int) -> list[int]:
    """Return which crop each mixed view was made of."""
    views = [view] * mixed if isinstance(view, int) and mixed <= 1 else view
    if isinstance(views, int) or len(views) != mixed or not all(0 <= v < crops for v in views):
        raise ValueError(
            f"view must name a crop from 0 to {crops - 1} for each of the {mixed} mixed views, "
            f"got {view}; pass for instance view=0, or view=[0, 1] for two"
        )
    return list(views)
