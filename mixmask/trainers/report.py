"""The report of a study: a table as Markdown and CSV, and a figure."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmask.figures.runs import figure_budgets, figure_factors
from mixmask.figures.style import save_figure, short_path
from mixmask.runs.folder import write_text
from mixmask.runs.records import describe_option, mean_sd, percent
from mixmask.trainers.studies import MEASURES, Cell, Outcome, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """A line of a study's table: a cell, and for each measure one accuracy per seed."""

    cell: Cell
    accuracies: dict[str, list[float]]
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The files that a study leaves.

    Attributes:
        study: "masks" or "budgets".
        out: The study's folder.
        test_images: How many images its accuracies were measured on.
        cells: The lines of its table.
    """

    study: str
    out: Path
    test_images: int
    cells: Sequence[Cell]

    @property
    def title(self) -> str:
        """What all cells share."""
        config = self.cells[0].config
        arch = f"{config.arch} at {config.image_size} px"
        data = short_path(config.data)
        if self.study == "budgets":
            return f"{data}, {arch}"
        return f"{config.method} + mixmask on {data}, {arch}, {config.epochs} epochs"

    def markdown(self, outcomes: Mapping[Plan, Outcome]) -> str:
        """Return the table of what has been measured so far."""
        lines = collect(self.cells, outcomes)
        return table_markdown(lines, title=self.title, test_images=self.test_images)

    def write(self, outcomes: Mapping[Plan, Outcome]) -> None:
        """Write STUDY.md, STUDY.csv and, once there is an accuracy, STUDY.png."""
        lines = collect(self.cells, outcomes)
        write_text(self.out / f"{self.study}.md", self.markdown(outcomes))
        write_text(self.out / f"{self.study}.csv", table_csv(lines))
        if any(line.accuracies["knn"] for line in lines):
            save_figure(self._figure(lines, outcomes), self.out / f"{self.study}.png")

    def _figure(self, lines: Sequence[Line], outcomes: Mapping[Plan, Outcome]) -> Figure:
        panels: dict[str, Any] = {}
        firsts = [outcome.rows[0] for outcome in outcomes.values() if outcome.rows]
        untrained = {
            name: statistics.fmean(row[name] for row in firsts if name in row)
            for name in MEASURES
            if any(name in row for row in firsts)
        }
        if self.study == "budgets":
            for line in lines:
                config = line.cell.config
                for name, values in line.accuracies.items():
                    curves = panels.setdefault(config.method, {}).setdefault(name, {})
                    curve = curves.setdefault(describe_option("mix", config.mix), {})
                    curve[config.epochs] = values
            return figure_budgets(panels, untrained=untrained, title=self.title)
        for line in lines:
            panels.setdefault(line.cell.factor, {})[line.cell.value] = line.accuracies
        return figure_factors(panels, untrained=untrained, title=self.title)


def collect(cells: Sequence[Cell], outcomes: Mapping[Plan, Outcome]) -> list[Line]:
    """Sort a study's outcomes into its table; runs without an outcome are left out."""
    lines = []
    for cell in cells:
        own = [(plan, o) for plan, o in outcomes.items() if plan.folder.parent.name == cell.name]
        accuracies = {
            measure: [value for _, o in own if (value := o.last(measure)) is not None]
            for measure in MEASURES
        }
        errors = tuple(f"{plan.label}: {o.error}" for plan, o in own if o.error)
        lines.append(Line(cell, accuracies, errors))
    return lines


def table_markdown(lines: Sequence[Line], *, title: str, test_images: int) -> str:
    """Write a study's table: means in percent, ± the standard deviation over seeds.

    Args:
        lines: The table's lines.
        title: A line above it.
        test_images: On which accuracies were measured; their error is stated below.
    """
    text = [title, "", "| factor | value | seeds | kNN, % | linear, % |", "|---|---|---|---|---|"]
    previous = ""
    for line in lines:
        factor = line.cell.factor if line.cell.factor != previous else ""
        previous = line.cell.factor
        measured = " | ".join(percent(line.accuracies[measure]) for measure in MEASURES)
        text.append(f"| {factor} | {line.cell.value} | {_seeds(line)} | {measured} |")
    text += ["", "± is the standard deviation over seeds." + _error(lines, test_images)]
    errors = dict.fromkeys(error for line in lines for error in line.errors)
    text += [""] * bool(errors) + [f"Failed: {error}" for error in errors]
    return "\n".join(text) + "\n"


def table_csv(lines: Sequence[Line]) -> str:
    """Write a study's table as CSV: one line per cell, with accuracies of 0 ... 1."""
    options = ("method", "mix", "grid_size", "pattern", "ratio", "switch", "epochs", "lr")
    numbers = [f"{measure}_{kind}" for measure in MEASURES for kind in ("mean", "sd")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["factor", "value", *options, "seeds", *numbers])
    for line in lines:
        config = dataclasses.asdict(line.cell.config)
        measured: list[float | None] = []
        for measure in MEASURES:
            values = line.accuracies[measure]
            measured += mean_sd(values) if values else (None, None)
        chosen = [config[name] for name in options]
        writer.writerow([line.cell.factor, line.cell.value, *chosen, _seeds(line), *measured])
    return file.getvalue()


def _seeds(line: Line) -> int:
    return len(line.accuracies["knn"])


def _error(lines: Sequence[Line], test_images: int) -> str:
    """State the standard error of an accuracy that comes from the choice of test images."""
    values = [value for line in lines for value in line.accuracies["knn"]]
    if not values:
        return ""
    mean = sum(values) / len(values)
    error = 100 * math.sqrt(mean * (1 - mean) / test_images)
    return (
        f" With {test_images:,} test images, the standard error of a single accuracy is about "
        f"{error:.1f} points; smaller differences mean nothing."
    )
