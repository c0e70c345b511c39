"""Time of block masks, drawn in batches and singly, against BEiT's procedure in plain Python."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import numpy.typing as npt
from common import arguments, compare, interleave, report

import mixmask

# By grid and number of masks.
_BOUNDS = {(8, 4096): 0.10, (2, 4096): 0.10, (32, 4096): 0.10, (8, 1): 1.0}
_ATTEMPTS = 10


def beit_mask(
    g: int, wanted: int, *, min_cells: int = 4, min_aspect: float = 0.3
) -> npt.NDArray[np.int64]:
    """Draw one (g, g) mask by BEiT's procedure, cell by cell (Bao et al., algorithm 1)."""
    mask = np.zeros((g, g), dtype=np.int64)
    missing = wanted
    while missing > 0:
        added = _lay_rectangle(mask, missing, min_cells, min_aspect)
        if added == 0:
            break
        missing -= added
    return mask


def _lay_rectangle(
    mask: npt.NDArray[np.int64], missing: int, min_cells: int, min_aspect: float
) -> int:
    """Lay the first of ten rectangles that fits; return how many cells it added."""
    g = len(mask)
    for _ in range(_ATTEMPTS):
        area = random.uniform(min_cells, missing)
        aspect = math.exp(random.uniform(math.log(min_aspect), -math.log(min_aspect)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= g or width >= g:
            continue
        top, left = random.randint(0, g - height), random.randint(0, g - width)
        covered = mask[top : top + height, left : left + width].sum()
        if not 0 < height * width - covered <= missing:
            continue
        added = 0
        for row in range(top, top + height):
            for column in range(left, left + width):
                if mask[row, column] == 0:
                    mask[row, column] = 1
                    added += 1
        return added
    return 0


def beit_masks(n: int, g: int) -> list[npt.NDArray[np.int64]]:
    """Draw n masks of which half is kept, one after the other."""
    return [beit_mask(g, g * g // 2) for _ in range(n)]


def main() -> None:
    """Measure every grid, and one mask alone."""
    parser = arguments(__doc__, repeats=9)
    options = parser.parse_args()
    n = 32 if options.small else 4096
    cases = []
    for grid, count in ((8, n), (2, n), (4, n), (16, n), (32, n), (8, 1)):
        masks = mixmask.BlockMaskGenerator(grid)
        samples, calls = interleave(
            {
                "ours": partial(masks, count, device=options.device),
                "theirs": partial(beit_masks, count, grid),
            },
            repeats=options.repeats,
            device=options.device,
            warmup=1,
        )
        cases.append(
            compare(
                f"{count} block mask{'s' * (count > 1)} at grid {grid}",
                "BEiT's procedure in Python",
                samples["ours"],
                samples["theirs"],
                sizes={"masks": count, "grid_size": grid, "ratio": 0.5},
                calls=calls,
                bound=_BOUNDS.get((grid, count if count == 1 else 4096)),
            )
        )
    report("masks", cases, options)


if __name__ == "__main__":
    main()
