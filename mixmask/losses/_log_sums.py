"""Log-sum-exps over negatives and over a batch, in chunks, so that no N x K matrix is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mixmask._operators import as_operator
from mixmask.losses._rows import upcast

# Logits held at a time: on a CPU what fits its cache, on a device what keeps it busy.
_CHUNK_ELEMENTS = {"cpu": 2**18, "device": 2**23}
# Bands are larger, for each of them adds to the gradient of all columns.
_BANDS = 4
# Rows of a band at least, below which a matrix product reads the columns again and again.
_FEWEST_ROWS = 32


def sum_negatives(z: Tensor, negatives: Tensor, scale: float) -> Tensor:
    """Return log sum_k exp(scale * z . n_k), (N,), without ever holding N x K.

    Second derivatives hold it, once: see `_LogSumExp.backward`.
    """
    if _is_transformed():
        return (scale * upcast(z) @ upcast(negatives).T).logsumexp(dim=1)
    sums: Tensor = _LogSumExp.apply(z, negatives, scale)
    return sums


def mix_log_sums(
    rows: Tensor,
    columns: Tensor,
    scale: float,
    shares: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    mean: bool = False,
) -> Tensor:
    """Return the log-sum-exp of each row's logits, (N,), or the mean of all, ().

    With `counts` (K,), how often each column stands in a second sum, it is the mixture of both:
    shares[:, 0] of the first and shares[:, 1] of the second. Bands of rows are taken one after
    the other, each with all of its logits, so that their gradient comes with the same pass.

    Args:
        rows: (N, C).
        columns: (K, C).
        scale: Factor of the products.
        shares: (N, 1), or (N, 2) with `counts`; None for 1.
        counts: (K,), integers in a floating dtype.
        mean: Return the mean over rows; the columns' gradient then comes with the same pass, too.
    """
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    if shares is None:
        shares = torch.ones(len(rows), 1, dtype=accumulator, device=rows.device)
    shares = shares.to(accumulator)
    if _is_transformed() or shares.requires_grad:
        mixed = _mix_plainly(rows, columns, scale, shares, counts)
        return mixed.mean() if mean else mixed
    result: Tensor = _MixedLogSums.apply(rows, columns, scale, shares, counts, mean)
    return result


def sum_pairs(
    rows: Tensor,
    scale: float,
    counts: Tensor | None = None,
    columns: Tensor | None = None,
    first: int = 0,
    blocks: int = 1,
) -> Tensor:
    """Return the log-sum-exp of each row with all columns but itself, (M, 1) or (M, 2).

    Rows and columns have the length 1. Without `columns` the rows are their own, and each pair
    is multiplied once for both of its sides.

    Args:
        rows: (M, C), in `blocks` of equal lengths.
        scale: Factor of the products.
        counts: (K,), how often each column stands in the second sum; None for no second sum.
        columns: (K, C), in as many blocks.
        first: Where in its block of columns the first row of a block stands.
        blocks: How many views there are among rows and columns.
    """
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    own = _find_own(rows, columns, first, blocks)
    weights = None
    if counts is not None:
        weights = torch.stack([torch.ones_like(counts), counts], dim=1).to(accumulator)  # (K, 2)
    # Without a maximum to subtract, powers must fit the dtype, and so must their sums.
    bound = 64 if accumulator == torch.float32 else 600
    if _is_transformed() or abs(scale) > bound:
        return _sum_pairs_plainly(rows, columns, scale, weights, own)
    sums: Tensor = _PairSums.apply(rows, columns, scale, weights, own)
    return sums


def _find_own(rows: Tensor, columns: Tensor | None, first: int, blocks: int) -> Tensor:
    """Return for each row the column that is the row itself, (M,)."""
    n = len(rows) // blocks
    stride = n if columns is None else len(columns) // blocks
    place = torch.arange(n, device=rows.device) + first  # (n,)
    block = torch.arange(blocks, device=rows.device)[:, None] * stride  # (blocks, 1)
    return (block + place).flatten()


def _is_transformed() -> bool:
    """Tell whether torch.func or forward mode is at work, which follow plain operations alone."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _LogSumExp(torch.autograd.Function):
    """One pass over the negatives (K, C) in chunks, with a running maximum.

    The same pass gathers sum_k p_k n_k, the gradient up to a factor, which spares the backward
    a second one.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, negatives: Tensor, scale: float) -> Tensor:
        """Return (N,) in at least float32."""
        work = _choose_dtype(z, negatives)
        result, mean = _sum_chunks(z.to(work), negatives, scale, ctx.needs_input_grad[0])
        # MoCo writes keys into its queue before the backward, which autograd would refuse of a
        # saved tensor; the first derivative in z does not read the queue again.
        ctx.save_for_backward(mean, z, result, *([negatives] if ctx.needs_input_grad[1] else []))
        ctx.scale, ctx.work = scale, work
        if not torch.compiler.is_compiling():
            ctx.negatives, ctx.version = negatives, _read_version(negatives)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of z and, by recomputing chunks, of the negatives if asked.

        Raises:
            RuntimeError: If second derivatives are asked for after the negatives were written to.
        """
        mean, z, result, *rest = ctx.saved_tensors
        # With create_graph=True, the gradient is itself a function of z.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if _read_version(ctx.negatives) != ctx.version:
                raise RuntimeError(
                    "second derivatives need the negatives of the forward pass, which were written "
                    "to since; enqueue after the backward pass"
                )
            return *_differentiate(z, ctx.negatives, ctx.scale, grad), None
        of_z = (mean * grad[:, None]).to(z.dtype) if ctx.needs_input_grad[0] else None
        if not rest:
            return of_z, None, None
        of_negatives = _grade_chunks(z.to(ctx.work), rest[0], ctx.scale, result, grad)
        return of_z, of_negatives.to(rest[0].dtype), None


@as_operator(
    "(Tensor rows, Tensor negatives, float scale, bool needs_mean) -> (Tensor, Tensor)",
    lambda rows, *_: (upcast(rows.new_empty(len(rows))), upcast(torch.empty_like(rows))),
)
def _sum_chunks(
    rows: Tensor, negatives: Tensor, scale: float, needs_mean: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp (N,) and the weighted mean of the negatives (N, C)."""
    work, accumulator = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
    # The running maximum keeps every power at most 1, whatever the scale.
    largest = rows.new_full((len(rows), 1), -torch.inf, dtype=accumulator)  # (N, 1)
    total = torch.zeros_like(largest)
    mean = torch.zeros(rows.shape, dtype=accumulator, device=rows.device)  # (N, C)
    for chunk in _split(negatives, len(rows)):
        chunk = chunk.to(work)  # (k, C)
        weights = (rows @ chunk.T).to(accumulator).mul_(scale)  # (N, k)
        rise = torch.maximum(largest, weights.amax(dim=1, keepdim=True))
        # What was summed up to here was relative to the maximum up to here.
        shrink = (largest - rise).exp_()
        weights.sub_(rise).exp_()
        total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        if needs_mean:
            mean.mul_(shrink).add_(weights.to(work) @ chunk)
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
    for chunk in _split(negatives, len(rows)):
        weights = (rows @ chunk.to(rows.dtype).T).to(sums.dtype).mul_(scale)  # (N, k)
        weights.sub_(sums[:, None]).exp_().mul_(grad[:, None] * scale)
        parts.append(weights.T.to(rows.dtype) @ rows)  # (k, C)
    return torch.cat(parts)


def _differentiate(
    z: Tensor, negatives: Tensor, scale: float, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same gradients by operations that autograd follows, (N, K) and all."""
    rows, queue = upcast(z), upcast(negatives)
    share = scale * grad[:, None] * (scale * rows @ queue.T).softmax(dim=1)  # (N, K)
    return (share @ queue).to(z.dtype), (share.T @ rows).to(negatives.dtype)


class _MixedLogSums(torch.autograd.Function):
    """Both sums of a band of rows, and at once the gradients that need nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: float,
        shares: Tensor,
        counts: Tensor | None,
        mean: bool,
    ) -> Tensor:
        """Return (N,) in at least float32, or ()."""
        work = _choose_dtype(rows, columns)
        of_rows, of_columns = ctx.needs_input_grad[:2]
        # A row's share of the mean is known before the backward, any other weight is not.
        weight = shares.new_full((len(rows),), 1 / len(rows)) if mean else None
        result, row_grad, column_grad = _pass_bands(
            rows.to(work), columns.to(work), scale, shares, counts, weight,
            of_rows, of_columns and mean,
        )  # fmt: skip
        ctx.save_for_backward(rows, columns, shares, counts, row_grad, column_grad)
        ctx.scale, ctx.mean, ctx.work = scale, mean, work
        return result.mean() if mean else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and columns."""
        rows, columns, shares, counts, row_grad, column_grad = ctx.saved_tensors
        of_rows, of_columns = ctx.needs_input_grad[:2]
        nothing = (None,) * 4
        # With create_graph=True, the gradient is itself a function of the rows.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            mixed = _mix_plainly(rows, columns, ctx.scale, shares, counts)
            mixed = mixed.mean() if ctx.mean else mixed
            return *_follow(mixed, (rows, columns), grad, (of_rows, of_columns)), *nothing
        if of_columns and not ctx.mean:
            _, _, column_grad = _pass_bands(
                rows.to(ctx.work), columns.to(ctx.work), ctx.scale, shares, counts, grad,
                False, True,
            )  # fmt: skip
        elif of_columns:
            column_grad = column_grad * grad
        factor = grad if ctx.mean else grad[:, None]
        return (
            (row_grad * factor).to(rows.dtype) if of_rows else None,
            column_grad.to(columns.dtype) if of_columns else None,
            *nothing,
        )


def _fake_bands(
    rows: Tensor, columns: Tensor, _scale: float, _shares: Tensor, _counts: Tensor | None,
    _weight: Tensor | None, of_rows: bool, of_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = rows[:, 0], rows if of_rows else rows[:0], columns if of_columns else columns[:0]
    first, second, third = (upcast(one.new_empty(one.shape)) for one in made)
    return first, second, third


@as_operator(
    "(Tensor rows, Tensor columns, float scale, Tensor shares, Tensor? counts, Tensor? weight, "
    "bool of_rows, bool of_columns) -> (Tensor, Tensor, Tensor)",
    _fake_bands,
)
def _pass_bands(
    rows: Tensor, columns: Tensor, scale: float, shares: Tensor, counts: Tensor | None,
    weight: Tensor | None, of_rows: bool, of_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the mixed sums (N,) and, if asked, the gradients of rows and columns.

    They are weighed by `weight` (N,), or not at all.
    """
    result, row_grad, column_grad = _fake_bands(
        rows, columns, scale, shares, counts, weight, of_rows, of_columns
    )
    column_grad.zero_()
    work, bias = rows.dtype, None if counts is None else counts.log()  # (K,)
    step = max(_FEWEST_ROWS, _BANDS * _count_elements(rows) // len(columns))
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), step):
            band = slice(start, start + step)
            logits = (rows[band] @ columns.T).to(result.dtype).mul_(scale)  # (n, K)
            second = None if bias is None else logits + bias
            sums, total = _raise(logits)  # (n,), (n, 1)
            result[band] = shares[band, 0] * sums
            share = None if weight is None else weight[band, None]  # (n, 1)
            slopes = logits.mul_(_scale_slopes(shares[band, :1], total, scale, share))
            if second is not None:
                sums, total = _raise(second)
                result[band] += shares[band, 1] * sums
                slopes += second.mul_(_scale_slopes(shares[band, 1:], total, scale, share))
            slopes = slopes.to(work)  # (n, K)
            if of_rows:
                row_grad[band] = slopes @ columns
            if of_columns:
                _add_product(column_grad, slopes.T, rows[band])
    return result, row_grad, column_grad


def _raise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits (n, K) by their powers; return their log-sum-exp (n,) and sum (n, 1)."""
    largest = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    return (largest + total.log()).squeeze(1), total


def _scale_slopes(share: Tensor, total: Tensor, scale: float, weight: Tensor | None) -> Tensor:
    """Return what the powers of a row are multiplied by to be the slopes of its logits, (n, 1)."""
    slope = scale * share / total
    return slope if weight is None else slope * weight


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _mix_plainly(
    rows: Tensor, columns: Tensor, scale: float, shares: Tensor, counts: Tensor | None
) -> Tensor:
    """Return what `mix_log_sums` does by operations that autograd follows, (N, K) and all."""
    logits = upcast(rows @ columns.to(rows.dtype).T) * scale  # (N, K)
    mixed = shares[:, 0] * logits.logsumexp(dim=1)
    if counts is None:
        return mixed
    return mixed + shares[:, 1] * (logits + counts.log()).logsumexp(dim=1)


def _follow(
    value: Tensor, inputs: tuple[Tensor, ...], grad: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs that are wanted, in a way that autograd can follow."""
    asked = [one for one, needed in zip(inputs, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(value, asked, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in wanted)


class _PairSums(torch.autograd.Function):
    """Tiles of pairs in two passes: the sums, and by computing the tiles again the gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None,
        own: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return (M, V) in at least float32."""
        ctx.work = _choose_dtype(rows, rows)
        others = None if columns is None else columns.to(ctx.work)
        sums = _sum_tiles(rows.to(ctx.work), others, scale, weights, own)
        ctx.save_for_backward(rows, columns, weights, own, sums)
        ctx.scale = scale
        return sums.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and columns."""
        rows, columns, weights, own, sums = ctx.saved_tensors
        nothing = (None,) * 3
        # With create_graph=True, the gradient is itself a function of the rows.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            value = _sum_pairs_plainly(rows, columns, ctx.scale, weights, own)
            inputs = (rows,) if columns is None else (rows, columns)
            found = _follow(value, inputs, grad, ctx.needs_input_grad[: len(inputs)])
            return *found, *((None,) if columns is None else ()), *nothing
        others = None if columns is None else columns.to(ctx.work)
        of_rows, of_columns = _grade_tiles(
            rows.to(ctx.work), others, ctx.scale, weights, own, grad / sums
        )
        if columns is None:
            return of_rows.to(rows.dtype), None, *nothing
        return of_rows.to(rows.dtype), of_columns.to(columns.dtype), *nothing


def _fake_sums(
    rows: Tensor, _columns: Tensor | None, _scale: float, weights: Tensor | None, _own: Tensor
) -> Tensor:
    sums = 1 if weights is None else weights.shape[1]
    return upcast(rows.new_empty(len(rows), sums))


@as_operator(
    "(Tensor rows, Tensor? columns, float scale, Tensor? weights, Tensor own) -> Tensor", _fake_sums
)
def _sum_tiles(
    rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None, own: Tensor
) -> Tensor:
    """Return the weighted sums of powers, (M, V)."""
    sums = _fake_sums(rows, columns, scale, weights, own).zero_()
    with torch.autocast(rows.device.type, enabled=False):
        for here, there, powers in _raise_tiles(rows, columns, scale, own):
            sums[here] += (
                powers.sum(1, keepdim=True) if weights is None else powers @ weights[there]
            )
            if columns is None and here != there:  # The same pairs, seen from their other side.
                turned = powers.T
                sums[there] += (
                    turned.sum(1, keepdim=True) if weights is None else turned @ weights[here]
                )
    return sums


def _fake_slopes(rows: Tensor, columns: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    others = rows[:0] if columns is None else columns
    return upcast(torch.empty_like(rows)), upcast(torch.empty_like(others))


@as_operator(
    "(Tensor rows, Tensor? columns, float scale, Tensor? weights, Tensor own, Tensor grad) -> "
    "(Tensor, Tensor)",
    _fake_slopes,
)
def _grade_tiles(
    rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None, own: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows and columns, given those of the sums of powers (M, V)."""
    of_rows, of_columns = (one.zero_() for one in _fake_slopes(rows, columns))
    others, of_others = (rows, of_rows) if columns is None else (columns, of_columns)
    grad = grad * scale
    if weights is None:
        weights = torch.ones_like(grad) if columns is None else grad.new_ones(len(columns), 1)
    # A pair counts as the row's and, without columns, also as the column's: a product of rank 2V.
    left, right = grad, weights
    if columns is None:
        left, right = torch.cat([grad, weights], dim=1), torch.cat([weights, grad], dim=1)
    with torch.autocast(rows.device.type, enabled=False):
        for here, there, powers in _raise_tiles(rows, columns, scale, own):
            slopes = powers.mul_(left[here] @ right[there].T).to(rows.dtype)  # (m, k)
            _add_product(of_rows[here], slopes, others[there])
            if columns is not None or here != there:
                _add_product(of_others[there], slopes.T, rows[here])
    return of_rows, of_columns


def _raise_tiles(rows: Tensor, columns: Tensor | None, scale: float, own: Tensor) -> Any:
    """Yield tiles exp(scale * rows . columns), with zeros for a row and itself, and their places.

    Without columns, only those on and above the diagonal.
    """
    others = rows if columns is None else columns
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    step = int(_count_elements(rows) ** 0.5)
    places = torch.arange(len(others), device=rows.device)
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        for other in range(start if columns is None else 0, len(others), step):
            there = slice(other, other + step)
            powers = (rows[here] @ others[there].T).to(accumulator).mul_(scale).exp_()  # (m, k)
            if columns is not None or here == there:
                powers.masked_fill_(own[here, None] == places[there], 0.0)
            yield here, there, powers


def _sum_pairs_plainly(
    rows: Tensor, columns: Tensor | None, scale: float, weights: Tensor | None, own: Tensor
) -> Tensor:
    """Return what `sum_pairs` does by operations that autograd follows, (M, K) and all."""
    others = rows if columns is None else columns
    logits = upcast(rows @ others.T) * scale  # (M, K)
    logits = logits.scatter(1, own[:, None], -torch.inf)
    if weights is None:
        return logits.logsumexp(dim=1, keepdim=True)
    bias = weights.log()  # (K, V)
    return torch.stack([(logits + one).logsumexp(dim=1) for one in bias.unbind(1)], dim=1)


def _read_version(tensor: Tensor) -> int | None:
    # Inference tensors count no versions, and may not be written to outside of inference mode.
    return None if tensor.is_inference() else tensor._version


def _choose_dtype(z: Tensor, negatives: Tensor) -> torch.dtype:
    """Return the dtype in which a plain matrix product of the two would run."""
    promoted = torch.promote_types(z.dtype, negatives.dtype)
    if torch.is_autocast_enabled(z.device.type) and promoted != torch.float64:
        return torch.get_autocast_dtype(z.device.type)
    return promoted


def _count_elements(rows: Tensor) -> int:
    return _CHUNK_ELEMENTS["cpu" if rows.device.type == "cpu" else "device"]


def _split(negatives: Tensor, rows: int) -> tuple[Tensor, ...]:
    return torch.split(negatives, max(256, _count_elements(negatives) // rows))
