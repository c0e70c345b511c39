"""What every loss does with rows of embeddings: check, widen, reduce."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(
    z: Tensor, target: Tensor, *, names: tuple[str, str] = ("z", "target"), at_least: int = 1
) -> None:
    """Refuse anything but two batches of rows (N, C) on one device, z floating.

    Args:
        z: What the user passed first.
        target: What belongs to it, row by row.
        names: What to call the two.
        at_least: The smallest N for which the loss exists.
    """
    first, second = names
    if z.ndim != 2 or z.shape != target.shape:
        raise ValueError(
            f"{first} and {second} must both be (N, C), got {tuple(z.shape)} and "
            f"{tuple(target.shape)}; flatten features to one row an image"
        )
    if z.numel() == 0:
        raise ValueError(f"{first} must not be empty, got {tuple(z.shape)}; skip empty batches")
    if len(z) < at_least:
        raise ValueError(
            f"this loss is a statistic of at least {at_least} images, got {len(z)}; "
            "use drop_last=True in the loader"
        )
    if target.device != z.device:
        raise ValueError(
            f"{second} must lie where {first} does, on {z.device}, got {target.device}; "
            f"move it with .to({first}.device)"
        )
    if not z.is_floating_point():
        raise TypeError(f"{first} must be floating, got {z.dtype}; pass embeddings, not indices")


def check_scores(scores: Tensor, name: str) -> None:
    """Refuse anything but one batch of rows (N, K), floating.

    Args:
        scores: What the user passed.
        name: What to call it.
    """
    if scores.ndim != 2:
        raise ValueError(
            f"{name} must be (N, K), got {tuple(scores.shape)}; pass one row of scores an image"
        )
    if scores.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {tuple(scores.shape)}; skip empty batches")
    if not scores.is_floating_point():
        raise TypeError(f"{name} must be floating, got {scores.dtype}; pass scores, not indices")


def wide(rows: Tensor) -> Tensor:
    """Return rows in at least float32, in which sums over a batch are taken."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Return one loss an image, (N,), or its mean."""
    return loss.mean() if reduction == "mean" else loss


def by_row(lam: Tensor) -> Tensor:
    """Return () or (N,) shares in a shape that multiplies (N, C)."""
    return lam[:, None] if lam.ndim else lam
