"""Studies: a grid of runs over seeds, each with its run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask._checks import Ratio
from mixmask.data.sets import Images
from mixmask.runs.folder import METRICS, Row, has_checkpoint, read_rows
from mixmask.runs.records import describe_option, describe_value, plural
from mixmask.trainers.config import RunConfig
from mixmask.trainers.loop import Monitor, pretrain
from mixmask.trainers.methods import load_config, make_config

# The values of the paper's table 1 and the methods of its figure 5.
GRID_SIZES = (2, 4, 8, 16, 32, 48)
RATIOS: tuple[Ratio, ...] = (0.5, (0.25, 0.75), (0.0, 1.0))
BUDGET_METHODS = ("moco-v2", "simclr", "simsiam")
MEASURES = ("knn", "linear")
# A cell of the mask is at least this many pixels wide, as in the paper: 8 at 32 px, 16 at 64 px.
_CELL_PIXELS = 4
# Options that change no weights.
_FREE = ("stream", "workers", "save_every", "save_minutes", "keep")
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

    def train(self, images: Images, monitor: Monitor) -> None:
        """Train to the end, from the checkpoint if there is one, and keep the rows or the error.

        Args:
            images: (N, 3, H, W) uint8, or a folder's.
            monitor: As for `pretrain`; it measures "knn" and, at the end, "linear".

        Raises:
            KeyboardInterrupt: If the run was interrupted, once it is saved.
        """
        self.error, begun = "", has_checkpoint(self.folder)
        try:
            _, self.rows = pretrain(
                self.config, images, self.folder, monitor=monitor, resume=begun, progress=False
            )
        except _FAILURES as error:
            self.error = " ".join(str(error).split()) or type(error).__name__


def mask_cells(
    *, grid_sizes: Sequence[int] = (), ratios: Sequence[Ratio] = RATIOS, **given: Any
) -> list[Cell]:
    """Lay out the paper's table 1: each factor varied, the others at the recipe's values.

    The recipe's pattern, ratio and switch are the paper's best, and its grid is the best one at
    that size of image. The setting that all factors share is one run a seed.

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
    ratio = describe_value(config.ratio).replace("–", "-")
    name = f"grid-{config.grid_size}_{config.pattern}_ratio-{ratio}_{switch}"
    value = describe_value(getattr(config, field))
    return Cell(field.replace("_", " "), value, name, config)


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
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}; the paper takes 3")
    configs = {cell.name: cell.config for cell in cells}
    runs = [
        StudyRun(out / name / f"seed-{seed}", dataclasses.replace(config, seed=seed))
        for seed in range(seeds)
        for name, config in configs.items()
    ]
    for run in runs:
        if run.folder.exists() and not (run.folder.is_dir() and not any(run.folder.iterdir())):
            _check_options(run)
        rows = read_rows(run.folder) if (run.folder / METRICS).is_file() else []
        if rows and rows[-1]["epoch"] == run.config.epochs and "knn" in rows[-1]:
            run.rows = rows
    return runs


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
