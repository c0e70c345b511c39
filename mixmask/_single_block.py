"""One block mask by itself: the draws and rectangles of `_blocks`, in plain numbers.

An operation on tensors costs as much for one number as for hundreds, so a single mask is faster
without them. The grid is one integer, whose bit r * g + c is the cell of row r and column c.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from math import exp, log, sqrt

import torch
from torch import Tensor

# Bits written as digits become bytes that a bool tensor reads.
_DIGITS = bytes.maketrans(b"01", b"\0\1")


def lay_block(
    wanted: int,
    g: int,
    min_cells: int,
    min_aspect: float,
    attempts: int,
    generator: torch.Generator,
    *,
    ahead: int,
) -> int:
    """Lay BEiT's rectangles until the mask has its `wanted` cells or stalls; see `_blocks`.

    The numbers of `ahead` rounds are drawn at once, so that only with 1 the generator has given
    those alone that were used.
    """
    log_aspect, ladders = -log(min_aspect), _ladders(g)
    draws, shared = _make_numbers(ahead * 4 * attempts)  # (rounds, 4, a), flat
    cells, missing, start = 0, wanted, len(draws)
    while missing:
        if start == len(draws):
            shared.uniform_(generator=generator)
            start = 0
        for i in range(start, start + attempts):
            root = sqrt(min_cells + draws[i] * (missing - min_cells))
            stretch = exp((draws[attempts + i] - 0.5) * log_aspect)
            height, width = round(root * stretch), round(root / stretch)
            if height >= g or width >= g:
                continue
            top = int(draws[2 * attempts + i] * (g + 1 - height))
            left = int(draws[3 * attempts + i] * (g + 1 - width))
            block = ladders[height] * ((1 << width) - 1) << g * top + left
            added = (block & ~cells).bit_count()
            if 1 <= added <= missing:
                cells, missing = cells | block, missing - added
                break
        else:
            break
        start += 4 * attempts
    return cells


def grow_block(cells: int, wanted: int, g: int, generator: torch.Generator) -> int:
    """Grow a mask outwards to its `wanted` cells, ring by ring, each in random order."""
    first = int(torch.randint(g * g, (1,), generator=generator, device="cpu"))
    draws, shared = _make_numbers(g * g)
    shared.uniform_(generator=generator)
    cells = cells or 1 << first
    inner, whole = _ladders(g)[g] * ((1 << g - 1) - 1), (1 << g * g) - 1
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


def to_mask(cells: int, g: int) -> Tensor:
    """Turn bits into a mask (1, g, g)."""
    digits = f"{cells:0{g * g}b}"[::-1].encode().translate(_DIGITS)
    return torch.frombuffer(bytearray(digits), dtype=torch.bool).view(1, g, g)


def _make_numbers(count: int) -> tuple[array[float], Tensor]:
    """Return zeros in float32 as an array, whose numbers are read fast, and a tensor on it."""
    numbers = array("f", bytes(4 * count))
    return numbers, torch.frombuffer(numbers, dtype=torch.float32)


@lru_cache(maxsize=8)
def _ladders(g: int) -> list[int]:
    """Return the left column of 0 ... g rows."""
    return [sum(1 << g * row for row in range(rows)) for rows in range(g + 1)]
