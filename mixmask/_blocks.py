"""How block masks are drawn: BEiT's rectangles, for a whole batch of masks at once.

Cells are bits here: a word holds as many rows of the grid as fit into it, and a rectangle is the
product of a run of columns and a ladder of rows.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mixmask._operators import as_operator, seeded
from mixmask._single_block import grow_block, lay_block, to_mask

# BEiT gives a mask up as full after this many rectangles in a row that do not fit.
_ATTEMPTS = 10
# So many are tried together: most masks accept one of the first, and more would be wasted,
# unless there are so few masks that a round costs the same with all of them.
_ATTEMPTS_PER_ROUND = 2
_FEW = 512
# A single mask at grid 8 takes about five rounds.
_ROUNDS_AHEAD = 4
# Cells are kept as bits of int64 words, a row of the grid never split over two.
_WORD_BITS = 64
LARGEST_GRID = 62

# Masks are drawn on the host, whatever torch's default device is.
_arange = partial(torch.arange, device="cpu")


def draw_cell_counts(
    n: int, grid_size: int, low: float, high: float, generator: torch.Generator | None
) -> Tensor:
    """Draw how many True cells each of n masks shall have: (n,) int64."""
    ratios = torch.full((n,), low, dtype=torch.float64, device="cpu")
    if low < high:
        drawn = torch.rand(n, dtype=torch.float64, generator=generator, device="cpu")
        ratios = low + (high - low) * drawn
    cells = grid_size * grid_size
    return (ratios * cells).round().long().clamp(1, cells - 1)


def keep_smallest(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mark the `wanted` (n,) smallest of each row of `scores` (n, k): (n, k) bool."""
    ranks = scores.argsort(dim=1).argsort(dim=1)
    return ranks < wanted[:, None]


def _make_empty(seed: Tensor, n: int, grid_size: int, *_options: object) -> Tensor:
    return seed.new_empty((n, grid_size, grid_size), dtype=torch.bool)


@as_operator(
    "(Tensor seed, SymInt n, int grid_size, float low, float high, int min_cells, "
    "float min_aspect, bool exact, bool roll) -> Tensor",
    _make_empty,
)
def draw_blocks(
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
    """Draw (n, g, g) masks from a seed; the options are those of `masks.block_masks`."""
    if n == 1:
        return _draw_one(seed, grid_size, low, high, min_cells, min_aspect, exact, roll)
    generator = seeded(seed)
    wanted = draw_cell_counts(n, grid_size, low, high, generator)
    masks, stalled = lay_blocks(wanted, grid_size, min_cells, min_aspect, generator)
    if exact and len(stalled):
        masks[stalled] = _grow(masks[stalled], wanted[stalled], generator)
    return _roll(masks, generator) if roll else masks


def _draw_one(
    seed: Tensor,
    g: int,
    low: float,
    high: float,
    min_cells: int,
    min_aspect: float,
    exact: bool,
    roll: bool,
) -> Tensor:
    """Draw a mask (1, g, g) as `draw_blocks` does, from the same numbers."""
    # What follows the rectangles needs the generator where they left it: then it starts again.
    for ahead in (1,) if roll else (_ROUNDS_AHEAD, 1):
        generator, wanted = seeded(seed), low
        if low < high:
            drawn = torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
            wanted = low + (high - low) * drawn.item()
        count = min(max(round(wanted * g * g), 1), g * g - 1)
        cells = lay_block(count, g, min_cells, min_aspect, _ATTEMPTS, generator, ahead=ahead)
        if not exact or cells.bit_count() == count:
            break
    else:
        cells = grow_block(cells, count, g, generator)
    masks = to_mask(cells, g)
    return _roll(masks, generator) if roll else masks


@as_operator("(Tensor seed, SymInt n, int grid_size, float low, float high) -> Tensor", _make_empty)
def draw_cells(seed: Tensor, n: int, grid_size: int, low: float, high: float) -> Tensor:
    """Draw (n, g, g) masks of independent cells from a seed; see `masks.discrete_masks`."""
    generator = seeded(seed)
    wanted = draw_cell_counts(n, grid_size, low, high, generator)
    # The cells with the smallest of independent numbers are a uniform choice of that many.
    scores = _draw(n, grid_size * grid_size, generator=generator)  # (n, g * g)
    return keep_smallest(scores, wanted).view(n, grid_size, grid_size)


def lay_blocks(
    wanted: Tensor, g: int, min_cells: int, min_aspect: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lay BEiT's rectangles until each mask has its `wanted` (n,) cells or stalls.

    Each round makes the next few attempts of every unfinished mask at once and lays the first
    acceptable rectangle. Returned are masks (n, g, g) and the indices of those that stalled.
    """
    rows_per_word = _WORD_BITS // g
    first_row = _arange(0, g, rows_per_word)
    steps = [sum(1 << g * i for i in range(k)) for k in range(rows_per_word + 1)]
    ladder = torch.tensor(steps, device="cpu")
    log_aspect = -math.log(min_aspect)

    index, words = _arange(len(wanted)), wanted.new_zeros(len(wanted), len(first_row))
    finished = words.clone()
    missing, refusals = wanted[:, None], torch.zeros_like(wanted)[:, None]
    stalled = [index[:0]]
    while len(index):
        attempts = _ATTEMPTS_PER_ROUND if len(index) > _FEW else _ATTEMPTS
        draws = _draw(4, len(index), attempts, generator=generator)  # (4, n, a)
        # Also right where fewer cells are missing than min_cells: the bounds trade places.
        area = min_cells + draws[0] * (missing - min_cells)
        stretch = ((draws[1] - 0.5) * log_aspect).exp()
        # (2, n, a), the leading axis being (vertical, horizontal).
        sides = (area.sqrt() * torch.stack([stretch, 1 / stretch])).round().long()
        # As in BEiT, no rectangle spans the grid.
        fits = (sides < g).all(dim=0)
        sides = sides.clamp(max=g)
        start = (draws[2:] * (g + 1 - sides)).long()

        # What each rectangle covers of each word: (n, a, words).
        top = (start[0, :, :, None] - first_row).clamp(0, rows_per_word)
        bottom = ((start + sides)[0, :, :, None] - first_row).clamp(0, rows_per_word)
        columns = ((1 << sides[1]) - 1) << start[1]
        blocks = (ladder.take(bottom) - ladder.take(top)) * columns[:, :, None]
        added = _count_bits(blocks & ~words[:, None]).sum(dim=2)  # (n, a)

        fits &= _arange(attempts) < _ATTEMPTS - refusals
        # The maximum of booleans is found at the first that is True: (n, 1).
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

    # Bits to cells: (n, words) -> (n, g, g).
    row, column = _arange(g)[:, None], _arange(g)
    masks = finished[:, row // rows_per_word] >> (row % rows_per_word * g + column) & 1
    return masks.bool(), torch.cat(stalled)


def _draw(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw numbers in [0, 1), the same ones whatever torch's default dtype is."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


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
    seeds = torch.zeros(n, g * g, dtype=torch.bool, device="cpu")
    seeds[_arange(n), torch.randint(g * g, (n,), generator=generator, device="cpu")] = True
    empty = ~masks.any(dim=2).any(dim=1)
    masks = masks | seeds.view(n, g, g) & empty[:, None, None]
    distance = (~masks).float() * 2 * g  # (n, g, g)
    for axis in (1, 2):
        distance = _spread(_spread(distance, axis).flip(axis), axis).flip(axis)
    turns = distance.flatten(1) + _draw(n, g * g, generator=generator)  # (n, g * g)
    return keep_smallest(turns, wanted).view(n, g, g)


def _spread(distance: Tensor, axis: int) -> Tensor:
    """Let each cell learn the distances of those before it along an axis, a step being one."""
    steps = _arange(distance.shape[axis], dtype=distance.dtype)
    steps = steps.view(-1, 1) if axis == 1 else steps
    return (distance - steps).cummin(dim=axis).values + steps


def _roll(masks: Tensor, generator: torch.Generator) -> Tensor:
    n, g, _ = masks.shape
    shift = torch.randint(g, (2, n, 1), generator=generator, device="cpu")
    rows, columns = (_arange(g) - shift) % g
    return masks[_arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
