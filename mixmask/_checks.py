"""Checks of what users pass in: expected, got, fix; always before anything changes."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Ratio = float | tuple[float, float]


def few(names: Iterable[object], most: int = 3) -> str:
    """Join the first names of a message, and count the others."""
    listed = [*map(str, names)]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def one_line(error: object) -> str:
    """Write what a library says in several lines as one."""
    return " ".join(str(error).split())


def check_tensor(name: str, value: object, shape: str = "(N, ...)") -> None:
    """Require a tensor; say how to take one out of what an encoder may return instead."""
    if isinstance(value, Tensor):
        return
    fix = f"pass a tensor {shape}"
    if isinstance(value, Mapping):
        keys = ", ".join(repr(key) for key in list(value)[:5])
        fix = f"pass the one tensor that is meant, out of {keys}"
    elif isinstance(value, Sequence) and any(isinstance(part, Tensor) for part in value):
        fix = f"pass the one tensor that is meant, for instance {name}[0]"
    raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}; {fix}")


def check_images(images: Tensor, *, partners: bool) -> None:
    """Require a batch (N, C, H, W) of floating or uint8 images; of two or more with `partners`."""
    # Multi-crop loaders give lists of views, and loaders without a collate function of images.
    if isinstance(images, (list, tuple)):
        single = images and isinstance(images[0], Tensor) and images[0].ndim == 3
        fix = "stack single images with torch.stack"
        if not single:
            fix = "mix each view or crop on its own, as in images[0]"
        raise TypeError(
            f"images must be a tensor (N, C, H, W), got {type(images).__name__} of {len(images)}; "
            f"{fix}"
        )
    check_tensor("images", images, "(N, C, H, W)")
    if images.ndim != 4:
        fixes = {
            3: "mix whole batches, of images that the loader has stacked",
            5: "mix each view or crop on its own, as in images[:, 0]",
        }
        fix = fixes.get(images.ndim, "pass the images, not their embeddings")
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}; {fix}")
    if images.numel() == 0:
        raise ValueError(f"images must not be empty, got {tuple(images.shape)}; skip empty batches")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(
            f"images must be floating or uint8, got {images.dtype}; convert them with .float()"
        )
    if partners and images.shape[0] == 1:
        raise ValueError(
            "a batch must hold at least two images to mix, got one; "
            "use larger batches, or drop_last=True in the loader"
        )


def check_integer(name: str, value: int, least: int, fix: str) -> None:
    """Require an integer that is not smaller than the least one."""
    # bool is a subclass of int, and a size under torch.export is an integer to be. Abstract
    # classes come last: they are slow.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {value!r}; {fix}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; {fix}")


def check_grid_size(grid_size: int) -> None:
    """Require at least two cells along a side: a single cell cannot be kept in part."""
    fix = "the paper uses 2 at 32 px, 4 at 64 px and 8 at 224 px"
    check_integer("grid_size", grid_size, 2, fix)


def ratio_bounds(ratio: Ratio) -> tuple[float, float]:
    """Return the bounds (low, high) of a ratio: a number inside (0, 1) or a range in [0, 1]."""
    fix = "use a number such as 0.5, or a range such as (0.25, 0.75)"
    if isinstance(ratio, (float, numbers.Real)) and not isinstance(ratio, bool):
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must lie strictly between 0 and 1, got {ratio}; {fix}")
        return float(ratio), float(ratio)
    if not (
        isinstance(ratio, (tuple, list))
        and len(ratio) == 2
        and all(isinstance(bound, numbers.Real) for bound in ratio)
    ):
        raise TypeError(f"ratio must be a number or a range (low, high), got {ratio!r}; {fix}")
    low, high = ratio
    # A range may touch 0 and 1: counts of cells are then clipped to at least one of each kind.
    if not 0 <= low <= high <= 1 or low == high in (0, 1):
        raise ValueError(f"ratio needs 0 <= low <= high <= 1, got {ratio}; {fix}")
    return float(low), float(high)


def check_generator(generator: torch.Generator | None) -> None:
    """Require a CPU generator or None: draws are made on the host, so that devices agree."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; "
            "use torch.Generator().manual_seed(seed)"
        )
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator must be a CPU generator, got one on {generator.device}; masks and partners "
            "are drawn on the host, so that a seed means the same on every device: "
            "use torch.Generator().manual_seed(seed)"
        )


def check_positive(name: str, value: float) -> None:
    """Require a positive finite number."""
    _check_real(name, value, "use for instance 1.0")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}; use for instance 1.0")


def check_non_negative(name: str, value: float) -> None:
    """Require a finite number of at least 0."""
    _check_real(name, value, "use 0 to leave the term out")
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"{name} must be at least 0 and finite, got {value}; use 0 to leave the term out"
        )


def _check_real(name: str, value: float, fix: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r}; {fix}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Require one of the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
