"""Log-sum-exps over pairs of rows, in tiles, and what all sums in chunks have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mixmask._devices import as_operator, without_autocast
from mixmask.losses._rows import upcast

# Logits held at a time: on a CPU what fits its cache, on a device what keeps it busy.
_CHUNK_ELEMENTS = {"cpu": 2**18, "device": 2**23}


def sum_pairs(
    rows: Tensor, scale: float, counts: Tensor | None = None, columns: Tensor | None = None,
    own_offset: int = 0, views: int = 1,
) -> Tensor:  # fmt: skip
    """Return the log-sum-exp of each row with all columns but itself, (M, 1) or (M, 2).

    Rows (M, C) and columns (K, C), unit rows of as many equal `views`; without `columns` the rows
    are their own, and each pair is multiplied once for both of its sides. `counts` (K,) is how
    often each column stands in a second sum. The first row of a view stands at `own_offset` among
    the view's columns.
    """
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    weights = None
    if counts is not None:
        weights = torch.stack([torch.ones_like(counts), counts], dim=1).to(accumulator)  # (K, 2)
    # Without a maximum to subtract, powers must fit the dtype, and so must their sums.
    bound = 64 if accumulator == torch.float32 else 600
    if abs(scale) > bound:
        return _reference_sums(rows, columns, scale, weights, own_offset, views)
    sums: Tensor = _PairSums.apply(rows, columns, scale, weights, own_offset, views)  # (M, V)
    return sums


class _PairSums(torch.autograd.Function):
    """Tiles of pairs in two passes: the sums, and by computing the tiles again the gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None,
        own_offset: int, views: int,
    ) -> Tensor:  # fmt: skip
        """Return (M, V) in at least float32."""
        ctx.work = choose_dtype(rows, rows)
        others = None if columns is None else columns.to(ctx.work)
        sums = _sum_tiles(rows.to(ctx.work), others, scale, weights, own_offset, views)  # (M, V)
        ctx.save_for_backward(rows, columns, weights, sums)
        ctx.scale, ctx.place = scale, (own_offset, views)
        return sums.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and columns."""
        refuse_second_derivatives()
        rows, columns, weights, sums = ctx.saved_tensors
        others = None if columns is None else columns.to(ctx.work)
        own_offset, views = ctx.place
        of_rows, of_columns = _grade_tiles(
            rows.to(ctx.work), others, ctx.scale, weights, own_offset, views, grad / sums
        )
        column_grad = None if columns is None else of_columns.to(columns.dtype)
        return of_rows.to(rows.dtype), column_grad, None, None, None, None


def _fake_sums(
    rows: Tensor, _columns: Tensor | None, _scale: float, weights: Tensor | None, *_: int
) -> Tensor:
    sums = 1 if weights is None else weights.shape[1]
    return upcast(rows.new_empty(rows.shape[0], sums))


@as_operator(
    "(Tensor rows, Tensor? columns, float scale, Tensor? weights, SymInt own_offset, int views) "
    "-> Tensor",
    _fake_sums,
)
def _sum_tiles(
    rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None,
    own_offset: int, views: int,
) -> Tensor:  # fmt: skip
    """Return the weighted sums of powers, (M, V)."""
    sums = _fake_sums(rows, columns, scale, weights).zero_()  # (M, V)

    def weigh(powers: Tensor, place: slice) -> Tensor:
        return powers.sum(1, keepdim=True) if weights is None else powers @ weights[place]

    with without_autocast(rows):
        for here, there, powers in _exponentiate_tiles(rows, columns, scale, own_offset, views):
            sums[here] += weigh(powers, there)  # (m, k) -> (m, V)
            if columns is None and here != there:  # The same pairs, seen from their other side.
                sums[there] += weigh(powers.T, here)  # (k, m) -> (k, V)
    return sums


def _fake_slopes(rows: Tensor, columns: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    others = rows[:0] if columns is None else columns
    return upcast(torch.empty_like(rows)), upcast(torch.empty_like(others))


@as_operator(
    "(Tensor rows, Tensor? columns, float scale, Tensor? weights, SymInt own_offset, int views, "
    "Tensor grad) -> (Tensor, Tensor)",
    _fake_slopes,
)
def _grade_tiles(
    rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None,
    own_offset: int, views: int, grad: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows and columns, given those of the sums of powers (M, V)."""
    of_rows, of_columns = (one.zero_() for one in _fake_slopes(rows, columns))
    # Without columns a pair's two slopes go to the same rows.
    others, of_others = (rows, of_rows) if columns is None else (columns, of_columns)
    grad = grad * scale  # (M, V)
    if weights is None:
        weights = torch.ones_like(grad) if columns is None else grad.new_ones(columns.shape[0], 1)
    # A pair counts as the row's and, without columns, also as the column's: a product of rank 2V.
    left, right = grad, weights  # (M, V), (K, V)
    if columns is None:  # (M, 2 V) each.
        left, right = torch.cat([grad, weights], dim=1), torch.cat([weights, grad], dim=1)
    with without_autocast(rows):
        for here, there, powers in _exponentiate_tiles(rows, columns, scale, own_offset, views):
            slopes = powers.mul_(left[here] @ right[there].T).to(rows.dtype)  # (m, k)
            add_product(of_rows[here], slopes, others[there])  # (m, k) @ (k, C)
            if columns is not None or here != there:
                add_product(of_others[there], slopes.T, rows[here])  # (k, m) @ (m, C)
    return of_rows, of_columns


def _exponentiate_tiles(
    rows: Tensor, columns: Tensor | None, scale: float, own_offset: int, views: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the places of tiles, and the powers there, with zeros for a row and itself."""
    others = rows if columns is None else columns
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    # Square tiles of as many logits as are held at a time.
    step = max(1, int(count_elements(rows) ** 0.5))
    for start in range(0, rows.shape[0], step):
        here = slice(start, min(start + step, rows.shape[0]))
        # Without columns the tiles below the diagonal are those above it.
        for other in range(start if columns is None else 0, others.shape[0], step):
            there = slice(other, min(other + step, others.shape[0]))
            powers = (rows[here] @ others[there].T).to(accumulator).mul_(scale).exp_()  # (m, k)
            for low, high, own in _own_columns(rows.shape[0], others.shape[0], own_offset, views):
                # Rows of a view that lie in this tile, and where the first of them meets itself.
                top, bottom = max(low, here.start), min(high, here.stop)
                offset = own + top - low - other
                if top < bottom and top - bottom < offset < there.stop - other:
                    powers[top - start : bottom - start].diagonal(offset).zero_()
            yield here, there, powers


def _own_columns(
    rows: int, columns: int, own_offset: int, views: int
) -> Iterator[tuple[int, int, int]]:
    """Yield where the rows of a view begin and end, and the column that is its first row itself."""
    n, k = rows // views, columns // views
    for view in range(views):
        yield view * n, (view + 1) * n, view * k + own_offset


def _reference_sums(
    rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None,
    own_offset: int, views: int,
) -> Tensor:  # fmt: skip
    """Return what `sum_pairs` does by operations that autograd follows, (M, K) and all."""
    others = rows if columns is None else columns
    logits = upcast(rows @ others.T) * scale  # (M, K)
    own = [
        torch.arange(column, column + high - low, device=rows.device)
        for low, high, column in _own_columns(rows.shape[0], others.shape[0], own_offset, views)
    ]
    logits = logits.scatter(1, torch.cat(own)[:, None], -torch.inf)  # (M, K), index (M, 1)
    if weights is None:
        return logits.logsumexp(dim=1, keepdim=True)  # (M, 1)
    bias = weights.log()  # (K, V)
    return torch.stack([(logits + one).logsumexp(dim=1) for one in bias.unbind(1)], dim=1)


def refuse_second_derivatives() -> None:
    # With create_graph=True, gradients that autograd cannot follow would count as constants.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a sum over negatives has no second derivatives, got create_graph=True; leave it out, "
            "or take the cross-entropy of all logits"
        )


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def choose_dtype(z: Tensor, negatives: Tensor) -> torch.dtype:
    """Return the dtype in which a plain matrix product of the two would run."""
    promoted = torch.promote_types(z.dtype, negatives.dtype)
    known = z.device.type != "meta"  # Of which autocast has no opinion.
    if known and torch.is_autocast_enabled(z.device.type) and promoted != torch.float64:
        return torch.get_autocast_dtype(z.device.type)
    return promoted


def count_elements(rows: Tensor) -> int:
    return _CHUNK_ELEMENTS["cpu" if rows.device.type == "cpu" else "device"]
