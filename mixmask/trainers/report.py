"""The report of a study: a table as Markdown and CSV, and a figure."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from mixmask.figures.runs import figure_budgets, figure_factors
from mixmask.figures.style import save_figure, short_path
from mixmask.runs.folder import write_text
from mixmask.runs.records import describe_option, mean_sd, percent, plural
from mixmask.trainers.studies import MEASURES, Cell, StudyRun

_OPTIONS = ("method", "mix", "grid_size", "pattern", "ratio", "switch", "epochs", "lr")


@dataclass(frozen=True)
class Line:
    """A line of a study's table: a cell, and for each measure one accuracy per seed."""

    cell: Cell
    accuracies: dict[str, list[float]]
    errors: tuple[str, ...] = ()

    @property
    def seeds(self) -> int:
        """How many of its runs have an accuracy."""
        return len(self.accuracies["knn"])


@dataclass(frozen=True)
class Report:
    """The files that a study leaves."""

    study: str  # "masks" or "budgets".
    out: Path  # The study's folder.
    cells: Sequence[Cell]  # The lines of its table.
    runs: Sequence[StudyRun]
    test_images: int  # How many images accuracies are measured on.

    def write(self) -> str:
        """Write STUDY.md, STUDY.csv and, once there is an accuracy, STUDY.png.

        Returns:
            The table in STUDY.md, of what has been measured so far.
        """
        lines = collect(self.cells, self.runs)
        config = self.cells[0].config
        title = f"{short_path(config.data)}, {config.arch} at {config.image_size} px"
        if self.study == "masks":
            epochs = plural(config.epochs, "epoch")
            title = f"{config.method} + mixmask on {title}, {epochs}"
        text = table_markdown(lines, title=title, test_images=self.test_images)
        write_text(self.out / f"{self.study}.md", text)
        write_text(self.out / f"{self.study}.csv", table_csv(lines))
        if any(line.seeds for line in lines):
            masks = self.study == "masks"
            figure = (_factors if masks else _budgets)(lines, self.runs, title)
            save_figure(figure, self.out / f"{self.study}.png")
        return text


def collect(cells: Sequence[Cell], runs: Sequence[StudyRun]) -> list[Line]:
    """Sort a study's runs into its table; those without an accuracy are left out."""
    lines = []
    for cell in cells:
        own = [run for run in runs if run.folder.parent.name == cell.name]
        accuracies = {
            measure: [value for run in own if (value := run.last(measure)) is not None]
            for measure in MEASURES
        }
        errors = tuple(f"{run.label}: {run.error}" for run in own if run.error)
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
        text.append(f"| {factor} | {line.cell.value} | {line.seeds} | {measured} |")
    note = "± is the standard deviation over seeds."
    if values := [value for line in lines for value in line.accuracies["knn"]]:
        mean = statistics.fmean(values)
        error = 100 * math.sqrt(mean * (1 - mean) / test_images)  # Of a binomial share.
        note += (
            f" With {test_images:,} test images, the standard error of a single accuracy is about "
            f"{error:.1f} points; smaller differences mean nothing."
        )
    errors = dict.fromkeys(error for line in lines for error in line.errors)
    text += ["", note, *[""] * bool(errors), *(f"Failed: {error}" for error in errors)]
    return "\n".join(text) + "\n"


def table_csv(lines: Sequence[Line]) -> str:
    """Write a study's table as CSV: one line per cell, with accuracies of 0 ... 1."""
    numbers = [f"{measure}_{kind}" for measure in MEASURES for kind in ("mean", "sd")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["factor", "value", *_OPTIONS, "seeds", *numbers])
    for line in lines:
        measured: list[float | None] = []
        for measure in MEASURES:
            values = line.accuracies[measure]
            measured += mean_sd(values) if values else (None, None)
        options = [getattr(line.cell.config, name) for name in _OPTIONS]
        writer.writerow([line.cell.factor, line.cell.value, *options, line.seeds, *measured])
    return file.getvalue()


def _budgets(lines: Sequence[Line], runs: Sequence[StudyRun], title: str) -> Figure:
    # Method -> measure -> mixture -> epochs -> accuracies.
    panels: dict[str, dict[str, dict[str, dict[int, list[float]]]]] = {}
    for line in lines:
        config = line.cell.config
        for name, values in line.accuracies.items():
            curves = panels.setdefault(config.method, {}).setdefault(name, {})
            curves.setdefault(describe_option("mix", config.mix), {})[config.epochs] = values
    return figure_budgets(panels, untrained=_untrained(runs), title=title)


def _factors(lines: Sequence[Line], runs: Sequence[StudyRun], title: str) -> Figure:
    # Factor -> value -> measure -> accuracies.
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for line in lines:
        panels.setdefault(line.cell.factor, {})[line.cell.value] = line.accuracies
    return figure_factors(panels, untrained=_untrained(runs), title=title)


def _untrained(runs: Sequence[StudyRun]) -> dict[str, float]:
    """Return the mean accuracies before training, 0 ... 1, by measure."""
    firsts = [run.rows[0] for run in runs if run.rows]
    return {
        name: statistics.fmean(row[name] for row in firsts if name in row)
        for name in MEASURES
        if any(name in row for row in firsts)
    }
