"""Time of `mix_batch` and `cutmix_batch`, against formulas and what users would take instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import kornia
import torch
from common import Case, arguments, compare, interleave, report
from timm.data.mixup import Mixup
from torch import Tensor
from torchvision.transforms import v2

import mixmask

_BOUND = 0.55


def formula(images: Tensor, mask: Tensor) -> Tensor:
    """Return mask * x + (1 - mask) * flip(x), the mask (H, W) being zeros and ones."""
    return mask * images + (1 - mask) * images.flip(0)


def others(n: int) -> dict[str, Callable[[Tensor], object]]:
    """Return the CutMix of other libraries, which all make soft labels beside the images.

    torchvision and timm cut the same box from each image, kornia a box of each image's own.
    """
    labels = torch.arange(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the share that kornia computes, which is not used.
        per_image = kornia.augmentation.RandomCutMixV2(p=1.0, data_keys=["input", "class"])
    shared = v2.CutMix(num_classes=n)
    in_place = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=n)  # type: ignore[no-untyped-call]
    return {
        "torchvision's v2.CutMix": lambda images: shared(images, labels.to(images.device)),
        # It writes into its input, which the others leave as it is.
        "timm's Mixup, CutMix alone, and a copy": lambda images: in_place(
            images.clone(), labels.to(images.device)
        ),
        "kornia's RandomCutMixV2": lambda images: per_image(images, labels.to(images.device)),
    }


def compare_formula(images: Tensor, grid: int, repeats: int) -> list[Case]:
    """Compare with the paper's formula, whose mask is ready, at the size of the images."""
    generator = mixmask.BlockMaskGenerator(grid)
    given = generator(device=images.device)
    ready = mixmask.cells_to_pixels(given, *images.shape[-2:]).float()
    cases = []
    for name, masks in (("a mask drawn in the call", generator), ("a mask given", given)):
        samples, calls = interleave(
            {
                "ours": partial(mixmask.mix_batch, images, masks),
                "theirs": partial(formula, images, ready),
            },
            repeats=repeats,
            device=str(images.device),
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
    return cases


def compare_others(images: Tensor, grid: int, repeats: int) -> list[Case]:
    """Compare our CutMix, and MixMask, with the CutMix of other libraries, all in one run."""
    libraries = others(len(images))
    per_sample = "kornia's RandomCutMixV2"
    ours: dict[str, Callable[[], object]] = {
        "cutmix_batch": partial(mixmask.cutmix_batch, images),
        "cutmix_batch, per sample": partial(mixmask.cutmix_batch, images, per_sample=True),
        "mix_batch": partial(mixmask.mix_batch, images, mixmask.BlockMaskGenerator(grid)),
    }
    theirs = {name: partial(mix, images) for name, mix in libraries.items()}
    samples, calls = interleave({**ours, **theirs}, repeats=repeats, device=str(images.device))
    return [
        compare(
            name,
            library,
            samples[name],
            samples[library],
            sizes={"images": list(images.shape), "dtype": "float32"},
            calls=calls,
        )
        for library in libraries
        for name in (
            "cutmix_batch, per sample" if library == per_sample else "cutmix_batch",
            "mix_batch",
        )
    ]


def main() -> None:
    """Measure both comparisons."""
    options = arguments(__doc__, repeats=31).parse_args()
    n, size, grid = (4, 32, 8) if options.small else (64, 224, 8)
    images = torch.rand(n, 3, size, size, device=options.device)
    cases = compare_formula(images, grid, options.repeats)
    report("mixing", [*cases, *compare_others(images, grid, options.repeats)], options)


if __name__ == "__main__":
    main()
