"""Masks by their distributions: cell counts, coverage, components, completion, rolling."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import (
    _blocks,
    _devices,
    block_masks,
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
        generator = _devices.make_generator(seed)
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
