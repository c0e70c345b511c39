"""InfoNCE, with negatives from a queue or from the batch, and NT-Xent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from mixmask._checks import check_positive
from mixmask._distributed import gather_rows, rank
from mixmask.losses._negatives import sum_negatives
from mixmask.losses._rows import (
    check_device,
    check_reduction,
    check_rows,
    mix_losses,
    reduce,
    upcast,
)

# A queue, or a function that returns the one to use now.
Negatives = Tensor | Callable[[], Tensor]


def info_nce(
    z: Tensor,
    target: Tensor,
    negatives: Negatives | None = None,
    temperature: float = 0.2,
    *,
    gather_distributed: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrast each row with its target against negatives.

    $\ell_i = -\log \frac{\exp(z_i \cdot t_i / \tau)}{\exp(z_i \cdot t_i / \tau) +
    \sum_k \exp(z_i \cdot n_k / \tau)}$. With a queue of negatives, the sum is taken in chunks
    and its gradient along with it, so that no (N, K) matrix is ever held; without one, the
    other targets of the batch are the negatives.

    Args:
        z: (N, C) queries, floating; normalise them first, they are used as they are.
        target: (N, C) keys, row i belonging to query i.
        negatives: (K, C) queue of normalised, detached rows, in any order, or a function
            () -> (K, C) that is asked at every call; None takes the batch's other targets.
        temperature: τ.
        gather_distributed: Take the targets of all processes as negatives, not only the batch's.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If shapes, devices or options do not fit, if the negatives carry a graph, or
            if the processes hold different numbers of rows.
        TypeError: If z is not floating, or if the negatives are not a tensor.

    Source:
        van den Oord et al., "CPC", eq. 4; He et al., "MoCo", eq. 1.

    Example:
        >>> z = torch.eye(4)
        >>> info_nce(z, z, negatives=-z, temperature=1.0, reduction="none").shape
        torch.Size([4])
    """
    _check_options(negatives, temperature, gather_distributed, reduction)
    queue = _read(negatives)
    _check_inputs(z, target, queue)
    if queue is None:
        loss = _contrast_in_batch(z, target, temperature, gather_distributed)
    else:
        loss = _contrast(z, target, sum_negatives(z, queue, 1 / temperature), temperature)
    return reduce(loss, reduction)


@dataclass(frozen=True, eq=False)
class InfoNCE:
    """`info_nce` with its options stored, as a criterion (z, target).

    The queue's rows must be normalised, as queries and keys are, and detached; they are used as
    they are. A queue that the loop writes in place, as MoCo's buffer, can be given once. One that
    the loop rebinds, as in `queue = torch.cat([queue, keys])[n:]`, would be held at its first
    value: give it as `InfoNCE(lambda: queue)`, or build the criterion where it is used.

    `lambda_weighted_loss` finds its `weighted` method, which takes the negatives' sum once for
    both terms.

    Example:
        >>> queue = F.normalize(torch.randn(512, 16), dim=1)
        >>> q, k = F.normalize(torch.randn(2, 8, 16), dim=2)
        >>> criterion = InfoNCE(lambda: queue)
        >>> before = criterion(q, k)
        >>> queue = torch.cat([queue, k])[8:]
        >>> bool(criterion(q, k) != before)
        True
    """

    negatives: Negatives | None = None
    temperature: float = 0.2
    _: KW_ONLY
    gather_distributed: bool = False
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Refuse bad options now rather than at the first step."""
        _check_options(**vars(self))

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `info_nce`."""
        return info_nce(z, target, **vars(self))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return lam * l(z, target) + (1 - lam) * l(z, other), reduced; see `SharingCriterion`."""
        queue, tau = _read(self.negatives), self.temperature
        _check_inputs(z, target, queue)
        # The mixed query meets the same negatives in both terms: their sum is taken once.
        negative = None if queue is None else sum_negatives(z, queue, 1 / tau)

        def contrast(target: Tensor) -> Tensor:
            if negative is None:
                return _contrast_in_batch(z, target, tau, self.gather_distributed)
            return _contrast(z, target, negative, tau)

        own = contrast(target)
        others = None if other is None else contrast(other)
        return reduce(mix_losses(own, others, lam), self.reduction)


def _read(negatives: Negatives | None) -> Tensor | None:
    """Return the queue of now."""
    if negatives is None or isinstance(negatives, Tensor):
        return negatives
    queue = negatives()
    _check_queue(queue)
    return queue


def _check_options(
    negatives: Negatives | None, temperature: float, gather_distributed: bool, reduction: str
) -> None:
    check_positive("temperature", temperature)
    check_reduction(reduction)
    if negatives is None:
        return
    if not callable(negatives):
        _check_queue(negatives)
    if gather_distributed:
        raise ValueError(
            "gather_distributed=True gathers targets as negatives, which a queue replaces; "
            "leave one of them out, and gather the keys where they are enqueued"
        )


def _check_queue(queue: Tensor) -> None:
    if not isinstance(queue, Tensor):
        raise TypeError(
            f"negatives must be a tensor (K, C) of normalised rows, got {type(queue).__name__}; "
            "stack the keys with torch.stack, or pass a function that returns the tensor"
        )
    if queue.ndim != 2 or 0 in queue.shape:
        raise ValueError(
            f"negatives must be (K, C), got {tuple(queue.shape)}; a queue that is "
            "stored as (C, K) is passed as queue.T"
        )
    if queue.requires_grad and not queue.is_leaf:
        raise ValueError(
            "negatives must carry no graph, got a queue computed from what is trained; detach the "
            "keys before they are enqueued, as in keys.detach()"
        )


def _check_inputs(z: Tensor, target: Tensor, queue: Tensor | None) -> None:
    check_rows(z, target)
    if queue is None:
        return
    if queue.shape[1] != z.shape[1]:
        raise ValueError(
            f"negatives must be (K, {z.shape[1]}), got {tuple(queue.shape)}; a queue that "
            "is stored as (C, K) is passed as queue.T"
        )
    check_device("negatives", queue, "z", z)


def _contrast(z: Tensor, target: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Contrast each row with its target against the log-sum-exp of its negatives, (N,)."""
    # -log(exp(p) / (exp(p) + exp(n))), and no softplus, which is cut off at 20.
    return -F.logsigmoid(_similarity(z, target, temperature) - negative)


def _similarity(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the scaled similarity of matching rows, (N,), in at least float32."""
    # No einsum: autocast would run it in half precision.
    return (upcast(z) * upcast(target)).sum(dim=1) / temperature


def _contrast_in_batch(z: Tensor, target: Tensor, temperature: float, gather: bool) -> Tensor:
    """Contrast each row with its target against all other targets, (N,)."""
    target = target.to(z.dtype)
    first = 0
    if gather:
        target, first = gather_rows(target), rank() * len(z)  # (W * N, C)
    logits = upcast(einsum(z, target, "n c, k c -> n k")) / temperature  # (N, W * N)
    # Row i's own target stands in this process's block.
    labels = torch.arange(first, first + len(z), device=z.device)
    return F.cross_entropy(logits, labels, reduction="none")


def nt_xent(
    z: Tensor,
    target: Tensor,
    temperature: float = 0.5,
    *,
    one_directional: bool = False,
    gather_distributed: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrast two views of a batch, each with all other images of both (SimCLR).

    $\ell_i = \frac{1}{2} [\ell(z_i, t_i) + \ell(t_i, z_i)]$ with $\ell(a, b) = -\log
    \frac{\exp(\cos(a, b) / \tau)}{\sum_{c \neq a} \exp(\cos(a, c) / \tau)}$ over the 2N rows.

    Args:
        z: (N, C) projections of one view, floating, of any length.
        target: (N, C) projections of the other view.
        temperature: τ.
        one_directional: Contrast z with the targets alone, $\ell_i = -\log softmax(\cos(z_i, t) /
            \tau)_i$. Around a mixed view that is i-Mix: one soft cross-entropy with the shares as
            labels, in which the partner is a positive and the other mixtures are left out.
        gather_distributed: Contrast with the rows of all processes.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If shapes, devices or options do not fit, or if the processes hold different
            numbers of rows.
        TypeError: If z is not floating.

    Source:
        Chen et al., "SimCLR", eq. 1; Lee et al., "i-Mix".

    Example:
        >>> z = torch.eye(4)
        >>> bool(nt_xent(z, z) < nt_xent(z, z.roll(1, 0)))
        True
    """
    check_positive("temperature", temperature)
    check_reduction(reduction)
    check_rows(z, target)
    dtype = torch.promote_types(z.dtype, target.dtype)
    # In float16 the squares of a row overflow, and F.normalize divides zeros by zero.
    z, target = (F.normalize(upcast(rows), dim=1).to(dtype) for rows in (z, target))
    if one_directional:
        loss = _contrast_in_batch(z, target, temperature, gather_distributed)
        return reduce(loss, reduction)
    all_z, all_target, first = z, target, 0
    if gather_distributed:
        all_z, all_target, first = gather_rows(z), gather_rows(target), rank() * len(z)
    own = torch.arange(first, first + len(z), device=z.device)
    # (N,) each; halved, so that a batch's mean is SimCLR's over its 2N rows.
    there = _contrast_views(z, all_z, all_target, own, temperature)
    back = _contrast_views(target, all_target, all_z, own, temperature)
    return reduce((there + back) / 2, reduction)


@dataclass(frozen=True)
class NTXent:
    """`nt_xent` with its options stored.

    Example:
        >>> z1, z2 = torch.randn(2, 8, 16)
        >>> NTXent(0.1)(z1, z2).shape
        torch.Size([])
    """

    temperature: float = 0.5
    _: KW_ONLY
    one_directional: bool = False
    gather_distributed: bool = False
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Refuse bad options now rather than at the first step."""
        check_positive("temperature", self.temperature)
        check_reduction(self.reduction)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `nt_xent`."""
        return nt_xent(z, target, **vars(self))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return lam * l(z, target) + (1 - lam) * l(z, other), reduced; see `SharingCriterion`."""
        options = {**vars(self), "reduction": "none"}
        own = nt_xent(z, target, **options)  # (N,)
        others = None if other is None else nt_xent(z, other, **options)
        return reduce(mix_losses(own, others, lam), self.reduction)


def _contrast_views(
    rows: Tensor, same: Tensor, opposite: Tensor, own: Tensor, temperature: float
) -> Tensor:
    """Contrast rows with both views' columns; `own` says which column is the row's image."""
    # Upcast before the division, which could overflow half precision.
    across = upcast(einsum(rows, opposite, "n c, k c -> n k"))  # (N, W * N)
    within = upcast(einsum(rows, same, "n c, k c -> n k"))
    # A row is no negative of itself.
    within = within.scatter(1, own[:, None], -torch.inf)
    logits = torch.cat([across, within], dim=1) / temperature  # (N, 2 W * N)
    return F.cross_entropy(logits, own, reduction="none")
