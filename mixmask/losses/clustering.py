"""Losses against soft assignments: SwAV's codes and DINO's teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixmask._checks import check_positive
from mixmask._distributed import average, check_even, world_size
from mixmask.losses._rows import (
    check_device,
    check_reduction,
    check_rows,
    check_scores,
    mix_rows,
    read,
    reduce,
    upcast,
)

# A center, or a function that returns the one to use now.
Center = Tensor | Callable[[], Tensor]


def swav(z: Tensor, target: Tensor, temperature: float = 0.1, *, reduction: str = "mean") -> Tensor:
    r"""Predict one view's codes from the other's prototype scores.

    $\ell_i = -\sum_k t_{ik} \log softmax(z_i / \tau)_k$. The loss of SwAV is the mean over both
    directions, `(swav(p1, codes2) + swav(p2, codes1)) / 2` with `codes = sinkhorn(p)`.

    Args:
        z: (N, K) prototype scores of one view, floating.
        target: (N, K) codes of the other view, rows that sum to 1; no gradient goes there.
        temperature: τ.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If z and target are not both (N, K) on one device, or an option does not fit.
        TypeError: If z is not floating.

    Source:
        Caron et al., "SwAV", eq. 2.

    Example:
        >>> p1, p2 = torch.randn(2, 8, 32)
        >>> swav(p1, sinkhorn(p2)).shape
        torch.Size([])
    """
    check_positive("temperature", temperature)
    check_reduction(reduction)
    check_rows(z, target)
    return reduce(_soft_cross_entropy(z, target, temperature), reduction)


@dataclass(frozen=True)
class SwAV:
    """`swav` with its options stored; a mixed view meets one code, λ c_i + (1 - λ) c_π(i)."""

    temperature: float = 0.1
    _: KW_ONLY
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_reduction(self.reduction)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `swav`."""
        return swav(z, target, **vars(self))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return the loss against the mixture of two codes; see `SharingCriterion`."""
        check_rows(z, target)
        # The cross-entropy is linear in its codes, so both terms are one.
        return swav(z, mix_rows(target, other, lam), **vars(self))


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float = 0.05, iterations: int = 3, *, gather_distributed: bool = False
) -> Tensor:
    r"""Turn prototype scores into codes that use all prototypes equally (Sinkhorn-Knopp).

    With a queue, pass `torch.cat([scores, queue_scores])` and keep the first N rows.

    Args:
        scores: (N, K) prototype scores, floating.
        epsilon: Weight of the entropy; smaller codes are harder.
        iterations: How often rows and columns are normalised in turn.
        gather_distributed: Use the batches of all processes.

    Returns:
        (N, K) codes in at least float32, rows that sum to 1, without a gradient.

    Raises:
        ValueError: If `scores` is not (N, K) or an option does not fit.

    Source:
        Caron et al., "SwAV", eq. 3-5; Cuturi, "Sinkhorn distances".

    Example:
        >>> codes = sinkhorn(torch.randn(64, 8), epsilon=1.0, iterations=20)
        >>> bool((codes.sum(dim=0) - 8).abs().max() < 1e-3)
        True
    """
    check_scores(scores, "scores")
    check_positive("epsilon", epsilon)
    check_positive("iterations", iterations)
    several = gather_distributed and world_size() > 1
    if several:
        check_even(len(scores), scores.device)
    # In logarithms: of scores far apart, whole rows of powers would underflow.
    codes = upcast(scores) / epsilon  # (N, K)
    for _ in range(iterations):
        # Columns first: each prototype is used equally (eq. 3), by all processes together.
        largest = codes.amax(dim=0)  # (K,)
        if several:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        used = (codes - largest).exp().sum(dim=0)  # (K,)
        if several:
            dist.all_reduce(used)
        # Rows come last, for they must sum to 1 exactly.
        codes = (codes - largest - used.log()).log_softmax(dim=1)  # (N, K)
    return codes.exp()


def dino(
    z: Tensor,
    target: Tensor,
    center: Center | None = None,
    temperature: float = 0.1,
    target_temperature: float = 0.04,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of the student's distribution with the teacher's, centred and sharpened.

    $\ell_i = -\sum_k softmax((t_i - c) / \tau_t)_k \log softmax(z_i / \tau)_k$.

    Args:
        z: (N, K) logits of the student for one view, floating.
        target: (N, K) logits of the teacher for another view; no gradient goes there.
        center: (K,) or (1, K), c, or a function that returns it and is called for every loss;
            None for no center. `update_center` returns the next one, once per step.
        temperature: τ of the student.
        target_temperature: τ_t of the teacher.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If z and target are not both (N, K), if they or the center do not fit in shape
            or device, or if an option does not fit.
        TypeError: If z is not floating, or the center is not a tensor.

    Source:
        Caron et al., "DINO", eq. 2-4 and algorithm 1.

    Example:
        >>> student, teacher = torch.randn(2, 8, 32)
        >>> dino(student, teacher, torch.zeros(32)).shape
        torch.Size([])
    """
    _check_dino(center, temperature, target_temperature, reduction)
    check_rows(z, target)
    sharpened = _sharpen(target, read(center, _check_kind), target_temperature)  # (N, K)
    return reduce(_soft_cross_entropy(z, sharpened, temperature), reduction)


@dataclass(frozen=True, eq=False)
class DINO:
    """`dino` with its options stored; a mixed view meets one target, λ t_i + (1 - λ) t_π(i).

    `update_center` returns a new center, so pass a function, `DINO(lambda: center)`, or build the
    criterion where it is used.

    Example:
        >>> student, teacher = torch.randn(2, 8, 32)
        >>> center = torch.zeros(32)
        >>> criterion = DINO(lambda: center)
        >>> before = criterion(student, teacher)
        >>> center = update_center(center, teacher)
        >>> bool(criterion(student, teacher) != before)
        True
    """

    center: Center | None = None
    temperature: float = 0.1
    target_temperature: float = 0.04
    _: KW_ONLY
    reduction: str = "mean"

    def __post_init__(self) -> None:
        _check_dino(**vars(self))

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `dino`."""
        return dino(z, target, **vars(self))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return the loss against the mixture of two targets; see `SharingCriterion`."""
        check_rows(z, target)
        # Read once: both targets are centred alike.
        center = read(self.center, _check_kind)
        own = _sharpen(target, center, self.target_temperature)
        others = None if other is None else _sharpen(other, center, self.target_temperature)
        # The cross-entropy is linear in its targets, so both terms are one.
        mixture = mix_rows(own, others, lam)  # (N, K)
        return reduce(_soft_cross_entropy(z, mixture, self.temperature), self.reduction)


@torch.no_grad()
def update_center(center: Tensor, target: Tensor, momentum: float = 0.9) -> Tensor:
    r"""Return DINO's center moved towards the mean of the teacher's logits.

    $c \leftarrow m c + (1 - m) \bar t$, over all processes. Call it once per step, after the loss,
    with the clean views' logits; the old center is left as it is.

    Args:
        center: (K,) or (1, K).
        target: (N, K) logits of the teacher, of all clean views together.
        momentum: m.

    Returns:
        The new center, in the shape of the old one.

    Raises:
        ValueError: If the shapes do not fit.

    Source:
        Caron et al., "DINO", eq. 4.

    Example:
        >>> update_center(torch.zeros(2), torch.ones(4, 2))
        tensor([0.1000, 0.1000])
    """
    check_scores(target, "target")
    _check_center(center, target)
    mean = average(target.to(center.dtype).mean(dim=0)).view_as(center)  # (K,) or (1, K)
    return center * momentum + mean * (1 - momentum)


def _check_kind(center: Tensor) -> None:
    if not isinstance(center, Tensor):
        raise TypeError(
            f"center must be a tensor (K,), got {type(center).__name__}; start with "
            "torch.zeros(target.shape[1]), or pass a function that returns the tensor"
        )


def _check_dino(
    center: Center | None, temperature: float, target_temperature: float, reduction: str
) -> None:
    check_positive("temperature", temperature)
    check_positive("target_temperature", target_temperature)
    check_reduction(reduction)
    if center is not None and not callable(center):
        _check_kind(center)


def _check_center(center: Tensor, target: Tensor) -> None:
    if center.shape not in ((target.shape[1],), (1, target.shape[1])):
        raise ValueError(
            f"center must be ({target.shape[1]},), got {tuple(center.shape)}; "
            "start with torch.zeros(target.shape[1])"
        )
    check_device("center", center, "target", target)


def _sharpen(target: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    """Return the teacher's distribution, (N, K), without a gradient."""
    logits = upcast(target.detach())  # (N, K)
    if center is not None:
        _check_center(center, logits)
        logits = logits - center  # (N, K) - (K,)
    return (logits / temperature).softmax(dim=1)


def _soft_cross_entropy(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return -sum_k t_k log softmax(z / τ)_k, (N,)."""
    return -(target.detach() * (upcast(z) / temperature).log_softmax(dim=1)).sum(dim=1)  # (N,)
