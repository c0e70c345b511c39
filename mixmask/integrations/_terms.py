"""The mixed term as integrations of whole packages take it, of what a step of theirs computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmask.losses import Criterion, lambda_weighted_loss
from mixmask.mixing import MixedBatch

Mixing = Callable[[Tensor], MixedBatch]
# Clean images (N, C, H, W), the online branch, and what their mixture is compared with.
View = tuple[Tensor, Callable[[Tensor], Tensor], Sequence[tuple[Criterion, Tensor]]]


@dataclass(frozen=True)
class SplitCriterion:
    """A criterion of which λ weights the distance; the rest sees no target and counts once.

    Attributes:
        distance: (z, target) -> (N,).
        rest: z -> ().
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    rest: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one view towards its targets."""
        return self.weighted(z, target, None, z.new_ones(()))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return both weighted terms, (); see `losses.SharingCriterion`."""
        distance = lam * self.distance(z, target)  # (N,)
        if other is not None:
            distance = distance + (1 - lam) * self.distance(z, other)
        return distance.mean() + self.rest(z)


def check_mixing(mixing: Any) -> None:
    """Require a function from images to their mix."""
    if not callable(mixing):
        raise TypeError(
            f"mixing must be callable with images, got {type(mixing).__name__}; pass for "
            "instance mixmask.MixMask(grid_size=4)"
        )


def mix_views(mixing: Mixing, views: Iterable[View], *, switch: bool) -> tuple[Tensor, Tensor]:
    """Return the mean mixed term over views and their targets, and the mean share of own pixels."""
    terms, shares = [], []
    for images, embed, towards in views:
        mixed = mixing(images)
        z = embed(mixed.images)
        terms += [
            lambda_weighted_loss(criterion, z, target, mixed, switch=switch)
            for criterion, target in towards
        ]
        shares.append(mixed.lam.mean())
    return torch.stack(terms).mean(), torch.stack(shares).mean()
