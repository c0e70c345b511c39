"""Log-sum-exps over negatives and over a batch, in chunks, so that no N x K matrix is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixmask._devices import as_operator, without_autocast
from mixmask.losses._pair_sums import (
    add_product,
    choose_dtype,
    count_elements,
    refuse_second_derivatives,
)
from mixmask.losses._rows import upcast

# Bands are larger, for each of them adds to the gradient of all columns.
_BANDS = 4
# Rows of a band at least, below which a matrix product reads the columns again and again.
_FEWEST_ROWS = 32


def sum_negatives(z: Tensor, negatives: Tensor, scale: float) -> Tensor:
    """Return log sum_k exp(scale * z . n_k), (N,), without ever holding N x K."""
    sums: Tensor = _LogSumExp.apply(z, negatives, scale)  # (N,)
    return sums


def mix_log_sums(
    rows: Tensor, columns: Tensor, scale: float, weights: Tensor | None = None,
    counts: Tensor | None = None, *, mean: bool = False,
) -> Tensor:  # fmt: skip
    """Return the log-sum-exp of each row's logits, (N,), or the mean of all, ().

    With `counts` (K,), how often each column (K, C) stands in a second sum, it is the mixture of
    both: weights[:, 0] of the first and weights[:, 1] of the second. Bands of rows (N, C) are taken
    one after the other, each with all of its logits, so that their gradient comes with the same
    pass; with `mean` that of the columns does, too.
    """
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    if weights is None:
        weights = torch.ones(rows.shape[0], 1, dtype=accumulator, device=rows.device)
    weights = weights.to(accumulator)
    # The passes in bands have no gradient for a λ that is itself trained.
    if weights.requires_grad:
        mixed = _reference_mix(rows, columns, scale, weights, counts)  # (N,)
        return mixed.mean() if mean else mixed
    result: Tensor = _MixedLogSums.apply(rows, columns, scale, weights, counts, mean)  # (N,) or ()
    return result


class _LogSumExp(torch.autograd.Function):
    """One pass over the negatives (K, C) in chunks, which also gathers the gradient of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, negatives: Tensor, scale: float) -> Tensor:
        """Return (N,) in at least float32."""
        work = choose_dtype(z, negatives)
        result, mean = _sum_chunks(z.to(work), negatives, scale, ctx.needs_input_grad[0])
        # MoCo writes keys into its queue before the backward, which autograd would refuse of a
        # saved tensor; the first derivative in z does not read the queue again.
        ctx.save_for_backward(mean, z, result, *([negatives] if ctx.needs_input_grad[1] else []))
        ctx.scale, ctx.work = scale, work
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of z and, by recomputing chunks, of the negatives if asked."""
        refuse_second_derivatives()
        mean, z, result, *rest = ctx.saved_tensors
        of_z = (mean * grad[:, None]).to(z.dtype) if ctx.needs_input_grad[0] else None  # (N, C)
        if not rest:
            return of_z, None, None
        of_negatives = _grade_chunks(z.to(ctx.work), rest[0], ctx.scale, result, grad)  # (K, C)
        return of_z, of_negatives.to(rest[0].dtype), None


@as_operator(
    "(Tensor rows, Tensor negatives, float scale, bool needs_mean) -> (Tensor, Tensor)",
    lambda rows, *_: (upcast(rows.new_empty(rows.shape[0])), upcast(torch.empty_like(rows))),
)
def _sum_chunks(
    rows: Tensor, negatives: Tensor, scale: float, needs_mean: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp (N,) and the weighted mean of the negatives (N, C)."""
    work, accumulator = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
    # The running maximum keeps every power at most 1, whatever the scale.
    largest = rows.new_full((rows.shape[0], 1), -torch.inf, dtype=accumulator)  # (N, 1)
    total = torch.zeros_like(largest)
    mean = torch.zeros(rows.shape, dtype=accumulator, device=rows.device)  # (N, C)
    for chunk in _split(negatives, rows.shape[0]):
        chunk = chunk.to(work)  # (k, C)
        weights = (rows @ chunk.T).to(accumulator).mul_(scale)  # (N, k)
        rise = torch.maximum(largest, weights.amax(dim=1, keepdim=True))  # (N, 1)
        # What was summed up to here was relative to the maximum up to here.
        shrink = (largest - rise).exp_()  # (N, 1)
        weights.sub_(rise).exp_()
        total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        if needs_mean:
            mean.mul_(shrink).add_(weights.to(work) @ chunk)  # (N, k) @ (k, C)
        largest = rise
    return (largest + total.log()).squeeze(1), mean.div_(total).mul_(scale)  # (N,), (N, C)


@as_operator(
    "(Tensor rows, Tensor negatives, float scale, Tensor sums, Tensor grad) -> Tensor",
    lambda rows, negatives, *_: rows.new_empty(negatives.shape),
)
def _grade_chunks(
    rows: Tensor, negatives: Tensor, scale: float, sums: Tensor, grad: Tensor
) -> Tensor:
    """Return the gradient of the negatives, (K, C)."""
    parts = []
    for chunk in _split(negatives, rows.shape[0]):
        weights = (rows @ chunk.to(rows.dtype).T).to(sums.dtype).mul_(scale)  # (N, k)
        weights.sub_(sums[:, None]).exp_().mul_(grad[:, None] * scale)
        parts.append(weights.T.to(rows.dtype) @ rows)  # (k, C)
    return torch.cat(parts)  # (K, C)


class _MixedLogSums(torch.autograd.Function):
    """Both sums of a band of rows, and at once the gradients that need nothing else."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: float, weights: Tensor,
        counts: Tensor | None, mean: bool,
    ) -> Tensor:  # fmt: skip
        """Return (N,) in at least float32, or ()."""
        work = choose_dtype(rows, columns)
        of_rows, of_columns = ctx.needs_input_grad[:2]
        # A row's part in the mean is known before the backward, any other gradient is not.
        grad = torch.ones_like(weights[:, 0]) if mean else None  # (N,)
        result, row_grad, column_grad = _pass_bands(
            rows.to(work), columns.to(work), scale, weights, counts, grad,
            of_rows, of_columns and mean,
        )  # fmt: skip
        ctx.save_for_backward(rows, columns, weights, counts, row_grad, column_grad)
        ctx.scale, ctx.mean, ctx.work = scale, mean, work
        return result.mean() if mean else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and columns."""
        refuse_second_derivatives()
        rows, columns, weights, counts, row_grad, column_grad = ctx.saved_tensors
        of_rows, of_columns = ctx.needs_input_grad[:2]
        if of_columns and not ctx.mean:
            _, _, column_grad = _pass_bands(
                rows.to(ctx.work), columns.to(ctx.work), ctx.scale, weights, counts, grad,
                False, True,
            )  # fmt: skip
        elif of_columns:
            column_grad = column_grad * (grad / rows.shape[0])  # (K, C)
        factor = grad / rows.shape[0] if ctx.mean else grad[:, None]  # () or (N, 1)
        return (
            (row_grad * factor).to(rows.dtype) if of_rows else None,
            column_grad.to(columns.dtype) if of_columns else None,
            None, None, None, None,
        )  # fmt: skip


def _fake_bands(
    rows: Tensor, columns: Tensor, _scale: float, _weights: Tensor, _counts: Tensor | None,
    _grad: Tensor | None, of_rows: bool, of_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = rows[:, 0], rows if of_rows else rows[:0], columns if of_columns else columns[:0]
    first, second, third = (upcast(one.new_empty(one.shape)) for one in made)
    return first, second, third


@as_operator(
    "(Tensor rows, Tensor columns, float scale, Tensor weights, Tensor? counts, Tensor? grad, "
    "bool of_rows, bool of_columns) -> (Tensor, Tensor, Tensor)",
    _fake_bands,
)
def _pass_bands(
    rows: Tensor, columns: Tensor, scale: float, weights: Tensor, counts: Tensor | None,
    grad: Tensor | None, of_rows: bool, of_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the mixed sums (N,) and, if asked, rows' and columns' gradients by `grad` (N,)."""
    result, row_grad, column_grad = _fake_bands(
        rows, columns, scale, weights, counts, grad, of_rows, of_columns
    )
    column_grad.zero_()
    work, bias = rows.dtype, None if counts is None else counts.log()  # (K,)
    step = max(_FEWEST_ROWS, _BANDS * count_elements(rows) // columns.shape[0])
    with without_autocast(rows):
        for start in range(0, rows.shape[0], step):
            band = slice(start, start + step)
            logits = (rows[band] @ columns.T).to(result.dtype).mul_(scale)  # (n, K)
            second = None if bias is None else logits + bias
            sums, total = _exponentiate_(logits)  # (n,), (n, 1)
            result[band] = weights[band, 0] * sums
            asked = 1 if grad is None else grad[band, None]  # (n, 1)
            # What the powers of a row are multiplied by to be the slopes of its logits.
            slopes = logits.mul_(scale * weights[band, :1] / total * asked)  # (n, K)
            if second is not None:
                sums, total = _exponentiate_(second)
                result[band] += weights[band, 1] * sums
                slopes += second.mul_(scale * weights[band, 1:] / total * asked)
            slopes = slopes.to(work)  # (n, K)
            if of_rows:
                row_grad[band] = slopes @ columns  # (n, C)
            if of_columns:
                add_product(column_grad, slopes.T, rows[band])  # (K, n) @ (n, C)
    return result, row_grad, column_grad


def _exponentiate_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits (n, K) by their powers; return their log-sum-exp (n,) and sum (n, 1)."""
    largest = logits.amax(dim=1, keepdim=True)  # (n, 1)
    total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    return (largest + total.log()).squeeze(1), total


def _reference_mix(
    rows: Tensor, columns: Tensor, scale: float, weights: Tensor, counts: Tensor | None
) -> Tensor:
    """Return what `mix_log_sums` does by operations that autograd follows, (N, K) and all."""
    logits = upcast(rows @ columns.to(rows.dtype).T) * scale  # (N, K)
    mixed = weights[:, 0] * logits.logsumexp(dim=1)  # (N,)
    if counts is None:
        return mixed
    return mixed + weights[:, 1] * (logits + counts.log()).logsumexp(dim=1)


def _split(negatives: Tensor, rows: int) -> tuple[Tensor, ...]:
    return torch.split(negatives, max(256, count_elements(negatives) // rows))
