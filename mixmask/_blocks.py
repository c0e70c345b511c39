"""How block masks are drawn: BEiT's rectangles, for a whole batch of masks at once.

Cells are bits here: a word holds as many rows of the grid as fit into it, and a rectangle is the
product of a run of columns and a ladder of rows.

An operation on tensors costs as much for one number as for hundreds, so a single mask is drawn in
plain numbers, from the same draws: its grid is one integer, whose bit r * g + c is the cell of row
r and column c.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache, partial

import torch
from torch import Tensor

from mixmask._devices import as_operator, is_transformed, make_generator

# BEiT gives a mask up as full after this many rectangles in a row that do not fit.
_ATTEMPTS = 10
# So many are tried together: most masks accept one of the first, and more would be wasted,
# unless there are so few masks that a round costs the same with all of them.
_ATTEMPTS_PER_ROUND = 2
_FEW = 512
# A single mask at grid 8 takes about five rounds.
_ROUNDS_AHEAD = 4
# Words that are worked on at once: temporary results stay in the processor's cache.
_CACHED = 2**14
# Bits written as digits become bytes that a bool tensor reads.
_DIGITS = bytes.maketrans(b"01", b"\0\1")
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


def _mark_first(order: Tensor, wanted: Tensor, k: int) -> Tensor:
    """Mark the first `wanted` (n,) of the places that each row of `order` lists: (n, k) bool."""
    first = _arange(order.shape[1]) < wanted[:, None]  # (n, places)
    return torch.zeros(len(order), k, dtype=torch.bool, device="cpu").scatter_(1, order, first)


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
    # Transforms follow operations on tensors, and not what is written to memory beside them.
    if n == 1 and not is_transformed():
        return _draw_one(seed, grid_size, low, high, min_cells, min_aspect, exact, roll)
    generator = make_generator(seed)
    wanted = draw_cell_counts(n, grid_size, low, high, generator)
    # (n, g, g), and the indices of those that stalled.
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
        generator, wanted = make_generator(seed), low
        if low < high:
            drawn = torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
            wanted = low + (high - low) * drawn.item()
        # The product of the sides first: 0.02 * 55 * 55 lies beyond a half, 0.02 * 3025 does not.
        count = min(max(round(wanted * (g * g)), 1), g * g - 1)
        cells = _lay_one(count, g, min_cells, min_aspect, generator, ahead=ahead)
        if not exact or cells.bit_count() == count:
            break
    else:
        cells = _grow_one(cells, count, g, generator)
    masks = _to_mask(cells, g)  # (1, g, g)
    return _roll(masks, generator) if roll else masks


@as_operator("(Tensor seed, SymInt n, int grid_size, float low, float high) -> Tensor", _make_empty)
def draw_cells(seed: Tensor, n: int, grid_size: int, low: float, high: float) -> Tensor:
    """Draw (n, g, g) masks of independent cells from a seed; see `masks.discrete_masks`."""
    generator = make_generator(seed)
    wanted = draw_cell_counts(n, grid_size, low, high, generator)
    # The cells with the smallest of independent numbers are a uniform choice of that many.
    cells = grid_size * grid_size
    order = _draw(n, cells, generator=generator).argsort(dim=1)  # (n, g * g)
    return _mark_first(order, wanted, cells).view(n, grid_size, grid_size)


def lay_blocks(
    wanted: Tensor, g: int, min_cells: int, min_aspect: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lay BEiT's rectangles until each mask has its `wanted` (n,) cells or stalls.

    Each round makes the next few attempts of every unfinished mask at once and lays the first
    acceptable rectangle. Returned are masks (n, g, g) and the indices of those that stalled.
    """
    ladders = _make_ladders(g)  # (g + 1, w)
    log_aspect = -math.log(min_aspect)

    index = _arange(len(wanted))  # (n,)
    words = wanted.new_zeros(len(wanted), ladders.shape[1])  # (n, w)
    finished = words.clone()
    missing, refusals = wanted.clone(), torch.zeros_like(wanted)
    stalled = [index[:0]]
    while len(index):
        attempts = _ATTEMPTS_PER_ROUND if len(index) > _FEW else _ATTEMPTS
        draws = _draw(4, len(index), attempts, generator=generator)  # (4, n, a)
        # Also right where fewer cells are missing than min_cells: the bounds trade places.
        root = (missing[:, None] - min_cells).mul(draws[0]).add_(min_cells).sqrt_()  # (n, a)
        # The root of the aspect ratio: BEiT's sides are root(area * aspect), root(area / aspect).
        stretch = draws[1].sub_(0.5).mul_(log_aspect).exp_()  # (n, a)
        # (2, n, a), the leading axis being (vertical, horizontal).
        sides = torch.stack([root * stretch, root * (1 / stretch)]).round_()
        # As in BEiT, no rectangle spans the grid; one without a side has no cells.
        vertical, horizontal = (sides > 0) & (sides < g)  # (n, a) each
        fits = vertical & horizontal & (_arange(attempts) < _ATTEMPTS - refusals[:, None])  # (n, a)

        refusals = refusals + attempts
        able = fits.any(dim=1).nonzero()[:, 0]  # (m,)
        for some in able.split(max(1, _CACHED // (attempts * ladders.shape[1]))):
            blocks, added = _try_rectangles(
                sides[:, some], draws[2:, some], fits[some], words[some], missing[some], ladders
            )
            words[some] |= blocks
            missing[some] -= added
            refusals[some] *= added == 0
        stalls = refusals >= _ATTEMPTS
        leaving = (missing == 0) | stalls
        if leaving.any():
            finished[index[leaving]] = words[leaving]
            stalled.append(index[stalls])
            kept = (~leaving).nonzero()[:, 0]  # (m,)
            index, words, missing, refusals = (
                state.index_select(0, kept) for state in (index, words, missing, refusals)
            )

    return _to_masks(finished, g), torch.cat(stalled)


def _try_rectangles(
    sides: Tensor, places: Tensor, fits: Tensor, words: Tensor, missing: Tensor, ladders: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cells of each mask's first acceptable rectangle (n, w), and how many are new (n,).

    Both are 0 without one. Of rectangles that fit (n, a), `sides` are height and width, `places`
    from 0 at the first possible row and column to 1 at the last.
    """
    n, a = fits.shape
    g = len(ladders) - 1
    sides = sides.clamp(max=g).long()  # (2, n, a)
    start = (places * (g + 1 - sides)).long()  # (2, n, a)
    edges = torch.stack([start[0], start[0] + sides[0]])  # (2, n, a): first row, row behind
    # (n, a, w) each.
    above, through = ladders.index_select(0, edges.flatten()).view(2, n, a, ladders.shape[1])
    columns = ((1 << sides[1]) - 1) << start[1]  # (n, a)
    blocks = (through - above).mul_(columns[:, :, None])  # (n, a, w)
    added = _count_bits(blocks & ~words[:, None]).sum(dim=2)  # (n, a)
    # The maximum of booleans is found at the first that is True: (n, 1).
    laid, first = (fits & (added >= 1) & (added <= missing[:, None])).max(dim=1, keepdim=True)
    block = blocks.gather(1, first[:, :, None].expand(n, 1, blocks.shape[2]))[:, 0] * laid  # (n, w)
    return block, (added.gather(1, first) * laid)[:, 0]


def _to_masks(words: Tensor, g: int) -> Tensor:
    """Turn bits (n, w) into masks (n, g, g), by way of bytes, on which work is cheap."""
    rows = min(g, _WORD_BITS // g)
    octets = (words[:, :, None] >> _arange(0, rows * g, 8)).to(torch.uint8)  # (n, w, b)
    bits = octets[..., None] & (1 << _arange(8)).to(torch.uint8)  # (n, w, b, 8)
    cells = bits.bool().flatten(2)[:, :, : rows * g]  # (n, w, rows * g)
    return cells.reshape(len(words), rows * words.shape[1], g)[:, :g].contiguous()


def _make_ladders(g: int) -> Tensor:
    """Return the left column of the first 0 ... g rows, as words: (g + 1, w) int64."""
    rows_per_word = min(g, _WORD_BITS // g)
    steps = torch.tensor(
        [sum(1 << g * i for i in range(k)) for k in range(rows_per_word + 1)], device="cpu"
    )
    rows = _arange(g + 1)[:, None] - _arange(0, g, rows_per_word)  # (g + 1, w)
    return steps.take(rows.clamp(0, rows_per_word))


def _draw(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw numbers in [0, 1), the same ones whatever torch's default dtype is."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _count_bits(words: Tensor) -> Tensor:
    """Count the ones in each int64, in place, by summing ever wider fields."""
    words -= words >> 1 & 0x5555555555555555
    words = (words >> 2).bitwise_and_(0x3333333333333333).add_(words & 0x3333333333333333)
    words += words >> 4
    return (words & 0x0F0F0F0F0F0F0F0F).mul_(0x0101010101010101).__irshift__(56)


def _grow(masks: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Grow masks outwards, cell by cell in random order, to their `wanted` (n,) cells."""
    n, g, _ = masks.shape
    seeds = torch.zeros(n, g * g, dtype=torch.bool, device="cpu")  # (n, g * g)
    seeds[_arange(n), torch.randint(g * g, (n,), generator=generator, device="cpu")] = True
    # An empty mask grows from a random cell.
    empty = ~masks.any(dim=2).any(dim=1)  # (n,)
    masks = masks | seeds.view(n, g, g) & empty[:, None, None]
    distance = torch.zeros(n, g, g, dtype=torch.float32, device="cpu")  # (n, g, g)
    near = masks
    while bool((near.flatten(1).sum(dim=1) < wanted).any()):
        distance += ~near
        near = _spread(near)
    distance += ~near
    # City-block distances with a random number below one: all cells of the border come before any
    # cell behind them, so that each one joins what is there.
    turns = distance.flatten(1) + _draw(n, g * g, generator=generator)  # (n, g * g)
    missing = wanted - masks.flatten(1).sum(dim=1)  # (n,)
    turns.masked_fill_(masks.flatten(1), torch.inf)
    nearest = turns.topk(int(missing.max()), largest=False).indices  # (n, most missing)
    return masks | _mark_first(nearest, missing, g * g).view(n, g, g)


def _spread(masks: Tensor) -> Tensor:
    """Add the four neighbours of each cell."""
    wider = masks.clone()
    wider[:, 1:] |= masks[:, :-1]
    wider[:, :-1] |= masks[:, 1:]
    wider[:, :, 1:] |= masks[:, :, :-1]
    wider[:, :, :-1] |= masks[:, :, 1:]
    return wider


def _roll(masks: Tensor, generator: torch.Generator) -> Tensor:
    n, g, _ = masks.shape
    shift = torch.randint(g, (2, n, 1), generator=generator, device="cpu")  # (2, n, 1)
    rows, columns = (_arange(g) - shift) % g  # (n, g) each
    return masks[_arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _lay_one(
    wanted: int,
    g: int,
    min_cells: int,
    min_aspect: float,
    generator: torch.Generator,
    *,
    ahead: int,
) -> int:
    """Do what `lay_blocks` does for one mask, with the numbers of `ahead` rounds drawn at once."""
    log_aspect, columns = -math.log(min_aspect), _make_columns(g)
    draws, shared = _make_numbers(ahead * 4 * _ATTEMPTS)  # (rounds, 4, a), flat
    cells, missing, start = 0, wanted, len(draws)
    while missing:
        if start == len(draws):
            shared.uniform_(generator=generator)
            start = 0
        for i in range(start, start + _ATTEMPTS):
            root = math.sqrt(min_cells + draws[i] * (missing - min_cells))
            stretch = math.exp((draws[_ATTEMPTS + i] - 0.5) * log_aspect)
            height, width = round(root * stretch), round(root / stretch)
            if height >= g or width >= g:
                continue
            top = int(draws[2 * _ATTEMPTS + i] * (g + 1 - height))
            left = int(draws[3 * _ATTEMPTS + i] * (g + 1 - width))
            block = columns[height] * ((1 << width) - 1) << g * top + left
            added = (block & ~cells).bit_count()
            if 1 <= added <= missing:
                cells, missing = cells | block, missing - added
                break
        else:
            break
        start += 4 * _ATTEMPTS
    return cells


def _grow_one(cells: int, wanted: int, g: int, generator: torch.Generator) -> int:
    """Grow a mask outwards to its `wanted` cells, ring by ring, each in random order."""
    first = int(torch.randint(g * g, (1,), generator=generator, device="cpu"))
    draws, shared = _make_numbers(g * g)
    shared.uniform_(generator=generator)
    cells = cells or 1 << first
    inner, whole = _make_columns(g)[g] * ((1 << g - 1) - 1), (1 << g * g) - 1
    distance = 0
    while missing := wanted - cells.bit_count():
        distance += 1
        sideways = (cells & inner) << 1 | cells >> 1 & inner
        ring = (sideways | cells << g | cells >> g) & whole & ~cells
        if ring.bit_count() > missing:
            places = [place for place, digit in enumerate(f"{ring:b}"[::-1]) if digit == "1"]
            # Rounded to float32, as in a batch, where turns are sums of distance and draw.
            turns = array("f", [distance + draws[place] for place in places])
            chosen = sorted(zip(turns, places, strict=True))[:missing]
            ring = sum(1 << place for _, place in chosen)
        cells |= ring
    return cells


def _to_mask(cells: int, g: int) -> Tensor:
    """Turn bits into a mask (1, g, g)."""
    digits = f"{cells:0{g * g}b}"[::-1].encode().translate(_DIGITS)
    return torch.frombuffer(bytearray(digits), dtype=torch.bool).view(1, g, g)


def _make_numbers(count: int) -> tuple[array[float], Tensor]:
    """Return zeros in float32 as an array, whose numbers are read fast, and a tensor on it."""
    numbers = array("f", bytes(4 * count))
    return numbers, torch.frombuffer(numbers, dtype=torch.float32)


@lru_cache(maxsize=8)
def _make_columns(g: int) -> list[int]:
    """Return the left column of 0 ... g rows."""
    return [sum(1 << g * row for row in range(rows)) for rows in range(g + 1)]
