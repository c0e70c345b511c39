"""Studies: a grid of runs over seeds, each with its run folder, and the report of all."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mixmask._checks import Ratio, one_line
from mixmask.data.sets import ImageData
from mixmask.figures.runs import figure_budgets, figure_factors
from mixmask.figures.style import save_figure, short_path
from mixmask.runs.claim import claim_folder
from mixmask.runs.files import METRICS, write_text
from mixmask.runs.folder import CONFIG, Row, has_checkpoint, read_config, read_rows
from mixmask.runs.images import check_same
from mixmask.runs.options import STORAGE
from mixmask.runs.records import describe_option, describe_value, mean_sd, percent, plural
from mixmask.trainers.config import PATTERNS, RunConfig
from mixmask.trainers.files import load_config
from mixmask.trainers.loop import Monitor, train
from mixmask.trainers.methods import make_config
from mixmask.trainers.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The values of the paper's table 1 and the methods of its figure 5.
GRID_SIZES = (2, 4, 8, 16, 32, 48)
RATIOS: tuple[Ratio, ...] = (0.5, (0.25, 0.75), (0.0, 1.0))
BUDGET_METHODS = ("moco-v2", "simclr", "simsiam")
MEASURES = ("knn", "linear")
# A cell of the mask is at least this many pixels wide, as in the paper: 8 at 32 px, 16 at 64 px.
_CELL_PIXELS = 4
_MOST_SEEDS = 10_000
# Options that change no weights, and the channels, which are those of the data.
_FREE = (*STORAGE, "channels")
# The columns of a table's CSV file that say what a cell is.
_COLUMNS = ("method", "mix", "grid_size", "pattern", "ratio", "switch", "epochs", "lr")
# What a run that cannot go on raises; the other runs of a study can.
_FAILURES = (ValueError, ArithmeticError, RuntimeError, OSError, MemoryError)


@dataclass(frozen=True)
class Cell:
    """A setting of a study, which is run with several seeds."""

    factor: str  # What varies, a heading of the table.
    value: str  # Its value here.
    name: str  # The folder of its runs; cells of several factors may share one.
    config: RunConfig  # The options of its runs, but for the seed.


@dataclass
class StudyRun:
    """One run of a study, and how it ended: its rows, or why it has none."""

    folder: Path
    config: RunConfig
    rows: list[Row] = field(default_factory=list)
    error: str = ""

    @property
    def label(self) -> str:
        """Its name on the console."""
        return f"{self.folder.parent.name}, seed {self.config.seed}"

    def last(self, measure: str) -> float | None:
        """Return an accuracy after the last epoch, 0 ... 1."""
        return self.rows[-1].get(measure) if self.rows else None

    def train(self, data: ImageData, monitor: Monitor) -> None:
        """Train to the end, from the checkpoint if there is one, and keep the rows or the error.

        The monitor measures "knn" and, at the end, "linear". An interruption is raised once the
        run is saved.
        """
        self.error = ""
        resume = self.folder if has_checkpoint(self.folder) else None
        facts = {"fingerprint": data.fingerprint()}
        try:
            with claim_folder(self.folder):
                run = Run.open(self.config, data.train, self.folder, resume=resume, facts=facts)
                train(run, monitor=monitor, progress=False)
            self.rows = run.rows
        except _FAILURES as error:
            self.error = one_line(error) or type(error).__name__


def mask_cells(
    *, grid_sizes: Sequence[int] = (), ratios: Sequence[Ratio] = RATIOS, **given: object
) -> list[Cell]:
    """Lay out the paper's table 1: each factor varied, the others at the recipe's values.

    The recipe's pattern, ratio and switch are the paper's best, and its grid is the best one at
    that size of image. The setting that all factors share is run once per seed.

    Args:
        grid_sizes: Cells per side. Default: the paper's with at least 4 pixels per cell, and
            the recipe's.
        ratios: Numbers, or ranges (low, high).
        **given: Fields of the method's configuration, which hold in all cells.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> [cell.value for cell in mask_cells(data="cifar100") if cell.factor == "grid size"]
        ['2', '4', '8']
    """
    centre = make_config(**given, mix="mixmask")
    most = centre.image_size // _CELL_PIXELS
    sizes = grid_sizes or sorted({*(g for g in GRID_SIZES if g <= most), centre.grid_size})
    for size in sizes:
        if not 2 <= size <= centre.image_size:
            raise ValueError(
                f"--grid-sizes must lie within 2 ... {centre.image_size}, the pixels per side of "
                f"a view, got {size}; leave it out, or raise --image-size"
            )
    factors: dict[str, Sequence[object]] = {
        "grid_size": sizes,
        "pattern": PATTERNS,
        "ratio": ratios,
        "switch": (True, False),
    }
    return [
        _mask_cell(dataclasses.replace(centre, **{field: value}), field)
        for field, values in factors.items()
        for value in dict.fromkeys(values)
    ]


def _mask_cell(config: RunConfig, field: str) -> Cell:
    switch = "switch" if config.switch else "no-switch"
    ratio = describe_value(config.ratio).replace("–", "-")
    name = f"grid-{config.grid_size}_{config.pattern}_ratio-{ratio}_{switch}"
    value = describe_value(getattr(config, field))
    return Cell(field.replace("_", " "), value, name, config)


def budget_cells(
    *,
    methods: Sequence[str] = BUDGET_METHODS,
    budgets: Sequence[int] = (),
    baseline_lr: float | None = None,
    **given: object,
) -> list[Cell]:
    """Lay out the paper's figure 5: each method at several budgets, without and with MixMask.

    Args:
        methods: Names of methods.
        budgets: Epochs of whole runs, each with a schedule of its own. Default: fifths of the
            epochs given, or of the recipe's, as 200 ... 1000 on CIFAR-100.
        baseline_lr: Learning rate of the runs without mixing. Default: that of the others.
        **given: Fields of the methods' configurations, which hold in all cells.

    Raises:
        ValueError: If an option is out of range or belongs to some of the methods only.

    Example:
        >>> cells = budget_cells(methods=["simclr"], data="cifar100")
        >>> [cell.config.epochs for cell in cells if cell.config.mix == "none"]
        [200, 400, 600, 800, 1000]
    """
    cells = []
    for method in dict.fromkeys(methods):
        whole = make_config(**given, method=method).epochs  # By the method's recipe.
        chosen = budgets or [max(1, round(whole * fifth / 5)) for fifth in range(1, 6)]
        for mix in ("none", "mixmask"):
            own = given if mix == "mixmask" or baseline_lr is None else given | {"lr": baseline_lr}
            for epochs in sorted(set(chosen)):
                config = make_config(**(own | {"method": method, "mix": mix, "epochs": epochs}))
                value = f"{describe_option('mix', mix)}, {plural(epochs, 'epoch')}"
                cells.append(Cell(method, value, f"{method}_{mix}_{epochs}-epochs", config))
    return cells


def plan_runs(cells: Sequence[Cell], seeds: int, out: Path) -> list[StudyRun]:
    """List a study's runs, a whole table for the first seed, then for the next.

    Those that have their last epoch, with an accuracy, have their rows.

    Args:
        cells: The study's cells; those of the same name are run once.
        seeds: How many seeds, 0 ... seeds - 1.
        out: The study's folder, which may hold some of the runs already.

    Raises:
        ValueError: If a folder holds something else than the run planned for it.
    """
    if not 1 <= seeds <= _MOST_SEEDS:
        bound = "at least 1" if seeds < 1 else f"at most {_MOST_SEEDS:,}"
        raise ValueError(f"--seeds must be {bound}, got {seeds}; the paper takes 3")
    configs = {cell.name: cell.config for cell in cells}
    runs = [
        StudyRun(out / name / f"seed-{seed}", dataclasses.replace(config, seed=seed))
        for seed in range(seeds)
        for name, config in configs.items()
    ]
    for run in runs:
        if run.folder.is_file() or (run.folder.exists() and any(run.folder.iterdir())):
            _check_options(run)
        # Only a whole run with an accuracy counts; others go on.
        rows = read_rows(run.folder) if (run.folder / METRICS).is_file() else []
        if rows and rows[-1]["epoch"] == run.config.epochs and "knn" in rows[-1]:
            run.rows = rows
    return runs


def check_images(runs: Sequence[StudyRun], data: ImageData) -> None:
    """Check that the runs that are there already were trained on a study's images.

    Raises:
        ValueError: If one was trained on others: its accuracy would be in the wrong table.
    """
    for run in runs:
        if (run.folder / CONFIG).exists():
            there, size = read_config(run.folder), run.config.image_size
            check_same(data, there, run.config.data, image_size=size, where=str(run.folder))


def _check_options(run: StudyRun) -> None:
    """Check that a folder's run has the planned options; else its accuracy is of another cell."""
    there = dataclasses.asdict(load_config(run.folder))
    for name, value in dataclasses.asdict(run.config).items():
        found = there.get(name)
        if name == "data":  # A run's own is an absolute path.
            value, found = Path(value).resolve(), Path(str(found)).resolve()
        if name not in _FREE and found != value:
            raise ValueError(
                f"{run.folder} holds a run with {describe_option(name, found)}, this "
                f"study has {describe_option(name, value)}; use the same, or another --out"
            )


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
            draw = _draw_factors if self.study == "masks" else _draw_budgets
            save_figure(draw(lines, self.runs, title), self.out / f"{self.study}.png")
        return text


def collect(cells: Sequence[Cell], runs: Sequence[StudyRun]) -> list[Line]:
    """Sort a study's runs into its table; those without an accuracy are left out."""
    lines = []
    for cell in cells:
        # Cells of several factors may share their runs: those of the setting that all vary.
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

    Below stands the error of an accuracy on so many test images.
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
    writer.writerow(["factor", "value", *_COLUMNS, "seeds", *numbers])
    for line in lines:
        measured: list[float | None] = []
        for measure in MEASURES:
            values = line.accuracies[measure]
            measured += mean_sd(values) if values else (None, None)
        options = [getattr(line.cell.config, name) for name in _COLUMNS]
        writer.writerow([line.cell.factor, line.cell.value, *options, line.seeds, *measured])
    return file.getvalue()


def _draw_budgets(lines: Sequence[Line], runs: Sequence[StudyRun], title: str) -> Figure:
    # Method -> measure -> mixture -> epochs -> accuracies.
    panels: dict[str, dict[str, dict[str, dict[int, list[float]]]]] = {}
    for line in lines:
        config = line.cell.config
        for name, values in line.accuracies.items():
            curves = panels.setdefault(config.method, {}).setdefault(name, {})
            curves.setdefault(describe_option("mix", config.mix), {})[config.epochs] = values
    return figure_budgets(panels, untrained=_mean_untrained(runs), title=title)


def _draw_factors(lines: Sequence[Line], runs: Sequence[StudyRun], title: str) -> Figure:
    # Factor -> value -> measure -> accuracies.
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for line in lines:
        panels.setdefault(line.cell.factor, {})[line.cell.value] = line.accuracies
    return figure_factors(panels, untrained=_mean_untrained(runs), title=title)


def _mean_untrained(runs: Sequence[StudyRun]) -> dict[str, float]:
    """Return the mean accuracies before training, 0 ... 1, by measure."""
    firsts = [run.rows[0] for run in runs if run.rows]
    return {
        name: statistics.fmean(row[name] for row in firsts if name in row)
        for name in MEASURES
        if any(name in row for row in firsts)
    }
