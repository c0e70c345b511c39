"""The log-sum-exp over a queue of negatives, in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time: on a CPU what fits its cache, on a device what keeps it busy.
_CHUNK_ELEMENTS = {"cpu": 2**18, "device": 2**23}


def sum_negatives(z: Tensor, negatives: Tensor, scale: float) -> Tensor:
    """Return log sum_k exp(scale * z . n_k), (N,), without ever holding N x K.

    Args:
        z: (N, C) rows.
        negatives: (K, C).
        scale: 1 / τ.
    """
    sums: Tensor = _LogSumExp.apply(z, negatives, scale)
    return sums


class _LogSumExp(torch.autograd.Function):
    """One pass over the negatives in chunks, with a running maximum.

    The same pass gathers sum_k p_k n_k, the gradient up to a factor, which spares the backward
    a second one.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, negatives: Tensor, scale: float) -> Tensor:
        """Return (N,) in at least float32."""
        work = _choose_dtype(z, negatives)
        accumulator = torch.promote_types(z.dtype, torch.float32)
        rows = z.to(work)
        # The running maximum keeps every power at most 1, whatever the scale.
        largest = rows.new_full((len(z), 1), -torch.inf, dtype=accumulator)
        total = torch.zeros_like(largest)
        mean = torch.zeros(z.shape, dtype=accumulator, device=z.device)
        needs_mean = ctx.needs_input_grad[0]
        for chunk in _split(negatives, len(z)):
            chunk = chunk.to(work)
            weights = (rows @ chunk.T).to(accumulator).mul_(scale)  # (N, k)
            rise = torch.maximum(largest, weights.amax(dim=1, keepdim=True))
            shrink = (largest - rise).exp_()
            weights.sub_(rise).exp_()
            total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
            if needs_mean:
                mean.mul_(shrink).add_(weights.to(work) @ chunk)
            largest = rise
        result = (largest + total.log()).squeeze(1)
        mean.div_(total).mul_(scale)
        ctx.scale, ctx.z_dtype = scale, z.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(mean, rows, negatives, result)
        else:
            ctx.save_for_backward(mean)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of z and, by recomputing chunks, of the negatives if asked."""
        mean, *rest = ctx.saved_tensors
        of_z = (mean * grad[:, None]).to(ctx.z_dtype) if ctx.needs_input_grad[0] else None
        if not rest:
            return of_z, None, None
        rows, negatives, result = rest
        parts = []
        for chunk in _split(negatives, len(rows)):
            weights = (rows @ chunk.to(rows.dtype).T).to(result.dtype).mul_(ctx.scale)
            weights.sub_(result[:, None]).exp_().mul_(grad[:, None] * ctx.scale)
            parts.append(weights.T.to(rows.dtype) @ rows)  # (k, C)
        return of_z, torch.cat(parts).to(negatives.dtype), None


def _choose_dtype(z: Tensor, negatives: Tensor) -> torch.dtype:
    """Return the dtype in which a plain matrix product of the two would run."""
    promoted = torch.promote_types(z.dtype, negatives.dtype)
    if torch.is_autocast_enabled(z.device.type) and promoted != torch.float64:
        return torch.get_autocast_dtype(z.device.type)
    return promoted


def _split(negatives: Tensor, rows: int) -> tuple[Tensor, ...]:
    elements = _CHUNK_ELEMENTS["cpu" if negatives.device.type == "cpu" else "device"]
    return torch.split(negatives, max(256, elements // rows))
