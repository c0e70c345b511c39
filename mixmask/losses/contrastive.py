"""InfoNCE, with negatives from a queue or from the batch, and NT-Xent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask._checks import check_positive
from mixmask._distributed import gather_rows, rank, world_size
from mixmask.losses._log_sums import mix_log_sums, sum_negatives
from mixmask.losses._pair_sums import sum_pairs
from mixmask.losses._rows import (
    check_device,
    check_reduction,
    check_rows,
    mix_losses,
    read,
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
    \sum_k \exp(z_i \cdot n_k / \tau)}$, over a queue of negatives, in chunks without an (N, K)
    matrix, or over the batch's other targets.

    Args:
        z: (N, C) queries, floating; they are not normalised here.
        target: (N, C) keys, row i belonging to query i.
        negatives: (K, C) queue of normalised, detached rows, in any order, or a function
            () -> (K, C) that is called for every loss; None takes the batch's other targets.
        temperature: τ.
        gather_distributed: Take the targets of all processes as negatives, not only the batch's.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If shapes, devices or options do not fit, if the negatives carry a graph, or
            if the processes hold different numbers of rows.
        TypeError: If z is not floating, or if the negatives are not a tensor.
        RuntimeError: In a backward pass with create_graph=True: there are no second derivatives.

    Source:
        van den Oord et al., "CPC", eq. 4; He et al., "MoCo", eq. 1.

    Example:
        >>> z = torch.eye(4)
        >>> info_nce(z, z, negatives=-z, temperature=1.0, reduction="none").shape
        torch.Size([4])
    """
    _check_options(negatives, temperature, gather_distributed, reduction)
    queue = read(negatives, _check_queue)  # (K, C)
    _check_inputs(z, target, queue)
    if queue is None:
        return _contrast_in_batch(z, target, temperature, gather_distributed, reduction)
    loss = _contrast(z, target, sum_negatives(z, queue, 1 / temperature), temperature)  # (N,)
    return reduce(loss, reduction)


@dataclass(frozen=True, eq=False)
class InfoNCE:
    """`info_nce` with its options stored, as a criterion (z, target).

    A queue that is written in place, such as MoCo's buffer, can be passed once. If the loop
    rebinds it, as in `queue = torch.cat([queue, keys])[n:]`, a tensor would stay the first queue:
    pass a function, `InfoNCE(lambda: queue)`, or build the criterion where it is used. The two
    terms of a mixed view share one sum over negatives.

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
        _check_options(**vars(self))

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `info_nce`."""
        return info_nce(z, target, **vars(self))

    def weighted(
        self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor,
        partner: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return lam * l(z, target) + (1 - lam) * l(z, other), reduced; see `SharingCriterion`."""
        queue, tau = read(self.negatives, _check_queue), self.temperature
        _check_inputs(z, target, queue)
        if queue is None and other is not None and partner is not None:
            # Both terms contrast with the same targets: one matrix of logits serves them.
            gather, mixing = self.gather_distributed, (partner, lam)
            return _contrast_in_batch(z, target, tau, gather, self.reduction, mixing)
        # The mixed query meets the same negatives in both terms: their sum is taken once.
        negative = None if queue is None else sum_negatives(z, queue, 1 / tau)  # (N,)

        def contrast(target: Tensor) -> Tensor:
            if negative is None:
                return _contrast_in_batch(z, target, tau, self.gather_distributed, "none")
            return _contrast(z, target, negative, tau)

        own = contrast(target)  # (N,)
        others = None if other is None else contrast(other)  # (N,)
        return reduce(mix_losses(own, others, lam), self.reduction)


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
            "negatives must carry no graph, got a queue computed from trained parameters; detach "
            "the keys before they are enqueued, as in keys.detach()"
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


# Whom each image was mixed with, (N,), and its share, () or (N,).
Mixing = tuple[Tensor, Tensor]


def _contrast_in_batch(
    z: Tensor, target: Tensor, temperature: float, gather: bool, reduction: str,
    mixing: Mixing | None = None,
) -> Tensor:  # fmt: skip
    """Contrast each row with its target, or with a mixture, against all targets: (N,) or ()."""
    target = target.to(z.dtype)
    columns = gather_rows(target) if gather else target  # (W * N, C)
    positive = _similarity(z, target, temperature)  # (N,)
    weights = counts = None
    if mixing is not None:
        partner, lam = mixing
        other = _similarity(z, target.index_select(0, partner), temperature)  # (N,)
        positive = mix_losses(positive, other, lam)  # (N,)
        # In the partner's term a target stands as often as it was chosen: for a permutation once
        # each, so both terms have the same log-sum-exp, and λ weighs the positives alone.
        counts = _count_partners(partner, columns, gather)
        if counts is not None:
            weights = torch.stack([lam, 1 - lam], dim=-1).expand(z.shape[0], 2)  # (N, 2)
    # Of a mean the gradient of the columns comes with the same pass, so it is asked for here.
    mean = reduction == "mean"
    sums = mix_log_sums(z, columns, 1 / temperature, weights, counts, mean=mean)
    return sums - (positive.mean() if mean else positive)


def _count_partners(partner: Tensor, columns: Tensor, gather: bool) -> Tensor | None:
    """Count how often each of all targets is a partner's, (W * N,); None where each is once."""
    if gather and world_size() > 1:
        # An index within this process's batch becomes one into the gathered rows.
        partner = gather_rows(partner + rank() * partner.shape[0], checked=False)  # (W * N,)
    counts = torch.zeros(columns.shape[0], dtype=torch.float32, device=columns.device)
    counts = counts.index_add(0, partner, torch.ones_like(partner, dtype=counts.dtype))  # (W * N,)
    # Almost always a permutation, but to look at a device's values would be to wait for it.
    known = counts.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if known and bool((counts == 1).all()) else counts


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
            \tau)_i$. Around a mixed view that is i-Mix: the partner is a positive, and the other
            mixtures are left out.
        gather_distributed: Contrast with the rows of all processes.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If shapes, devices or options do not fit, or if the processes hold different
            numbers of rows.
        TypeError: If z is not floating.
        RuntimeError: As for `info_nce`.

    Source:
        Chen et al., "SimCLR", eq. 1; Lee et al., "i-Mix".

    Example:
        >>> z = torch.eye(4)
        >>> bool(nt_xent(z, z) < nt_xent(z, z.roll(1, 0)))
        True
    """
    check_positive("temperature", temperature)
    check_reduction(reduction)
    loss = _contrast_in_batch if one_directional else _contrast_views
    return loss(*_normalize(z, target), temperature, gather_distributed, reduction)


@dataclass(frozen=True)
class NTXent:
    """`nt_xent` with its options stored, as a criterion (z, target)."""

    temperature: float = 0.5
    _: KW_ONLY
    one_directional: bool = False
    gather_distributed: bool = False
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_reduction(self.reduction)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `nt_xent`."""
        return nt_xent(z, target, **vars(self))

    def weighted(
        self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor,
        partner: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Weigh both terms as `InfoNCE.weighted` does."""
        if other is None or partner is None:
            # Without knowing who the partners are, nothing is shared but the options.
            options = {**vars(self), "reduction": "none"}
            own = nt_xent(z, target, **options)  # (N,)
            others = None if other is None else nt_xent(z, other, **options)
            return reduce(mix_losses(own, others, lam), self.reduction)
        loss = _contrast_in_batch if self.one_directional else _contrast_views
        tau, gather = self.temperature, self.gather_distributed
        return loss(*_normalize(z, target), tau, gather, self.reduction, (partner, lam))


def _normalize(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(z, target)
    dtype = torch.promote_types(z.dtype, target.dtype)
    # In float16 the squares of a row overflow, and F.normalize divides zeros by zero.
    z, target = (F.normalize(upcast(rows), dim=1).to(dtype) for rows in (z, target))
    return z, target


def _contrast_views(
    z: Tensor, target: Tensor, temperature: float, gather: bool, reduction: str,
    mixing: Mixing | None = None,
) -> Tensor:  # fmt: skip
    """Contrast unit rows of each view with all others of both, (N,) or ()."""
    n, scale = z.shape[0], 1 / temperature
    rows, columns, own_offset = torch.cat([z, target]), None, 0  # (2 N, C)
    if gather and world_size() > 1:
        views = gather_rows(z), gather_rows(target, checked=False)  # (W * N, C) each
        columns, own_offset = torch.cat(views), rank() * n  # (2 W N, C)
    counts = weights = None
    if mixing is not None:
        half = rows[:n] if columns is None else columns.chunk(2)[0]  # (N, C) or (W * N, C)
        counts = _count_partners(mixing[0], half, gather)
        # The mixed rows stand in the partners' loss once each, the targets as often as chosen.
        if counts is not None:
            weights = torch.cat([torch.ones_like(counts), counts])  # (2 W N,)
    # A row is no negative of itself.
    sums = sum_pairs(rows, scale, weights, columns, own_offset, views=2)  # (2 N, 1 or 2)
    there, back = sums[:n], sums[n:]  # (N, 1 or 2) each
    # Halved, so that a batch's mean is SimCLR's over its 2N rows.
    loss = (there[:, 0] + back[:, 0]) / 2 - _similarity(z, target, temperature)  # (N,)
    if mixing is not None:
        partner, lam = mixing
        # The second sums, in which targets are counted; the first ones again for a permutation.
        there, back = there[:, -1], back[:, -1]  # (N,)
        if counts is not None:
            # Where two images share a partner, its row meets copies of itself.
            copies = (counts[own_offset : own_offset + n] - 1).clamp(min=0).log()  # (N,)
            itself = _similarity(target, target, temperature)  # (N,)
            # log(exp(back) + copies * exp(itself)), also for none: no copies are -inf here.
            back = back - F.logsigmoid(back - itself - copies)
        positive = _similarity(z, target.index_select(0, partner), temperature)  # (N,)
        others = (there + back.index_select(0, partner)) / 2 - positive  # (N,)
        loss = mix_losses(loss, others, lam)
    return reduce(loss, reduction)
