"""InfoNCE, with negatives from a queue or from the batch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixmask._checks import check_choice, check_positive

# Logits held at a time: on a CPU what fits its cache, on a device what keeps it busy.
_CHUNK_ELEMENTS = {"cpu": 2**18, "device": 2**23}


def info_nce(
    z: Tensor,
    target: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.2,
    *,
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
        negatives: (K, C) queue, in any order; None takes the batch's other targets.
        temperature: τ.
        reduction: "mean" or "none".

    Returns:
        () for "mean", (N,) for "none"; at least float32.

    Raises:
        ValueError: If shapes, devices or options do not fit.

    Source:
        van den Oord et al., "CPC", eq. 4; He et al., "MoCo", eq. 1.

    Example:
        >>> z = torch.eye(4)
        >>> info_nce(z, z, negatives=-z, temperature=1.0, reduction="none").shape
        torch.Size([4])
    """
    criterion = InfoNCE(negatives, temperature, reduction=reduction)
    return criterion(z, target)


@dataclass(frozen=True, eq=False)
class InfoNCE:
    """`info_nce` with its options stored, as a criterion (z, target).

    `lambda_weighted_loss` finds its `weighted` method, which takes the negatives' sum once for
    both terms.

    Example:
        >>> queue = F.normalize(torch.randn(512, 16), dim=1)
        >>> q, k = F.normalize(torch.randn(2, 8, 16), dim=2)
        >>> InfoNCE(queue)(q, k).shape
        torch.Size([])
    """

    negatives: Tensor | None = None
    temperature: float = 0.2
    _: KW_ONLY
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Refuse bad options now rather than at the first step."""
        check_positive("temperature", self.temperature)
        check_choice("reduction", self.reduction, ("mean", "none"))
        if self.negatives is not None and not isinstance(self.negatives, Tensor):
            raise TypeError(
                f"negatives must be a tensor (K, C), got {type(self.negatives).__name__}; "
                "stack the keys with torch.stack"
            )
        if self.negatives is not None and (self.negatives.ndim != 2 or 0 in self.negatives.shape):
            raise ValueError(
                f"negatives must be (K, C), got {tuple(self.negatives.shape)}; a queue that is "
                "stored as (C, K) is passed as queue.T"
            )

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `info_nce`."""
        self._check(z, target)
        if self.negatives is None:
            return self._reduce(self._in_batch(z, target))
        positive = self._similarity(z, target)
        return self._reduce(F.softplus(self._negative_sum(z) - positive))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return lam * l(z, target) + (1 - lam) * l(z, other), reduced.

        Args:
            z: (N, C) queries.
            target: (N, C) keys of the images themselves.
            other: (N, C) keys of their partners; None leaves this term out.
            lam: () or (N,).

        Returns:
            () for reduction "mean", (N,) for "none".
        """
        self._check(z, target)
        if self.negatives is None:
            own = self._in_batch(z, target)
            rest = None if other is None else self._in_batch(z, other)
        else:
            negative = self._negative_sum(z)
            own = F.softplus(negative - self._similarity(z, target))
            rest = None
            if other is not None:
                rest = F.softplus(negative - self._similarity(z, other))
        return self._reduce(lam * own if rest is None else lam * own + (1 - lam) * rest)

    def _check(self, z: Tensor, target: Tensor) -> None:
        if z.ndim != 2 or z.shape != target.shape:
            raise ValueError(
                f"z and target must both be (N, C), got {tuple(z.shape)} and "
                f"{tuple(target.shape)}; flatten features to one row an image"
            )
        if z.numel() == 0:
            raise ValueError(f"z must not be empty, got {tuple(z.shape)}; skip empty batches")
        if target.device != z.device:
            raise ValueError(
                f"target must lie where z does, on {z.device}, got {target.device}; "
                "move it with .to(z.device)"
            )
        if not z.is_floating_point():
            raise TypeError(f"z must be floating, got {z.dtype}; pass embeddings, not indices")
        negatives = self.negatives
        if negatives is None:
            return
        if negatives.shape[1] != z.shape[1]:
            raise ValueError(
                f"negatives must be (K, {z.shape[1]}), got {tuple(negatives.shape)}; a queue that "
                "is stored as (C, K) is passed as queue.T"
            )
        if negatives.device != z.device:
            raise ValueError(
                f"negatives must lie where z does, on {z.device}, got {negatives.device}; "
                "move the queue once with .to(device)"
            )

    def _similarity(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the scaled similarity of matching rows, (N,), in at least float32."""
        wide = torch.promote_types(z.dtype, torch.float32)
        # No einsum: autocast would run it in half precision.
        return (z.to(wide) * target.to(wide)).sum(dim=1) / self.temperature

    def _in_batch(self, z: Tensor, target: Tensor) -> Tensor:
        wide = torch.promote_types(z.dtype, torch.float32)
        logits = einsum(z, target.to(z.dtype), "n c, k c -> n k").to(wide) / self.temperature
        labels = torch.arange(len(z), device=z.device)
        return F.cross_entropy(logits, labels, reduction="none")

    def _negative_sum(self, z: Tensor) -> Tensor:
        """Return log sum_k exp(z . n_k / τ), (N,)."""
        sums: Tensor = _LogSumExp.apply(z, self.negatives, 1 / self.temperature)
        return sums

    def _reduce(self, loss: Tensor) -> Tensor:
        return loss.mean() if self.reduction == "mean" else loss


class _LogSumExp(torch.autograd.Function):
    """log sum_k exp(scale * z . n_k) for each row of z, without ever holding N x K.

    One pass over the negatives in chunks, with a running maximum. The same pass gathers
    sum_k p_k n_k, the gradient up to a factor, which spares the backward a second one.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, negatives: Tensor, scale: float) -> Tensor:
        """Return (N,) in at least float32."""
        work = _matmul_dtype(z, negatives)
        wide = torch.promote_types(z.dtype, torch.float32)
        rows = z.to(work)
        largest = rows.new_full((len(z), 1), -torch.inf, dtype=wide)
        total = torch.zeros_like(largest)
        mean = torch.zeros(z.shape, dtype=wide, device=z.device)
        needs_mean = ctx.needs_input_grad[0]
        for chunk in _chunks(negatives, len(z)):
            chunk = chunk.to(work)
            weights = (rows @ chunk.T).to(wide).mul_(scale)
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
        for chunk in _chunks(negatives, len(rows)):
            weights = (rows @ chunk.to(rows.dtype).T).to(result.dtype).mul_(ctx.scale)
            weights.sub_(result[:, None]).exp_().mul_(grad[:, None] * ctx.scale)
            parts.append(weights.T.to(rows.dtype) @ rows)
        return of_z, torch.cat(parts).to(negatives.dtype), None


def _matmul_dtype(z: Tensor, negatives: Tensor) -> torch.dtype:
    """Return the dtype in which a plain matrix product of the two would run."""
    promoted = torch.promote_types(z.dtype, negatives.dtype)
    if torch.is_autocast_enabled(z.device.type) and promoted != torch.float64:
        return torch.get_autocast_dtype(z.device.type)
    return promoted


def _chunks(negatives: Tensor, rows: int) -> tuple[Tensor, ...]:
    elements = _CHUNK_ELEMENTS["cpu" if negatives.device.type == "cpu" else "device"]
    return torch.split(negatives, max(256, elements // rows))
