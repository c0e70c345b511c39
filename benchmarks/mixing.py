"""Time of `mix_batch` with a shared mask, against the formula of the paper written out."""

from __future__ import annotations

from functools import partial

import torch
from common import arguments, compare, interleave, report
from torch import Tensor

import mixmask

_BOUND = 0.55


def formula(images: Tensor, mask: Tensor) -> Tensor:
    """Return mask * x + (1 - mask) * flip(x), the mask (H, W) being zeros and ones."""
    return mask * images + (1 - mask) * images.flip(0)


def main() -> None:
    """Measure with the mask drawn in the call and with the mask given.

    The formula has its mask ready, at the size of the images, in both.
    """
    options = arguments(__doc__, repeats=31).parse_args()
    n, size, grid = (4, 32, 8) if options.small else (64, 224, 8)
    images = torch.rand(n, 3, size, size, device=options.device)
    generator = mixmask.BlockMaskGenerator(grid)
    given = generator(device=options.device)
    ready = mixmask.cells_to_pixels(given, size, size).float()
    cases = []
    for name, masks in (("a mask drawn in the call", generator), ("a mask given", given)):
        samples, calls = interleave(
            {
                "ours": partial(mixmask.mix_batch, images, masks),
                "theirs": partial(formula, images, ready),
            },
            repeats=options.repeats,
            device=options.device,
        )
        cases.append(
            compare(
                f"mix_batch, {name}",
                "mask * x + (1 - mask) * flip(x)",
                samples["ours"],
                samples["theirs"],
                sizes={"images": list(images.shape), "dtype": "float32", "grid_size": grid},
                calls=calls,
                bound=_BOUND,
            )
        )
    report("mixing", cases, options)


if __name__ == "__main__":
    main()
