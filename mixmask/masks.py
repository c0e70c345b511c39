"""Masks on a grid of cells: blocks as in BEiT, independent cells, and their way to pixels.

A mask is True where an image keeps its own pixels and False where its partner shows. All
draws are made on the host from a CPU generator and copied to the device asked for, so a
seed gives the same masks on every device and the device is never waited for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mixmask._blocks import LARGEST_GRID, draw_blocks, draw_cells
from mixmask._checks import (
    Ratio,
    check_generator,
    check_grid_size,
    check_integer,
    check_positive,
    ratio_bounds,
)
from mixmask._devices import move
from mixmask._seeds import draw_seed


class MaskGenerator(Protocol):
    """What `mix_batch` draws from: called with a number of masks, or None for a single one."""

    def __call__(
        self,
        n: int | None = None,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return (n, g, g) bool masks, or one (g, g) mask for `n=None`."""


def block_masks(
    n: int,
    grid_size: int,
    ratio: Ratio = 0.5,
    *,
    min_cells: int = 4,
    min_aspect: float = 0.3,
    exact: bool = True,
    roll: bool = False,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw masks made of rectangular blocks, as BEiT does, all of them at once.

    Rectangles with an area uniform between `min_cells` and the cells still missing, a
    log-uniform aspect ratio and a uniform place are laid over each other. One is accepted if
    it adds at least one cell and no more than are missing; after ten refusals in a row a mask
    stalls, and its missing cells are then taken from the border of what is there.

    Args:
        n: Number of masks.
        grid_size: Cells along a side, at least 2.
        ratio: Share of cells that are True, or a range (low, high) from which each mask draws
            its share uniformly. Each mask has exactly round(ratio * grid_size**2) True cells,
            at least 1 and at most grid_size**2 - 1.
        min_cells: Smallest area of a rectangle, in cells.
        min_aspect: Smallest ratio of height to width; the largest is its inverse.
        exact: False leaves stalled masks short, or even empty, as BEiT does.
        roll: Shift each mask cyclically by a random offset, so that every cell is kept equally
            often; without it blocks favour the middle.
        device: Where to put the masks. Default: the CPU.
        generator: A CPU generator. Default: torch's global one.

    Returns:
        (n, grid_size, grid_size) bool.

    Raises:
        ValueError: If a size or ratio is out of range, or the generator is not a CPU one.
        TypeError: If an argument has the wrong type.

    Source:
        MixMask, section 3.1; Bao et al., "BEiT", algorithm 1.

    Example:
        >>> masks = block_masks(3, grid_size=4, ratio=0.25)
        >>> masks.shape, masks.sum(dim=(1, 2)).tolist()
        (torch.Size([3, 4, 4]), [4, 4, 4])
    """
    check_integer("n", n, 0, "pass len(images)")
    low, high = _check_block_options(grid_size, ratio, min_cells, min_aspect)
    seed = draw_seed(generator)
    # Drawn on the host, then sent: cells and never pixels, and nobody waits.
    masks = draw_blocks(seed, n, grid_size, low, high, min_cells, min_aspect, exact, roll)
    return move(masks, device)


def discrete_masks(
    n: int,
    grid_size: int,
    ratio: Ratio = 0.5,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw masks of independent cells, with exactly the requested number of kept cells.

    Arguments and errors are those of `block_masks`.

    Returns:
        (n, grid_size, grid_size) bool.

    Source:
        MixMask, section 3.1 (the discrete, or random, pattern).

    Example:
        >>> discrete_masks(2, grid_size=6, ratio=0.75).sum(dim=(1, 2)).tolist()
        [27, 27]
    """
    check_integer("n", n, 0, "pass len(images)")
    check_grid_size(grid_size)
    low, high = ratio_bounds(ratio)
    return move(draw_cells(draw_seed(generator), n, grid_size, low, high), device)


class _Generator:
    """A mask generator whose fields are the options of the function that it draws by."""

    _draw: ClassVar[Callable[..., Tensor]]

    def __call__(
        self,
        n: int | None = None,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw (n, g, g) masks, or one (g, g) mask for `n=None`."""
        count = 1 if n is None else n
        masks = self._draw(count, **vars(self), device=device, generator=generator)  # (n, g, g)
        return masks[0] if n is None else masks


@dataclass(frozen=True)
class BlockMaskGenerator(_Generator):
    """Block masks with their options stored; see `block_masks` for what they mean.

    Example:
        >>> masks = BlockMaskGenerator(grid_size=8)
        >>> masks().shape, masks(32).shape
        (torch.Size([8, 8]), torch.Size([32, 8, 8]))
    """

    grid_size: int
    ratio: Ratio = 0.5
    _: KW_ONLY
    min_cells: int = 4
    min_aspect: float = 0.3
    exact: bool = True
    roll: bool = False
    _draw = staticmethod(block_masks)

    def __post_init__(self) -> None:
        _check_block_options(self.grid_size, self.ratio, self.min_cells, self.min_aspect)


@dataclass(frozen=True)
class DiscreteMaskGenerator(_Generator):
    """Discrete masks with their options stored; see `discrete_masks`.

    Example:
        >>> DiscreteMaskGenerator(grid_size=4, ratio=0.25)().sum().item()
        4
    """

    grid_size: int
    ratio: Ratio = 0.5
    _draw = staticmethod(discrete_masks)

    def __post_init__(self) -> None:
        check_grid_size(self.grid_size)
        ratio_bounds(self.ratio)


# By the names that `MixMask` and `--pattern` take; each is made of a grid size and a ratio.
PATTERNS: dict[str, Callable[..., MaskGenerator]] = {
    "block": BlockMaskGenerator,
    "discrete": DiscreteMaskGenerator,
}


def cells_to_pixels(masks: Tensor, height: int, width: int) -> Tensor:
    """Enlarge masks from cells to pixels, as nearest-neighbour interpolation does.

    Pixel row y shows cell row y * h // height, so any height and width of at least the
    grid's will do, also where the grid does not divide them.

    Args:
        masks: (..., h, w) bool.
        height: Rows of the image, at least h.
        width: Columns of the image, at least w.

    Returns:
        (..., height, width) bool.

    Raises:
        ValueError: If the grid has more cells along a side than the image has pixels.

    Example:
        >>> cells_to_pixels(torch.tensor([[True, False]]), 1, 5).int().tolist()
        [[1, 1, 1, 0, 0]]
    """
    if masks.ndim < 2:
        raise ValueError(f"masks must be (..., h, w), got {tuple(masks.shape)}")
    h, w = masks.shape[-2:]
    if h > height or w > width or 0 in (h, w):
        raise ValueError(
            f"a mask of {h} x {w} cells does not fit an image of {height} x {width} pixels; "
            "use a grid_size of at most the image's shorter side"
        )
    if (h, w) == (height, width):
        return masks
    # (..., h, w) -> (..., height, w) -> (..., height, width)
    # In integers: a float scale would round at the borders of cells.
    rows = torch.arange(height, device=masks.device) * h // height  # (height,)
    columns = torch.arange(width, device=masks.device) * w // width  # (width,)
    return masks.index_select(-2, rows).index_select(-1, columns)


def fit_masks(
    masks: MaskGenerator | Tensor,
    images: Tensor,
    generator: torch.Generator | None,
    *,
    by_channel: bool = False,
) -> Tensor:
    """Return the masks to apply to images (N, C, H, W), drawn first if they come from a generator.

    They are (H, W) or (N, H, W) bool; with `by_channel` also (1, C, H, W) or (N, C, H, W).
    """
    check_generator(generator)
    if isinstance(masks, Tensor):
        masks = move(masks, images.device)
    elif _is_generator(masks):
        masks = masks(device=images.device, generator=generator)
    else:
        raise TypeError(f"masks must be a generator or a bool tensor, got {_describe_kind(masks)}")
    _check_masks(masks, images, by_channel=by_channel)
    return cells_to_pixels(masks, *images.shape[-2:])


def _is_generator(masks: object) -> bool:
    # MixMask can be called, too, but it takes images: the signature tells.
    if isinstance(masks, nn.Module):
        return "device" in inspect.signature(masks.forward).parameters
    return callable(masks) and not isinstance(masks, type)


def _describe_kind(masks: object) -> str:
    """Name what was passed for masks, and what to pass instead."""
    if isinstance(masks, type):
        return f"the class {masks.__name__}; pass an instance, as {masks.__name__}(...)"
    fix = "use for instance BlockMaskGenerator(grid_size=8)"
    if isinstance(masks, nn.Module):
        fix = "let MixMask mix by itself, as mix(images), or pass its generator, mix.masks"
    return f"{type(masks).__name__}; {fix}"


def _check_masks(masks: Tensor, images: Tensor, *, by_channel: bool) -> None:
    if masks.dtype != torch.bool:
        raise TypeError(
            f"masks must be bool, got {masks.dtype}; use masks > 0.5, or mixup_batch for soft ones"
        )
    n, channels = images.shape[:2]
    fits = masks.ndim == 2 or (masks.ndim == 3 and masks.shape[0] == n)
    if by_channel and masks.ndim == 4:
        fits = masks.shape[0] in (1, n) and masks.shape[1] == channels
    if not fits:
        more = f"; one per channel is (1, C, h, w) or (N, C, h, w), C = {channels}"
        raise ValueError(
            f"masks must be (h, w) or (N, h, w) with N = {n}, got {tuple(masks.shape)}; "
            f"draw masks(len(images)){more if by_channel else ''}"
        )


def _check_block_options(
    grid_size: int, ratio: Ratio, min_cells: int, min_aspect: float
) -> tuple[float, float]:
    """Check the options of block masks; return the bounds of the ratio."""
    check_grid_size(grid_size)
    if grid_size > LARGEST_GRID:
        raise ValueError(
            f"block masks need a grid_size of at most {LARGEST_GRID}, got {grid_size}; "
            "the paper finds grids above 16 too fine at every image size"
        )
    check_integer("min_cells", min_cells, 1, "use for instance 4, as BEiT does")
    check_positive("min_aspect", min_aspect)
    if min_aspect > 1:
        raise ValueError(f"min_aspect must be at most 1, got {min_aspect}; use its inverse")
    return ratio_bounds(ratio)
