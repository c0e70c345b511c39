"""Studies: a grid of runs over seeds, each a run folder, and their table."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.data.sets import Images
from mixmask.runs.folder import METRICS, Row, has_checkpoint, read_rows
from mixmask.runs.records import describe_option, mean_sd, percent
from mixmask.trainers.config import RunConfig
from mixmask.trainers.loop import Monitor, pretrain
from mixmask.trainers.methods import load_config, make_config

Ratio = float | tuple[float, float]

# The values of the paper's table 1 and the methods of its figure 5.
GRID_SIZES = (2, 4, 8, 16, 32, 48)
RATIOS: tuple[Ratio, ...] = (0.5, (0.25, 0.75), (0.0, 1.0))
BUDGET_METHODS = ("moco-v2", "simclr", "simsiam")
MEASURES = ("knn", "linear")
# A cell of the mask is at least this many pixels wide, as in the paper: 8 at 32 px, 16 at 64 px.
_CELL_PIXELS = 4
# What a run that cannot go on raises; the other runs of a study can.
_FAILURES = (ValueError, ArithmeticError, RuntimeError, OSError, MemoryError)


@dataclass(frozen=True)
class Cell:
    """A setting of a study, run with several seeds.

    Attributes:
        factor: What varies, a heading of the table.
        value: Its value here.
        name: The folder of its runs; cells of several factors may share one.
        config: The options of its runs, but for the seed.
    """

    factor: str
    value: str
    name: str
    config: RunConfig


@dataclass(frozen=True)
class Plan:
    """One run of a study: its folder and its options."""

    folder: Path
    config: RunConfig

    @property
    def label(self) -> str:
        """What a line on the console calls it."""
        return f"{self.folder.parent.name}, seed {self.config.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its rows, or why it has none."""

    rows: list[Row]
    error: str = ""

    def last(self, measure: str) -> float | None:
        """Return an accuracy at the last epoch, 0 ... 1."""
        return self.rows[-1].get(measure) if self.rows else None


@dataclass(frozen=True)
class Line:
    """A line of a study's table: a cell, and of each measure one accuracy a seed."""

    cell: Cell
    accuracies: dict[str, list[float]]
    errors: tuple[str, ...] = ()


def mask_cells(
    *, grid_sizes: Sequence[int] = (), ratios: Sequence[Ratio] = RATIOS, **given: Any
) -> list[Cell]:
    """Lay out the paper's table 1: each factor varied, the others at the recipe's values.

    The recipe's pattern, ratio and switch are the paper's best, and its grid is the best one at
    that size of image. The setting that all factors share is one run a seed.

    Args:
        grid_sizes: Cells along a side. Default: the paper's that leave a cell 4 pixels, and
            the recipe's own.
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
                f"--grid-sizes must lie within 2 ... {centre.image_size}, the pixels along a "
                f"side of a view, got {size}; leave it out, or raise --image-size"
            )
    factors: dict[str, Sequence[Any]] = {
        "grid_size": sizes,
        "pattern": ("block", "discrete"),
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
    ratio = describe_option("ratio", config.ratio).replace(" ", "-").replace("–", "-")
    name = f"grid-{config.grid_size}_{config.pattern}_{ratio}_{switch}"
    value = getattr(config, field)
    if isinstance(value, bool):
        text = "on" if value else "off"
    else:
        text = describe_option("", value).strip()
    return Cell(field.replace("_", " "), text, name, config)


def budget_cells(
    *,
    methods: Sequence[str] = BUDGET_METHODS,
    budgets: Sequence[int] = (),
    baseline_lr: float | None = None,
    **given: Any,
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
        whole = make_config(**given, method=method).epochs
        chosen = budgets or [max(1, round(whole * fifth / 5)) for fifth in range(1, 6)]
        for mix in ("none", "mixmask"):
            own = given if mix == "mixmask" or baseline_lr is None else given | {"lr": baseline_lr}
            for epochs in sorted(set(chosen)):
                config = make_config(**(own | {"method": method, "mix": mix, "epochs": epochs}))
                value = f"{describe_option('mix', mix)}, {epochs} epoch{'s' * (epochs != 1)}"
                cells.append(Cell(method, value, f"{method}_{mix}_{epochs}-epochs", config))
    return cells


def plan_runs(cells: Sequence[Cell], seeds: int, out: Path) -> list[Plan]:
    """List a study's runs, a whole table for the first seed, then for the next.

    Args:
        cells: The study's cells; those of the same name are run once.
        seeds: How many seeds, 0 ... seeds - 1.
        out: The study's folder, which may hold some of the runs already.

    Raises:
        ValueError: If a folder holds something else than the run planned for it.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}; the paper takes 3")
    configs = {cell.name: cell.config for cell in cells}
    plans = [
        Plan(out / name / f"seed-{seed}", dataclasses.replace(config, seed=seed))
        for seed in range(seeds)
        for name, config in configs.items()
    ]
    for plan in plans:
        _check_folder(plan)
    return plans


def _check_folder(plan: Plan) -> None:
    """Refuse a folder whose run has other options: its accuracy would stand for another cell."""
    if not plan.folder.exists() or (plan.folder.is_dir() and not any(plan.folder.iterdir())):
        return
    there = dataclasses.asdict(load_config(plan.folder / "config.json"))
    for name, value in dataclasses.asdict(plan.config).items():
        if there.get(name) != value:
            raise ValueError(
                f"{plan.folder} holds a run with {describe_option(name, there.get(name))}, this "
                f"study has {describe_option(name, value)}; ask for the same, or name another --out"
            )


def read_finished(plan: Plan) -> Outcome | None:
    """Read a run that has its last epoch, with an accuracy; None for any other."""
    rows = read_rows(plan.folder) if (plan.folder / METRICS).is_file() else []
    if rows and rows[-1]["epoch"] == plan.config.epochs and "knn" in rows[-1]:
        return Outcome(rows)
    return None


def carry_out(plan: Plan, images: Images, monitor: Monitor) -> Outcome:
    """Train a run of a study, from its checkpoint where it has one.

    Args:
        plan: The run.
        images: (N, 3, H, W) uint8, or a folder's.
        monitor: As for `pretrain`; it measures "knn" and, at the end, "linear".

    Returns:
        Its rows, or in one line why it failed.

    Raises:
        KeyboardInterrupt: If the run was interrupted, once it is saved.
    """
    begun = has_checkpoint(plan.folder)
    try:
        _, rows = pretrain(
            plan.config, images, plan.folder, monitor=monitor, resume=begun, progress=False
        )
    except _FAILURES as error:
        return Outcome([], " ".join(str(error).split()) or type(error).__name__)
    return Outcome(rows)


def collect(cells: Sequence[Cell], outcomes: Mapping[Plan, Outcome]) -> list[Line]:
    """Lay a study's outcomes into its table; runs that are not there yet are left out."""
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


def markdown(lines: Sequence[Line], *, title: str, test_images: int) -> str:
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
    """Write a study's table as CSV: a line a cell, with accuracies of 0 ... 1."""
    options = ("method", "mix", "grid_size", "pattern", "ratio", "switch", "epochs", "lr")
    numbers = [f"{measure}_{kind}" for measure in MEASURES for kind in ("mean", "sd")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["factor", "value", *options, "seeds", *numbers])
    for line in lines:
        config = dataclasses.asdict(line.cell.config)
        found: list[float | None] = []
        for measure in MEASURES:
            values = line.accuracies[measure]
            found += mean_sd(values) if values else (None, None)
        chosen = [config[name] for name in options]
        writer.writerow([line.cell.factor, line.cell.value, *chosen, _seeds(line), *found])
    return file.getvalue()


def _seeds(line: Line) -> int:
    return len(line.accuracies["knn"])


def _error(lines: Sequence[Line], test_images: int) -> str:
    """Say how far an accuracy is off for the choice of test images alone."""
    values = [value for line in lines for value in line.accuracies["knn"]]
    if not values:
        return ""
    mean = sum(values) / len(values)
    error = 100 * math.sqrt(mean * (1 - mean) / test_images)
    return (
        f" On {test_images:,} test images, an accuracy by itself has a standard error of about "
        f"{error:.1f} points; differences of that size tell nothing."
    )
