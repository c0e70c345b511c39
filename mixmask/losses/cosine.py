"""Negative cosine similarity, the loss of BYOL and SimSiam."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch.nn.functional as F
from torch import Tensor

from mixmask.losses._rows import check_reduction, check_rows, mix_rows, reduce, upcast


def negative_cosine(z: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Negative cosine similarity between each row and its target.

    $\ell_i = -\frac{z_i}{\|z_i\|} \cdot \frac{t_i}{\|t_i\|}$, the target taken as a constant.
    BYOL's $\|\bar z - \bar t\|^2$ is $2 + 2 \ell$.

    Args:
        z: (N, C) predictions, floating, of any length.
        target: (N, C) projections of the other view; no gradient goes there.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If shapes, devices or options do not fit.
        TypeError: If z is not floating.

    Source:
        Grill et al., "BYOL", eq. 2; Chen and He, "SimSiam", eq. 1 and algorithm 1.

    Example:
        >>> import torch
        >>> z = torch.eye(3)
        >>> negative_cosine(2 * z, z)
        tensor(-1.)
    """
    check_reduction(reduction)
    check_rows(z, target)
    # (N, C) * (N, C) -> (N,)
    return reduce(-(_normalize(z) * _normalize(target.detach())).sum(dim=1), reduction)


def squared_distance(z: Tensor, target: Tensor) -> Tensor:
    """Return BYOL's squared distance of unit rows (its eq. 2) per image, (N,)."""
    return 2 + 2 * negative_cosine(z, target, reduction="none")


@dataclass(frozen=True)
class NegativeCosine:
    """`negative_cosine` with its options stored; mixed terms share one normalisation of z."""

    _: KW_ONLY
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `negative_cosine`."""
        return negative_cosine(z, target, **vars(self))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return lam * l(z, target) + (1 - lam) * l(z, other), reduced; see `SharingCriterion`."""
        check_rows(z, target)
        # The loss is linear in the normalised target, so both terms are one product with the
        # mixture of two unit rows. That one is shorter, and must stay so.
        others = None if other is None else _normalize(other.detach())
        mixture = mix_rows(_normalize(target.detach()), others, lam)  # (N, C)
        return reduce(-(_normalize(z) * mixture).sum(dim=1), self.reduction)


def _normalize(rows: Tensor) -> Tensor:
    return F.normalize(upcast(rows), dim=1)
