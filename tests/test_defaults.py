"""Torch's defaults change nothing: every draw says where it is made, and in which dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Generator, Tensor

import mixmask
from mixmask import BlockMaskGenerator, DiscreteMaskGenerator, MixedBatch
from mixmask.data.views import RandomView, denormalize, normalize

IMAGES = torch.rand(6, 3, 16, 16, dtype=torch.float32)
DRAWS: dict[str, Callable[[Generator], MixedBatch]] = {
    "shared blocks": lambda g: mixmask.mix_batch(IMAGES, BlockMaskGenerator(5), generator=g),
    "blocks, completed and rolled": lambda g: mixmask.mix_batch(
        IMAGES, BlockMaskGenerator(6, (0.2, 0.9), roll=True)(6, generator=g), generator=g
    ),
    "discrete, random partners": lambda g: mixmask.mix_batch(
        IMAGES, DiscreteMaskGenerator(4)(6, generator=g), partner="random", generator=g
    ),
    "cutmix": lambda g: mixmask.cutmix_batch(IMAGES, generator=g),
    "cutmix per sample": lambda g: mixmask.cutmix_batch(IMAGES, per_sample=True, generator=g),
    "mixup": lambda g: mixmask.mixup_batch(IMAGES, per_sample=True, generator=g),
    "erase": lambda g: mixmask.erase_batch(IMAGES, DiscreteMaskGenerator(4), generator=g),
}


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.device("meta")], ids=str)
def test_a_seed_gives_the_same_batch_whatever_the_defaults(
    default: torch.dtype | torch.device, draw: Callable[[Generator], MixedBatch]
) -> None:
    expected = draw(torch.Generator().manual_seed(0))
    _set_default(default)
    ours = draw(torch.Generator("cpu").manual_seed(0))
    for name in ("images", "lam", "partner", "mask"):
        one, other = getattr(ours, name), getattr(expected, name)
        assert one is other is None or _same(one, other), name


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.device("meta")], ids=str)
@pytest.mark.parametrize("crop", [True, False])
def test_a_seed_gives_the_same_views_whatever_the_defaults(
    default: torch.dtype | torch.device, crop: bool
) -> None:
    view = RandomView(16, blur=0.5, crop=crop)
    expected = view(IMAGES, generator=torch.Generator().manual_seed(0))
    _set_default(default)
    assert _same(view(IMAGES, generator=torch.Generator("cpu").manual_seed(0)), expected)
    assert torch.allclose(denormalize(normalize(IMAGES)), IMAGES, atol=1e-6)


def _set_default(default: torch.dtype | torch.device) -> None:
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        # Whatever is made on the default device has no values at all.
        torch.set_default_device(default)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
