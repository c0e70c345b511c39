"""Rows of the evidence: cells that differ in their seed alone, and their differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evidence_cells import Cell, Part, Plan, Record, is_done

from mixmask.trainers.config import RunConfig

MEASURES = ("knn", "linear")
# Quantile 0.975 of Student's t by degrees of freedom, from 1; the last one serves for more.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Options of the mixed views, which a baseline has none of: a group of the configuration.
_OPTIONS = list(RunConfig.__dataclass_fields__)
_MIXING = _OPTIONS[_OPTIONS.index("mix") : _OPTIONS.index("method")]
# Budgets of passes that differ by less are equal.
_EQUAL = 0.02


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds in points, and how sure it is.

    Attributes:
        mean: In percent, or a difference in points.
        error: Half a 95 % interval for a difference, otherwise the standard error of the mean;
            None where one seed says nothing about it.
        n: Seeds.
    """

    mean: float
    error: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """Cells that differ in their seed alone, with the results there are.

    Attributes:
        cells: All of them, done or not.
        records: By seed, those of finished runs.
        failed: How many runs collapsed or diverged.
    """

    cells: tuple[Cell, ...]
    records: dict[int, Record]
    failed: int

    @property
    def cell(self) -> Cell:
        """Any of them, for what they share."""
        return self.cells[0]

    @property
    def passes(self) -> float | None:
        """Forward-backward passes per image in an epoch; None before there is a result."""
        for record in self.records.values():
            return float(record["passes_per_image"])
        return None

    @property
    def compute(self) -> float | None:
        """Forward-backward passes per image over the whole run; None before there is a result."""
        return self.passes and self.passes * self.cell.epochs

    def accuracies(self, measure: str) -> dict[int, float]:
        """Return the final accuracies in percent, by seed."""
        return {seed: 100 * record["final"][measure] for seed, record in self.records.items()}

    def mean(self, measure: str) -> Estimate | None:
        """Return the mean over seeds with its standard error; None before there is a result."""
        return mean_error(list(self.accuracies(measure).values()))

    def curve(self) -> tuple[list[int], list[list[float]]]:
        """Return the epochs of the curve, and the kNN accuracies in percent of each seed there."""
        records = list(self.records.values())
        start = [100 * record["untrained"]["knn"] for record in records]
        epochs = [0, *(point["epoch"] for point in records[0]["curve"])]
        curves = [[100 * point["knn"] for point in record["curve"]] for record in records]
        return epochs, [
            list(at)
            for at in zip(*([s, *c] for s, c in zip(start, curves, strict=True)), strict=True)
        ]


def mean_error(values: Sequence[float]) -> Estimate | None:
    """Return a mean and its standard error."""
    if not values:
        return None
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(statistics.fmean(values), error, n)


def difference(row: Row, baseline: Row, measure: str) -> Estimate | None:
    """Return row minus baseline, paired by seed, with half its 95 % interval (Student's t)."""
    own, other = row.accuracies(measure), baseline.accuracies(measure)
    found = mean_error([own[seed] - other[seed] for seed in own if seed in other])
    if found is None or found.error is None:
        return found
    student = _STUDENT[min(found.n - 1, len(_STUDENT)) - 1]
    return Estimate(found.mean, student * found.error, found.n)


def rows_of(part: Part, results: Mapping[str, Record]) -> list[Row]:
    """Group a part's cells by all but the seed, in the order of the plan."""
    groups: dict[str, dict[str, Cell]] = {}
    for cell in part.cells:
        # The seed ends the name.
        groups.setdefault(cell.name.rpartition("_")[0], {})[cell.name] = cell
    return [_row(tuple(cells.values()), results) for cells in groups.values()]


def _row(cells: tuple[Cell, ...], results: Mapping[str, Record]) -> Row:
    done = {cell.seed: results[cell.name] for cell in cells if is_done(cell, results)}
    whole = {seed: record for seed, record in done.items() if record["final"] is not None}
    return Row(cells, whole, len(done) - len(whole))


def baselines(plan: Plan, results: Mapping[str, Record]) -> list[Row]:
    """Return all rows of a plan's own runs without mixing, each once."""
    found = {}
    for part in plan.parts:
        for row in rows_of(part, results):
            if not row.cell.mixes and row.cell.code == "mixmask" and row.cell.split == "test":
                found[row.cell.name] = row
    return list(found.values())


def at_equal_epochs(row: Row, known: Sequence[Row]) -> Row | None:
    """Return the baseline that was trained as long, if it is another run."""
    for other in _alike(row, known):
        if other.cell.epochs == row.cell.epochs:
            return other
    return None


def at_equal_compute(row: Row, known: Sequence[Row]) -> Row | None:
    """Return the baseline that made as many passes, or will have: each epoch makes as many."""
    alike = _alike(row, known)
    passes = next((other.passes for other in alike if other.passes), None)
    if row.compute is None or passes is None:
        return None
    for other in alike:
        if abs(passes * other.cell.epochs / row.compute - 1) < _EQUAL:
            return other
    return None


def _alike(row: Row, known: Sequence[Row]) -> list[Row]:
    """Return the baselines that differ from a row in nothing but mixing, length and rate."""

    def kind(cell: Cell) -> tuple[object, ...]:
        options = {name: cell.options[name] for name in cell.options if name not in _MIXING}
        return cell.data, cell.images, cell.arch, cell.method, cell.split, options

    return [r for r in known if kind(r.cell) == kind(row.cell) and r.cells != row.cells]
