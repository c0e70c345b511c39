"""The log-sum-exp over a queue of negatives, in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixmask.losses._rows import upcast

# Logits held at a time: on a CPU what fits its cache, on a device what keeps it busy.
_CHUNK_ELEMENTS = {"cpu": 2**18, "device": 2**23}


def sum_negatives(z: Tensor, negatives: Tensor, scale: float) -> Tensor:
    """Return log sum_k exp(scale * z . n_k), (N,), without ever holding N x K.

    Second derivatives hold it, once: see `_LogSumExp.backward`.
    """
    sums: Tensor = _LogSumExp.apply(z, negatives, scale)
    return sums


class _LogSumExp(torch.autograd.Function):
    """One pass over the negatives (K, C) in chunks, with a running maximum.

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
        largest = rows.new_full((len(z), 1), -torch.inf, dtype=accumulator)  # (N, 1)
        total = torch.zeros_like(largest)
        mean = torch.zeros(z.shape, dtype=accumulator, device=z.device)  # (N, C)
        needs_mean = ctx.needs_input_grad[0]
        for chunk in _split(negatives, len(z)):
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
        result = (largest + total.log()).squeeze(1)  # (N, 1) -> (N,)
        mean.div_(total).mul_(scale)
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
        (negatives,), rows, parts = rest, z.to(ctx.work), []
        for chunk in _split(negatives, len(rows)):
            weights = (rows @ chunk.to(rows.dtype).T).to(result.dtype).mul_(ctx.scale)  # (N, k)
            weights.sub_(result[:, None]).exp_().mul_(grad[:, None] * ctx.scale)
            parts.append(weights.T.to(rows.dtype) @ rows)  # (k, C)
        return of_z, torch.cat(parts).to(negatives.dtype), None


def _differentiate(
    z: Tensor, negatives: Tensor, scale: float, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same gradients by operations that autograd follows, (N, K) and all."""
    rows, queue = upcast(z), upcast(negatives)
    share = scale * grad[:, None] * (scale * rows @ queue.T).softmax(dim=1)  # (N, K)
    return (share @ queue).to(z.dtype), (share.T @ rows).to(negatives.dtype)


def _read_version(tensor: Tensor) -> int | None:
    # Inference tensors count no versions, and may not be written to outside of inference mode.
    return None if tensor.is_inference() else tensor._version


def _choose_dtype(z: Tensor, negatives: Tensor) -> torch.dtype:
    """Return the dtype in which a plain matrix product of the two would run."""
    promoted = torch.promote_types(z.dtype, negatives.dtype)
    if torch.is_autocast_enabled(z.device.type) and promoted != torch.float64:
        return torch.get_autocast_dtype(z.device.type)
    return promoted


def _split(negatives: Tensor, rows: int) -> tuple[Tensor, ...]:
    elements = _CHUNK_ELEMENTS["cpu" if negatives.device.type == "cpu" else "device"]
    return torch.split(negatives, max(256, elements // rows))
