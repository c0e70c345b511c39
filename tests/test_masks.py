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
    _blocks,
    _devices,
    block_masks,
    cells_to_pixels,
    discrete_masks,
)

Golden = Callable[[str], dict[str, Tensor]]
Draw = Callable[..., Tensor]

RATIOS = tuple(tenth / 10 for tenth in range(1, 10))
MEASURED = [(grid, ratio) for grid in (4, 8, 16) for ratio in (0.25, 0.5, 0.75)]
# A cell's z beyond 5 has a probability of 6e-7; over the 1,008 cells measured, 6e-4.
CELL_Z = 5.0
# A histogram's z beyond 4.5 has a probability of 3e-6; over the 18 measured, 6e-5.
HISTOGRAM_Z = 4.5


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _distinct(values: Tensor) -> list[float]:
    return sorted(set(values.flatten().tolist()))


def _wanted(grid: int, ratio: float) -> int:
    return min(max(round(ratio * (grid * grid)), 1), grid * grid - 1)


def _count_components(masks: Tensor, *, cyclic: bool = False) -> Tensor:
    """Count 4-connected components of (n, g, g) masks: (n,), by spreading the largest label."""
    n, g, _ = masks.shape
    index = torch.arange(1, g * g + 1, dtype=torch.int32).view(1, g, g)
    labels = masks * index
    while True:
        spread = labels
        for axis in (1, 2):
            for step in (1, -1):
                neighbour = labels.roll(step, axis)
                if not cyclic:
                    neighbour.select(axis, 0 if step == 1 else -1).zero_()
                spread = torch.maximum(spread, neighbour)
        spread = spread * masks
        if torch.equal(spread, labels):
            return ((labels == index) & masks).view(n, -1).sum(dim=1)
        labels = spread


def _coverage_z(ours: Tensor, theirs: Tensor, n_ours: int, n_theirs: int) -> Tensor:
    """Return the z of each cell in a two-sample test of proportions."""
    pooled = (ours * n_ours + theirs * n_theirs) / (n_ours + n_theirs)
    deviation = (pooled * (1 - pooled) * (1 / n_ours + 1 / n_theirs)).sqrt()
    return (ours - theirs) / deviation.clamp(min=1e-12)


def _histogram_z(ours: Tensor, theirs: Tensor) -> float:
    """Return the z of a two-sample chi-square test, by Wilson and Hilferty's approximation.

    Bins are taken together, rarest first, until ten draws are expected in each.
    """
    size = max(len(ours), len(theirs))
    table = torch.stack([F.pad(row.double(), (0, size - len(row))) for row in (ours, theirs)])
    table = table[:, table.sum(dim=0).argsort()]
    total = table.sum()
    share = table.sum(dim=1, keepdim=True) / total
    bins: list[Tensor] = []
    gathered = torch.zeros(2, dtype=torch.float64)
    for column in table.T:
        gathered = gathered + column
        if float((gathered.sum() * share).min()) >= 10:
            bins.append(gathered)
            gathered = torch.zeros(2, dtype=torch.float64)
    bins[-1] = bins[-1] + gathered
    observed = torch.stack(bins, dim=1)
    expected = share * observed.sum(dim=0)
    freedom = len(bins) - 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    if freedom == 0:
        return 0.0
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def test_the_histogram_test_tells_distributions_apart() -> None:
    one = torch.tensor([6000, 3000, 950, 50])
    assert abs(_histogram_z(one, one * 2)) > 1  # Too good a match is far below the mean.
    assert _histogram_z(one, torch.tensor([5600, 3400, 950, 50])) > HISTOGRAM_Z


@pytest.mark.parametrize(
    "rows, plain, cyclic",
    [
        (["100", "000", "001"], 2, 2),
        (["110", "010", "011"], 1, 1),
        (["101", "010", "101"], 5, 2),
        (["101", "000", "000"], 2, 1),
        (["000", "000", "000"], 0, 0),
        (["111", "101", "111"], 1, 1),
    ],
)
def test_components_are_counted(rows: list[str], plain: int, cyclic: int) -> None:
    mask = torch.tensor([[cell == "1" for cell in row] for row in rows])[None]
    assert _count_components(mask).item() == plain
    assert _count_components(mask, cyclic=True).item() == cyclic


@pytest.mark.slow
@pytest.mark.parametrize("grid", range(2, 49))
@pytest.mark.parametrize("draw", [block_masks, discrete_masks])
def test_masks_have_exactly_the_asked_cells(draw: Draw, grid: int) -> None:
    """10,000 draws of each ratio up to grid 16; above, 10,000 spread over the nine ratios."""
    n = 10_000 if grid <= 16 else -(-10_000 // len(RATIOS))
    for ratio in RATIOS:
        masks = draw(n, grid, ratio)
        assert masks.shape == (n, grid, grid)
        assert masks.dtype == torch.bool
        cells = masks.sum(dim=(1, 2))
        assert _distinct(cells) == [_wanted(grid, ratio)]
        assert 0 < _wanted(grid, ratio) < grid * grid


@pytest.mark.parametrize("draw", [block_masks, discrete_masks])
@pytest.mark.parametrize("grid, ratio", [(2, 0.01), (2, 0.99), (3, 0.001), (7, 0.999), (48, 1e-9)])
def test_masks_are_never_empty_or_full(draw: Draw, grid: int, ratio: float) -> None:
    expected = 1 if ratio < 0.5 else grid * grid - 1
    assert _distinct(draw(500, grid, ratio).sum(dim=(1, 2))) == [expected]


@pytest.mark.parametrize("grid, ratio", MEASURED)
def test_unfinished_blocks_follow_the_published_distribution(
    golden: Golden, grid: int, ratio: float
) -> None:
    """Coverage and the histograms of cells and components, by two-sample tests."""
    published = golden("block_mask_statistics")
    coverage, cells, components = (
        published[f"{name}_g{grid}_r{ratio}"] for name in ("coverage", "cells", "components")
    )
    n_theirs = int(cells.sum())
    n = 20_000 if grid < 16 else 10_000
    masks = block_masks(n, grid, ratio, exact=False)

    z = _coverage_z(masks.double().mean(dim=0), coverage, n, n_theirs)
    assert float(z.abs().max()) < CELL_Z
    ours = masks.sum(dim=(1, 2)).bincount(minlength=grid * grid + 1)
    assert _histogram_z(ours, cells) < HISTOGRAM_Z
    assert _histogram_z(_count_components(masks).bincount(), components) < HISTOGRAM_Z


@pytest.mark.parametrize("grid, ratio", MEASURED)
def test_completion_moves_coverage_by_no_more_than_the_stalled_share(
    golden: Golden, grid: int, ratio: float
) -> None:
    """A cell gains at most the share of published masks that fell short; it never loses."""
    published = golden("block_mask_statistics")
    theirs, cells = (published[f"{name}_g{grid}_r{ratio}"] for name in ("coverage", "cells"))
    n_theirs, wanted = int(cells.sum()), _wanted(grid, ratio)
    short = float(cells[:wanted].sum()) / n_theirs
    n = 20_000 if grid < 16 else 10_000
    ours = block_masks(n, grid, ratio).double().mean(dim=0)
    noise = CELL_Z * (0.25 * (1 / n + 1 / n_theirs)) ** 0.5
    assert float((ours - theirs).min()) > -noise
    assert float((ours - theirs).max()) < short + noise
    assert float(ours.mean()) == pytest.approx(wanted / grid**2, abs=1e-9)


@pytest.mark.parametrize("grid", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_completion_only_adds_to_stalled_masks(grid: int, ratio: float) -> None:
    short = block_masks(2000, grid, ratio, exact=False, generator=_seeded(5))
    exact = block_masks(2000, grid, ratio, generator=_seeded(5))
    assert not (short & ~exact).any()
    full = short.sum(dim=(1, 2)) == _wanted(grid, ratio)
    assert torch.equal(short[full], exact[full])
    # New cells join what is there, or start one component where there was nothing.
    before, after = _count_components(short), _count_components(exact)
    assert bool((after <= before.clamp(min=1)).all())


@pytest.mark.parametrize("grid", [2, 3, 8, 16, 31])
@pytest.mark.parametrize("ratio", [0.5, 0.9, (0.1, 0.8)])
@pytest.mark.parametrize("min_cells", [1, 4, 16])
@pytest.mark.parametrize("roll", [False, True])
def test_a_single_mask_is_drawn_as_in_a_batch(
    grid: int, ratio: float | tuple[float, float], min_cells: int, roll: bool
) -> None:
    low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    grown = 0
    for number in range(60):
        seed = torch.tensor(number)
        generator = _devices.seeded(seed)
        wanted = _blocks.draw_cell_counts(1, grid, low, high, generator)
        batch, stalled = _blocks.lay_blocks(wanted, grid, min_cells, 0.3, generator)
        if len(stalled):
            batch, grown = _blocks._grow(batch, wanted, generator), grown + 1
        batch = _blocks._roll(batch, generator) if roll else batch
        single = _blocks.draw_blocks(seed, 1, grid, low, high, min_cells, 0.3, True, roll)
        torch.testing.assert_close(single, batch)
    assert grown or grid > 2


def test_growing_keeps_masks_connected() -> None:
    masks = torch.zeros(300, 9, 9, dtype=torch.bool)
    masks[100:200, 0, 0] = True
    masks[200:, 3:5, 6:9] = True
    wanted = torch.randint(7, 80, (300,))
    grown = _blocks._grow(masks, wanted, _seeded(1))
    assert torch.equal(grown.sum(dim=(1, 2)), wanted)
    assert not (masks & ~grown).any()
    assert _distinct(_count_components(grown)) == [1]
    assert len(_distinct(grown[:100].float().mean(dim=0))) > 10  # Empty ones start anywhere.


def test_masks_grown_on_a_grid_of_two_are_two_adjacent_cells() -> None:
    laid = block_masks(4000, 2, exact=False, generator=_seeded(0)).sum(dim=(1, 2))
    masks = block_masks(4000, 2, generator=_seeded(0))
    assert _distinct(masks.sum(dim=(1, 2))) == [2]
    grown = masks[laid < 2]
    assert len(grown) > 3000
    assert _distinct(_count_components(grown)) == [1]
    assert len(set(map(tuple, grown.view(-1, 4).tolist()))) == 4


def test_discrete_masks_keep_every_cell_equally_often_and_independently() -> None:
    n, grid, wanted = 40_000, 4, 4
    masks = discrete_masks(n, grid, 0.25).double().view(n, -1)
    z = (masks.mean(dim=0) - 0.25) / math.sqrt(0.25 * 0.75 / n)
    assert float(z.abs().max()) < CELL_Z
    # Without replacement, two cells are kept together with 4 / 16 * 3 / 15.
    expected = wanted * (wanted - 1) / (16 * 15)
    together = (masks.T @ masks / n)[~torch.eye(16, dtype=torch.bool)]
    z = (together - expected) / math.sqrt(expected * (1 - expected) / n)
    assert float(z.abs().max()) < CELL_Z


@pytest.mark.parametrize("grid, ratio", [(4, 0.5), (8, 0.25), (8, 0.5), (16, 0.75)])
def test_rolling_makes_coverage_flat(grid: int, ratio: float) -> None:
    n = 20_000
    coverage = block_masks(n, grid, ratio, roll=True).double().mean(dim=0)
    z = (coverage - ratio) / math.sqrt(ratio * (1 - ratio) / n)
    assert float(z.abs().max()) < CELL_Z
    middle_heavy = block_masks(n, grid, ratio).double().mean(dim=0)
    assert float((middle_heavy - ratio).abs().max()) > 0.1


def test_rolling_shifts_masks_cyclically() -> None:
    plain = block_masks(200, 8, 0.4, generator=_seeded(2))
    rolled = block_masks(200, 8, 0.4, roll=True, generator=_seeded(2))
    shifts = [(y, x) for y in range(8) for x in range(8)]
    shifted = torch.stack([plain.roll(shift, dims=(1, 2)) for shift in shifts])
    matches = (shifted == rolled).all(dim=-1).all(dim=-1)
    assert bool(matches.any(dim=0).all())
    used = _distinct(matches.int().argmax(dim=0))
    assert len(used) > 32  # Offsets vary from mask to mask, along both axes.
    assert torch.equal(
        _count_components(plain, cyclic=True), _count_components(rolled, cyclic=True)
    )


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
