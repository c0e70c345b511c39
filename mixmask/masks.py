"""Masks on a grid of cells: blocks as in BEiT, independent cells, and their way to pixels.

A mask is True where an image keeps its own pixels and False where its partner shows. All
draws are made on the host from a CPU generator and copied to the device asked for, so a
seed gives the same masks on every device and the device is never waited for.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import torch
from torch import Tensor

from mixmask._checks import (
    Ratio,
    check_count,
    check_generator,
    check_grid_size,
    check_positive,
    ratio_bounds,
)

# BEiT gives a mask up as full after this many rectangles in a row that do not fit.
_ATTEMPTS = 10
# So many are tried together: most masks accept one of the first, and more would be wasted,
# unless there are so few masks that a round costs the same with all of them.
_ATTEMPTS_A_ROUND = 2
_FEW = 512
# Cells are kept as bits of int64 words, a row of the grid never split over two.
_WORD_BITS = 64
_LARGEST_GRID = 62


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
        device: Where the masks shall lie. Default: the CPU.
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
    check_count(n)
    low, high = _check_block_options(grid_size, ratio, min_cells, min_aspect)
    seed = _draw_seed(generator)
    masks = _block_masks(seed, n, grid_size, low, high, min_cells, min_aspect, exact, roll)
    return _move(masks, device)


def discrete_masks(
    n: int,
    grid_size: int,
    ratio: Ratio = 0.5,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw masks of independent cells, exactly the asked number of them.

    Args:
        n: Number of masks.
        grid_size: Cells along a side, at least 2.
        ratio: Share of cells that are True, or a range; see `block_masks`.
        device: Where the masks shall lie. Default: the CPU.
        generator: A CPU generator. Default: torch's global one.

    Returns:
        (n, grid_size, grid_size) bool.

    Raises:
        ValueError: If a size or ratio is out of range, or the generator is not a CPU one.
        TypeError: If an argument has the wrong type.

    Source:
        MixMask, section 3.1 (the discrete, or random, pattern).

    Example:
        >>> discrete_masks(2, grid_size=6, ratio=0.75).sum(dim=(1, 2)).tolist()
        [27, 27]
    """
    check_count(n)
    check_grid_size(grid_size)
    low, high = ratio_bounds(ratio)
    check_generator(generator)
    wanted = _wanted_cells(n, grid_size, low, high, generator)
    scores = torch.rand(n, grid_size * grid_size, generator=generator, device="cpu")
    return _move(_keep_smallest(scores, wanted).view(n, grid_size, grid_size), device)


@dataclass(frozen=True)
class BlockMaskGenerator:
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

    def __post_init__(self) -> None:
        """Refuse bad options now rather than at the first step."""
        _check_block_options(self.grid_size, self.ratio, self.min_cells, self.min_aspect)

    def __call__(
        self,
        n: int | None = None,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw (n, g, g) masks, or one (g, g) mask for `n=None`."""
        masks = block_masks(
            1 if n is None else n,
            self.grid_size,
            self.ratio,
            min_cells=self.min_cells,
            min_aspect=self.min_aspect,
            exact=self.exact,
            roll=self.roll,
            device=device,
            generator=generator,
        )
        return masks[0] if n is None else masks


@dataclass(frozen=True)
class DiscreteMaskGenerator:
    """Discrete masks with their options stored; see `discrete_masks`.

    Example:
        >>> DiscreteMaskGenerator(grid_size=4, ratio=0.25)().sum().item()
        4
    """

    grid_size: int
    ratio: Ratio = 0.5

    def __post_init__(self) -> None:
        """Refuse bad options now rather than at the first step."""
        check_grid_size(self.grid_size)
        ratio_bounds(self.ratio)

    def __call__(
        self,
        n: int | None = None,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw (n, g, g) masks, or one (g, g) mask for `n=None`."""
        masks = discrete_masks(
            1 if n is None else n, self.grid_size, self.ratio, device=device, generator=generator
        )
        return masks[0] if n is None else masks


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
    rows = torch.arange(height, device=masks.device) * h // height
    columns = torch.arange(width, device=masks.device) * w // width
    return masks.index_select(-2, rows).index_select(-1, columns)


def _check_block_options(
    grid_size: int, ratio: Ratio, min_cells: int, min_aspect: float
) -> tuple[float, float]:
    """Refuse bad options of block masks; return the bounds of the ratio."""
    check_grid_size(grid_size)
    if grid_size > _LARGEST_GRID:
        raise ValueError(
            f"block masks need a grid_size of at most {_LARGEST_GRID}, got {grid_size}; "
            "the paper finds grids above 16 too fine at every image size"
        )
    check_positive("min_cells", min_cells)
    check_positive("min_aspect", min_aspect)
    if min_aspect > 1:
        raise ValueError(f"min_aspect must be at most 1, got {min_aspect}; use its inverse")
    return ratio_bounds(ratio)


def _draw_seed(generator: torch.Generator | None) -> Tensor:
    """Draw the seed from which a whole batch follows: one draw from the user's generator."""
    check_generator(generator)
    return torch.randint(2**62, (), dtype=torch.int64, generator=generator, device="cpu")


def _move(masks: Tensor, device: torch.device | str | None) -> Tensor:
    return masks if device is None else masks.to(device, non_blocking=True)


def _wanted_cells(
    n: int, grid_size: int, low: float, high: float, generator: torch.Generator | None
) -> Tensor:
    """Draw how many True cells each of n masks shall have: (n,) int64."""
    ratios = torch.full((n,), low, dtype=torch.float64, device="cpu")
    if low < high:
        drawn = torch.rand(n, dtype=torch.float64, generator=generator, device="cpu")
        ratios = low + (high - low) * drawn
    cells = grid_size * grid_size
    return (ratios * cells).round().long().clamp(1, cells - 1)


def _keep_smallest(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mark the `wanted` (n,) smallest of each row of `scores` (n, k): (n, k) bool."""
    ranks = scores.argsort(dim=1).argsort(dim=1)
    return ranks < wanted[:, None]


# An operator of its own, so that torch.compile takes the loop, whose length depends on the
# draws, as one node. It is a pure function of the seed: the draw of the seed stays outside,
# where the compiler knows it for a random one.
@torch.library.custom_op(
    "mixmask::block_masks",
    mutates_args=(),
    schema="(Tensor seed, int n, int grid_size, float low, float high, int min_cells, "
    "float min_aspect, bool exact, bool roll) -> Tensor",
)
def _block_masks(
    seed: Tensor,
    n: int,
    grid_size: int,
    low: float,
    high: float,
    min_cells: int,
    min_aspect: float,
    exact: bool,
    roll: bool,
) -> Tensor:
    generator = torch.Generator().manual_seed(int(seed))
    wanted = _wanted_cells(n, grid_size, low, high, generator)
    lay = _lay_blocks_once if n == 1 else _lay_blocks
    masks, stalled = lay(wanted, grid_size, min_cells, min_aspect, generator)
    if exact and len(stalled):
        masks[stalled] = _grow(masks[stalled], wanted[stalled], generator)
    return _roll(masks, generator) if roll else masks


@_block_masks.register_fake
def _(seed: Tensor, n: int, grid_size: int, *_options: object) -> Tensor:
    return seed.new_empty((n, grid_size, grid_size), dtype=torch.bool)


def _lay_blocks(
    wanted: Tensor, g: int, min_cells: int, min_aspect: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lay BEiT's rectangles until each mask has its `wanted` (n,) cells or stalls.

    Each round makes the next few attempts of every unfinished mask at once and lays the first
    acceptable rectangle. Cells are bits: a word holds as many rows of the grid as fit, and a
    rectangle is the product of a run of columns and a ladder of rows.

    Returns:
        The masks (n, g, g) and the indices of those that stalled.
    """
    rows_a_word = _WORD_BITS // g
    first_row = torch.arange(0, g, rows_a_word)
    ladder = torch.tensor([sum(1 << g * i for i in range(k)) for k in range(rows_a_word + 1)])
    log_aspect = -math.log(min_aspect)

    index, words = torch.arange(len(wanted)), wanted.new_zeros(len(wanted), len(first_row))
    finished = words.clone()
    missing, refusals = wanted[:, None], torch.zeros_like(wanted)[:, None]
    stalled = [index[:0]]
    while len(index):
        attempts = _ATTEMPTS_A_ROUND if len(index) > _FEW else _ATTEMPTS
        draws = torch.rand(4, len(index), attempts, generator=generator)
        # Also right where fewer cells are missing than min_cells: the bounds trade places.
        area = min_cells + draws[0] * (missing - min_cells)
        stretch = ((draws[1] - 0.5) * log_aspect).exp()
        # From here the leading axis is (vertical, horizontal).
        sides = (area.sqrt() * torch.stack([stretch, 1 / stretch])).round().long()
        fits = (sides < g).all(dim=0)
        sides = sides.clamp(max=g)
        start = (draws[2:] * (g + 1 - sides)).long()

        top = (start[0, :, :, None] - first_row).clamp(0, rows_a_word)
        bottom = ((start + sides)[0, :, :, None] - first_row).clamp(0, rows_a_word)
        columns = ((1 << sides[1]) - 1) << start[1]
        blocks = (ladder.take(bottom) - ladder.take(top)) * columns[:, :, None]
        added = _count_bits(blocks & ~words[:, None]).sum(dim=2)

        fits &= torch.arange(attempts) < _ATTEMPTS - refusals
        laid, first = (fits & (added >= 1) & (added <= missing)).max(dim=1, keepdim=True)
        words |= (blocks * laid[:, :, None]).gather(1, first[:, :, None].expand_as(blocks))[:, 0]
        missing = missing - added.gather(1, first) * laid
        refusals = (refusals + attempts) * ~laid
        stalls = refusals >= _ATTEMPTS
        leaving = ((missing == 0) | stalls)[:, 0]
        if leaving.any():
            finished[index[leaving]] = words[leaving]
            stalled.append(index[stalls[:, 0]])
            kept = (~leaving).nonzero()[:, 0]
            index, words, missing, refusals = (
                state.index_select(0, kept) for state in (index, words, missing, refusals)
            )

    row, column = torch.arange(g)[:, None], torch.arange(g)
    masks = finished[:, row // rows_a_word] >> (row % rows_a_word * g + column) & 1
    return masks.bool(), torch.cat(stalled)


def _lay_blocks_once(
    wanted: Tensor, g: int, min_cells: int, min_aspect: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Do the same for a single mask, from the same draws.

    An operation on tensors costs as much for one number as for hundreds, so for one mask plain
    numbers are several times as fast. The whole grid is one integer.
    """
    log_aspect = -math.log(min_aspect)
    cells, missing, stalled = 0, int(wanted), False
    while missing and not stalled:
        stalled = True
        draws = torch.rand(4, _ATTEMPTS, generator=generator).T.tolist()
        for of_area, of_aspect, of_top, of_left in draws:
            root = math.sqrt(min_cells + of_area * (missing - min_cells))
            stretch = math.exp((of_aspect - 0.5) * log_aspect)
            height, width = round(root * stretch), round(root / stretch)
            if height >= g or width >= g:
                continue
            top, left = int(of_top * (g + 1 - height)), int(of_left * (g + 1 - width))
            row = ((1 << width) - 1) << left
            # A ladder of rows: ones at the multiples of g.
            block = ((1 << g * height) - 1) // ((1 << g) - 1) * row << g * top
            added = (block & ~cells).bit_count()
            if 1 <= added <= missing:
                cells, missing, stalled = cells | block, missing - added, False
                break
    octets = torch.frombuffer(
        bytearray(cells.to_bytes(math.ceil(g * g / 8), "little")), dtype=torch.uint8
    )
    bits = octets[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    mask = bits.flatten()[: g * g].view(1, g, g).bool()
    return mask, torch.arange(int(stalled))


def _count_bits(words: Tensor) -> Tensor:
    """Count the ones in each int64, summing ever wider fields in place."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words * 0x0101010101010101 >> 56


def _grow(masks: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Grow masks outwards, cell by cell in random order, to their `wanted` (n,) cells.

    A cell's turn is its city-block distance from the mask plus a random number below one: all
    cells of the border come before any cell behind them, so each one joins what is there. An
    empty mask grows from a random cell.
    """
    n, g, _ = masks.shape
    seeds = torch.zeros(n, g * g, dtype=torch.bool)
    seeds[torch.arange(n), torch.randint(g * g, (n,), generator=generator)] = True
    empty = ~masks.any(dim=2).any(dim=1)
    masks = masks | seeds.view(n, g, g) & empty[:, None, None]
    distance = torch.where(masks, 0.0, 2.0 * g)
    for axis in (1, 2):
        distance = _spread(_spread(distance, axis).flip(axis), axis).flip(axis)
    turns = distance.flatten(1) + torch.rand(n, g * g, generator=generator)
    return _keep_smallest(turns, wanted).view(n, g, g)


def _spread(distance: Tensor, axis: int) -> Tensor:
    """Let each cell learn the distances of those before it along an axis, a step being one."""
    steps = torch.arange(distance.shape[axis], dtype=distance.dtype)
    steps = steps.view(-1, 1) if axis == 1 else steps
    return (distance - steps).cummin(dim=axis).values + steps


def _roll(masks: Tensor, generator: torch.Generator) -> Tensor:
    n, g, _ = masks.shape
    shift = torch.randint(g, (2, n, 1), generator=generator)
    rows, columns = (torch.arange(g) - shift) % g
    return masks[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
