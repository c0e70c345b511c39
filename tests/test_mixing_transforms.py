"""Mixing under torch.func's transforms and in forward mode: the values of the plain call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mixmask import (
    BlockMaskGenerator,
    DiscreteMaskGenerator,
    MixMask,
    cutmix_batch,
    erase_batch,
    mix_batch,
    mixup_batch,
)

# Called with images (N, C, H, W) and, as the generator, that of one seed.
Mix = Callable[..., Any]
N = 5
BLOCKS, CELLS = BlockMaskGenerator(4), DiscreteMaskGenerator(4, (0.25, 0.75))
ROLLED = BlockMaskGenerator(4, (0.25, 0.75), roll=True)
GIVEN = BlockMaskGenerator(4)(N, generator=torch.Generator().manual_seed(1))
MIXES: dict[str, Mix] = {
    "blocks": lambda x, g: mix_batch(x, BLOCKS, generator=g),
    "rolled blocks": lambda x, g: mix_batch(x, ROLLED, partner="random", generator=g),
    "cells": lambda x, g: mix_batch(x, CELLS, generator=g),
    "masks": lambda x, _: mix_batch(x, GIVEN, partner=torch.arange(N).roll(1)),
    "module": lambda x, g: MixMask(4, per_sample=True)(x, generator=g),
    "mixup": lambda x, g: mixup_batch(x, generator=g),
    "cutmix": lambda x, g: cutmix_batch(x, generator=g),
    "cutmix per sample": lambda x, g: cutmix_batch(x, per_sample=True, generator=g),
    "erase": lambda x, g: erase_batch(x, BLOCKS, generator=g),
}
every_mix = pytest.mark.parametrize("name", MIXES)
# Which torch itself raises where it prepares forward mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mixing(name: str) -> Callable[[Tensor], Tensor]:
    """Return a function of images alone, as transforms take it."""
    return lambda images: MIXES[name](images, _seeded()).images


def _images(*more: int) -> Tensor:
    return torch.rand(*more, N, 3, 12, 10)


def _differentiate(name: str, images: Tensor, weights: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    (_mixing(name)(images) * weights).sum().backward()
    assert images.grad is not None
    return images.grad


@every_mix
def test_a_gradient_is_that_of_autograd(name: str) -> None:
    images, weights, mix = _images(), _images(), _mixing(name)
    expected = _differentiate(name, images, weights)
    found = torch.func.grad(lambda x: (mix(x) * weights).sum())(images)
    assert torch.equal(found, expected)
    value, pull, *_ = torch.func.vjp(mix, images)
    assert torch.equal(value, mix(images))
    assert torch.equal(pull(weights)[0], expected)


@every_mix
def test_a_tangent_is_mixed_as_the_images_are(name: str) -> None:
    images, tangent, mix = _images(), _images(), _mixing(name)
    # Every mixture is affine in the images.
    expected = mix(tangent) - mix(torch.zeros_like(tangent))
    value, found, *_ = torch.func.jvp(mix, (images,), (tangent,))
    assert torch.equal(value, mix(images))
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(mix(forward_ad.make_dual(images, tangent)))
    assert torch.equal(dual.primal, mix(images))
    torch.testing.assert_close(dual.tangent, expected)


@every_mix
def test_batches_that_are_mapped_over_share_their_draws(name: str) -> None:
    batches, mix = _images(3), _mixing(name)
    found = torch.func.vmap(mix, randomness="same")(batches)
    torch.testing.assert_close(found, torch.stack([mix(images) for images in batches]))
    slope = torch.func.grad(lambda images: mix(images).square().sum())
    found = torch.func.vmap(slope, randomness="same")(batches)
    torch.testing.assert_close(found, torch.stack([slope(images) for images in batches]))


def test_masks_can_be_mapped_over() -> None:
    images, masks = _images(), CELLS(6).view(2, 3, 4, 4)
    found = torch.func.vmap(torch.func.vmap(lambda mask: mix_batch(images, mask).images))(masks)
    expected = [mix_batch(images, mask).images for mask in masks.flatten(0, 1)]
    assert torch.equal(found.flatten(0, 1), torch.stack(expected))


def test_draws_and_partners_that_differ_over_a_map_are_refused() -> None:
    mixing, images, partners = _mixing("blocks"), _images(), torch.arange(N).roll(1).repeat(3, 1)
    with pytest.raises(RuntimeError, match=r"vmap.*\.item\(\)"):
        torch.func.vmap(mixing, randomness="different")(_images(3))
    with pytest.raises(RuntimeError, match=r"vmap.*\.item\(\)"):
        torch.func.vmap(lambda p: mix_batch(images, GIVEN, partner=p).images)(partners)


@pytest.mark.parametrize("grid_size", [2, 3, 8, 16, 40])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": (0.05, 0.95), "roll": True},
        {"ratio": 0.9, "min_cells": 1, "min_aspect": 0.05},
        {"ratio": (0.1, 0.9), "exact": False, "min_cells": 16},
    ],
    ids=str,
)
def test_a_mask_is_the_same_under_a_transform(grid_size: int, options: dict[str, Any]) -> None:
    masks = BlockMaskGenerator(grid_size, **options)
    for seed in range(20):
        with forward_ad.dual_level():
            found = masks(generator=_seeded(seed))
        assert torch.equal(found, masks(generator=_seeded(seed)))


def test_a_generator_breaks_a_graph_and_draws_the_same() -> None:
    images = _images()
    compiled = torch.compile(MIXES["rolled blocks"], backend="eager")
    found, expected = compiled(images, _seeded()), MIXES["rolled blocks"](images, _seeded())
    assert torch.equal(found.images, expected.images)
