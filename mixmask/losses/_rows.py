"""What every loss does with rows of embeddings: check, upcast, reduce."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixmask._checks import check_choice, check_tensor


def read(
    held: Tensor | Callable[[], Tensor] | None, check: Callable[[Tensor], None]
) -> Tensor | None:
    """Return a tensor that was given, or what a function returns now, checked."""
    if held is None or isinstance(held, Tensor):
        return held
    value = held()
    check(value)
    return value


def check_rows(
    z: Tensor, target: Tensor, *, names: tuple[str, str] = ("z", "target"), at_least: int = 1
) -> None:
    """Require two batches of rows (N, C) on one device, z floating, N of at least `at_least`."""
    first, second = names
    check_tensor(first, z)
    check_tensor(second, target)
    if z.ndim != 2 or z.shape != target.shape:
        fix = "flatten features to one row per image"
        if z.ndim == target.ndim == 2 and len(z) == len(target):
            fix = "pass both from the same layer, embeddings and not logits"
        raise ValueError(
            f"{first} and {second} must both be (N, C), got {tuple(z.shape)} and "
            f"{tuple(target.shape)}; {fix}"
        )
    _check_filled(first, z, "embeddings")
    if z.shape[0] < at_least:
        raise ValueError(
            f"this loss needs at least {at_least} images, got {z.shape[0]}; "
            "use drop_last=True in the loader"
        )
    check_device(second, target, first, z)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}; "
            f"move it with .to({other_name}.device)"
        )


def check_scores(scores: Tensor, name: str) -> None:
    """Require one batch of rows (N, K), floating."""
    check_tensor(name, scores)
    if scores.ndim != 2:
        raise ValueError(
            f"{name} must be (N, K), got {tuple(scores.shape)}; pass one row of scores per image"
        )
    _check_filled(name, scores, "scores")


def _check_filled(name: str, rows: Tensor, kind: str) -> None:
    if rows.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {tuple(rows.shape)}; skip empty batches")
    if not rows.is_floating_point():
        raise TypeError(f"{name} must be floating, got {rows.dtype}; pass {kind}, not indices")


def check_reduction(reduction: str) -> None:
    """Require "mean" or "none"."""
    check_choice("reduction", reduction, ("mean", "none"))


def upcast(rows: Tensor) -> Tensor:
    """Return rows in at least float32, for sums over features and over the batch."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Return one loss per image, (N,), or its mean."""
    return loss.mean() if reduction == "mean" else loss


def mix_rows(rows: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
    """Return lam * rows + (1 - lam) * other, (N, C); without `other`, lam * rows alone."""
    lam = lam[:, None] if lam.ndim else lam  # (N, 1) per sample, () for a shared mask
    return lam * rows if other is None else lam * rows + (1 - lam) * other


def mix_losses(own: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
    """Return lam * own + (1 - lam) * other, (N,); without `other`, lam * own alone."""
    return lam * own if other is None else lam * own + (1 - lam) * other
