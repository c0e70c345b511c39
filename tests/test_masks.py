from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import (
    BlockMaskGenerator,
    DiscreteMaskGenerator,
    MixMask,
    block_masks,
    cells_to_pixels,
    discrete_masks,
)
from mixmask.figures.masks import figure_masks
from mixmask.integrations.kornia import RandomMixMask
from mixmask.masks import PATTERNS
from mixmask.trainers import config

Golden = Callable[[str], dict[str, Tensor]]
Draw = Callable[..., Tensor]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _distinct(values: Tensor) -> list[float]:
    return sorted(set(values.flatten().tolist()))


@pytest.mark.parametrize("draw", [block_masks, discrete_masks])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.25, 0.75), (0.3, 0.31)])
def test_ratio_ranges_are_drawn_uniformly(draw: Draw, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's distance at n = 4,000, at a level of 1e-6, plus one cell."""
    n, grid = 4000, 24
    shares = draw(n, grid, (low, high)).double().mean(dim=(1, 2)).sort().values
    cell = 1 / grid**2
    assert float(shares.min()) >= max(low - cell / 2, cell) - 1e-12
    assert float(shares.max()) <= min(high + cell / 2, 1 - cell) + 1e-12
    expected = ((shares - low) / (high - low)).clamp(0, 1)
    distance = float((expected - torch.arange(1, n + 1) / n).abs().max())
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n)) + cell / (high - low)


def test_a_list_is_a_range_too() -> None:
    one = discrete_masks(8, 8, (0.2, 0.4), generator=_seeded(0))
    other: Any = [0.2, 0.4]
    assert torch.equal(one, discrete_masks(8, 8, other, generator=_seeded(0)))


@pytest.mark.parametrize("draw", [block_masks, discrete_masks])
def test_masks_follow_from_the_generator_alone(draw: Draw) -> None:
    generator = _seeded(7)
    first, second = draw(64, 8, generator=generator), draw(64, 8, generator=generator)
    assert torch.equal(first, draw(64, 8, generator=_seeded(7)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(64, 8, generator=_seeded(8)))
    torch.manual_seed(3)
    first = draw(64, 8)
    torch.manual_seed(3)
    assert torch.equal(first, draw(64, 8))


@pytest.mark.parametrize("draw", [block_masks, discrete_masks])
def test_a_seed_means_the_same_on_every_device(draw: Draw, device: torch.device) -> None:
    masks = draw(64, 8, (0.2, 0.8), device=device, generator=_seeded(4))
    assert masks.device.type == device.type
    assert torch.equal(masks.cpu(), draw(64, 8, (0.2, 0.8), generator=_seeded(4)))


def test_the_default_device_does_not_matter() -> None:
    expected = block_masks(4, 8, generator=_seeded(0)), discrete_masks(4, 8, generator=_seeded(0))
    with torch.device("meta"):
        drawn = block_masks(4, 8, generator=_seeded(0)), discrete_masks(4, 8, generator=_seeded(0))
    assert torch.equal(expected[0], drawn[0])
    assert torch.equal(expected[1], drawn[1])


@pytest.mark.parametrize("masks", [BlockMaskGenerator(8), DiscreteMaskGenerator(8)])
def test_generators_draw_one_or_many(masks: BlockMaskGenerator | DiscreteMaskGenerator) -> None:
    assert masks().shape == (8, 8)
    assert masks(0).shape == (0, 8, 8)
    assert masks(3).shape == (3, 8, 8)
    assert torch.equal(masks(generator=_seeded(1)), masks(1, generator=_seeded(1))[0])


def test_generators_pass_their_options_on() -> None:
    options: dict[str, Any] = {"min_cells": 2, "min_aspect": 0.9, "exact": False, "roll": True}
    masks = BlockMaskGenerator(8, (0.6, 0.9), **options)
    expected = block_masks(256, 8, (0.6, 0.9), generator=_seeded(1), **options)
    assert torch.equal(masks(256, generator=_seeded(1)), expected)
    for name in options:
        others = {key: value for key, value in options.items() if key != name}
        fewer = block_masks(256, 8, (0.6, 0.9), generator=_seeded(1), **others)
        assert not torch.equal(expected, fewer), name
    discrete = DiscreteMaskGenerator(8, (0.2, 0.6))
    assert torch.equal(
        discrete(5, generator=_seeded(1)), discrete_masks(5, 8, (0.2, 0.6), generator=_seeded(1))
    )


class Checkerboard(DiscreteMaskGenerator):
    """A pattern of a user's own."""


def test_a_row_of_one_table_adds_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(PATTERNS) == config.PATTERNS
    monkeypatch.setitem(PATTERNS, "checkerboard", Checkerboard)
    for module in (MixMask(2, 0.25, "checkerboard"), RandomMixMask(2, 0.25, "checkerboard")):
        assert module.masks == Checkerboard(2, 0.25)
    figure = figure_masks(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), grid_sizes=(2,))
    assert "checkerboard, grid 2" in [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockMaskGenerator(4),
        lambda: DiscreteMaskGenerator(4),
    ],
)
def test_building_a_generator_draws_nothing(make: Callable[[], object]) -> None:
    before = torch.random.get_rng_state()
    make()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "cells, pixels",
    [
        ((2, 2), (32, 32)),
        ((8, 8), (224, 224)),
        ((3, 3), (32, 32)),
        ((7, 7), (30, 45)),
        ((5, 3), (8, 64)),
        ((16, 16), (17, 31)),
        ((6, 6), (6, 6)),
        ((6, 6), (6, 13)),
        ((1, 4), (9, 5)),
        ((48, 48), (50, 224)),
    ],
)
def test_cells_become_pixels_as_nearest_does(
    cells: tuple[int, int], pixels: tuple[int, int]
) -> None:
    (h, w), (height, width) = cells, pixels
    masks = torch.rand(3, h, w) < 0.5
    enlarged = cells_to_pixels(masks, height, width)
    expected = torch.empty(3, height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            expected[:, y, x] = masks[:, y * h // height, x * w // width]
    assert torch.equal(enlarged, expected)
    nearest = F.interpolate(masks[None].double(), size=pixels, mode="nearest")[0]
    assert torch.equal(enlarged, nearest.bool())
    assert torch.equal(cells_to_pixels(masks[0], height, width), enlarged[0])


BOTH = [block_masks, discrete_masks]


@pytest.mark.parametrize("draw", BOTH)
@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((4, 1), ValueError, r"grid_size must be at least 2, got 1; the paper uses 2"),
        ((4, 8.0), TypeError, r"grid_size must be an integer, got 8\.0; the paper"),
        ((4, True), TypeError, r"grid_size must be an integer, got True; the paper"),
        ((-1, 8), ValueError, r"n must be at least 0, got -1; pass len\(images\)"),
        ((2.5, 8), TypeError, r"must be an integer, got 2\.5; pass len\(images\)"),
        ((4, 8, 0.0), ValueError, r"strictly between 0 and 1, got 0\.0; use a number"),
        ((4, 8, 1), ValueError, r"strictly between 0 and 1, got 1; use a number"),
        ((4, 8, float("nan")), ValueError, r"strictly between 0 and 1, got nan; use a number"),
        ((4, 8, (0.7, 0.3)), ValueError, r"0 <= low <= high <= 1, got \(0\.7, 0\.3\); use"),
        ((4, 8, (-0.1, 0.3)), ValueError, r"0 <= low <= high <= 1, got \(-0\.1, 0\.3\); use"),
        ((4, 8, (1, 1)), ValueError, r"0 <= low <= high <= 1, got \(1, 1\); use"),
        ((4, 8, (0.1,)), TypeError, r"a number or a range \(low, high\), got \(0\.1,\); use"),
        ((4, 8, "half"), TypeError, r"a number or a range \(low, high\), got 'half'; use"),
        ((4, 8, None), TypeError, r"a number or a range \(low, high\), got None; use"),
    ],
)
def test_bad_sizes_and_ratios_are_refused(
    draw: Draw, arguments: tuple[Any, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        draw(*arguments)


@pytest.mark.parametrize("make", [BlockMaskGenerator, DiscreteMaskGenerator])
def test_generators_refuse_at_construction(make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"grid_size must be at least 2, got 0"):
        make(0)
    with pytest.raises(ValueError, match=r"strictly between 0 and 1, got 1\.5"):
        make(8, 1.5)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"min_cells": 0}, ValueError, r"min_cells must be at least 1, got 0; use"),
        ({"min_cells": "4"}, TypeError, r"min_cells must be an integer, got '4'; use"),
        ({"min_cells": 0.5}, TypeError, r"min_cells must be an integer, got 0\.5; use"),
        ({"min_aspect": -0.3}, ValueError, r"min_aspect must be positive and finite, got -0\.3"),
        ({"min_aspect": 2.0}, ValueError, r"min_aspect must be at most 1, got 2\.0; use its inv"),
        ({"grid_size": 63}, ValueError, r"grid_size of at most 62, got 63; the paper"),
    ],
)
def test_bad_block_options_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        BlockMaskGenerator(**{"grid_size": 8, **options})


def test_the_largest_grid_works() -> None:
    assert block_masks(3, 62, 0.5).sum(dim=(1, 2)).tolist() == [1922] * 3


def test_grids_finer_than_the_image_are_refused() -> None:
    text = r"16 x 16 cells does not fit an image of 8 x 32 pixels; use a grid_size of at most"
    with pytest.raises(ValueError, match=text):
        cells_to_pixels(torch.ones(16, 16, dtype=torch.bool), 8, 32)


class _Elsewhere(torch.Generator):
    """A generator that says it lies on a device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@pytest.mark.parametrize("draw", BOTH)
def test_foreign_generators_are_refused(draw: Draw) -> None:
    text = r"must be a CPU generator, got one on cuda:0; .*use torch\.Generator\(\)\.manual_seed"
    with pytest.raises(ValueError, match=text):
        draw(2, 4, generator=_Elsewhere())
    with pytest.raises(TypeError, match=r"must be a torch\.Generator, got int; use torch\.Gen"):
        draw(2, 4, generator=3)


@pytest.mark.gpu
@pytest.mark.parametrize("draw", BOTH)
def test_cuda_generators_are_refused(draw: Draw) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device found")
    with pytest.raises(ValueError, match=r"must be a CPU generator, got one on cuda"):
        draw(2, 4, generator=torch.Generator("cuda"))


def test_drawing_compiles_in_one_graph() -> None:
    block = BlockMaskGenerator(8, roll=True)
    discrete = DiscreteMaskGenerator(8, 0.25)

    @torch.compile(fullgraph=True)
    def draw() -> tuple[Tensor, Tensor]:
        return block(64), discrete(64)

    first, second = draw(), draw()
    for masks, cells in zip(first, (32, 16), strict=True):
        assert masks.shape == (64, 8, 8)
        assert masks.dtype == torch.bool
        assert _distinct(masks.sum(dim=(1, 2))) == [cells]
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    torch.manual_seed(0)
    again = draw()
    torch.manual_seed(0)
    assert all(map(torch.equal, again, draw()))
