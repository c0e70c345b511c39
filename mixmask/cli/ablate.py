"""`mixmask ablate`."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from mixmask.cli._console import say
from mixmask.cli.options import RatioAction, add_shared
from mixmask.cli.pretrain import add_run_fields
from mixmask.data.sets import ImageData, load_data
from mixmask.evaluation.monitor import accuracy_monitor
from mixmask.runs.options import Options
from mixmask.runs.records import plural
from mixmask.trainers import studies
from mixmask.trainers.loop import Monitor
from mixmask.trainers.methods import METHODS
from mixmask.trainers.processes import start_processes
from mixmask.trainers.studies import Cell, Report

# Options of a run that hold in all cells of a study.
_PASSED_ON = (
    "data", "recipe", "arch", "small_stem", "image_size", "grid_size", "epochs", "batch_size",
    "lr", "weight_decay", "precision", "measure_every", "queue_size", "temperature",
)  # fmt: skip
# Options of one of the studies.
_OWN = {
    "masks": {"grid_sizes": "--grid-sizes", "ratios": "--ratio"},
    "budgets": {"budgets": "--budgets", "baseline_lr": "--baseline-lr"},
}


def run_study(
    study: str, out: Path | None, seeds: int, device: str | None = None, **given: object
) -> None:
    """Run a study cell by cell, writing its table and figure after each."""
    cells = _cells(study, given)
    try:
        start_processes(device)
        _run_study(study, out, seeds, cells)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues the study") from None


def _run_study(study: str, out: Path | None, seeds: int, cells: list[Cell]) -> None:
    config = cells[0].config
    out = out or Path("runs") / f"ablate-{study}-{Path(config.data).name}"
    runs = studies.plan_runs(cells, seeds, out)
    data = load_data(config.data, config.image_size, stream=config.stream)
    monitor = accuracy_monitor(data, config.image_size)
    if monitor is None:
        raise ValueError(
            f"--data {config.data} has no labels on both splits, and a study is a table of "
            "accuracies; use a folder with train and test folders, each with one folder per class"
        )
    assert data.test is not None
    studies.check_images(runs, data)
    out.mkdir(parents=True, exist_ok=True)
    say(
        f"{study}: {plural(len(cells), 'line')}, {plural(len(runs), 'run')} "
        f"({sum(bool(run.rows) for run in runs)} finished); tables and figure in {out}"
    )
    # Before the first run, so that a place that cannot be written costs no training.
    report = Report(study, out, cells, runs, len(data.test.images))
    report.write()
    _train_all(report, data, monitor)
    say("\n" + report.write())
    if failed := [run for run in runs if run.error]:
        raise ValueError(
            f"{len(failed)} of {plural(len(runs), 'run')} failed, {failed[0].label} the first "
            f"({failed[0].error}); the same command tries them again"
        )


def _train_all(report: Report, data: ImageData, monitor: Monitor) -> None:
    """Train the runs that are missing, print a line each, and keep table and figure up to date."""
    runs = report.runs
    remaining = [run for run in runs if not run.rows]
    rates: list[float] = []  # Minutes per epoch, of the runs that this call has trained.
    width = len(str(len(runs)))
    for number, run in enumerate(remaining):
        place = len(runs) - len(remaining) + number + 1
        say(f"[{place:>{width}}/{len(runs)}] {run.label} … ", end="")
        began = time.perf_counter()
        run.train(data, monitor)
        minutes = (time.perf_counter() - began) / 60
        report.write()
        if run.error:
            say(f"failed: {run.error}")
            continue
        rates.append(minutes / run.config.epochs)
        left = sum(r.config.epochs for r in remaining[number + 1 :]) * statistics.mean(rates)
        measured = ", ".join(
            f"{label} {100 * value:.1f} %"
            for name, label in (("knn", "kNN"), ("linear", "linear"))
            if (value := run.last(name)) is not None
        )
        say(f"{measured} ({minutes:.1f} min, about {left:.0f} min to go)")


def _cells(study: str, given: Options) -> list[Cell]:
    """Lay out the study; options of the other one are an error."""
    for other, options in _OWN.items():
        for name, option in options.items():
            if other != study and name in given:
                raise ValueError(
                    f"{option} belongs to --study {other}, got --study {study}; leave it out"
                )
    if study == "budgets":
        return studies.budget_cells(**given)
    methods = given.pop("methods", ["moco-v2"])
    if len(methods) > 1:
        raise ValueError(
            f"--study masks takes one of --methods, got {' '.join(methods)}; run it once per "
            "method, each with its own --out"
        )
    return studies.mask_cells(method=methods[0], **given)


def add_ablate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ablate`."""
    parser.description = (
        "Run a study over seeds. masks: the paper's table 1, in which grid size, pattern, ratio "
        "and switch vary one at a time. budgets: its figure 5, methods at several numbers of "
        "epochs, without and with MixMask. Each run is a folder in --out; the same command "
        "continues an interrupted study, and more seeds or values add to it."
    )
    parser.set_defaults(command=run_study, study="masks", out=None, seeds=3)
    parser.add_argument("--study", choices=("masks", "budgets"), help="which study [masks]")
    add_shared(parser, "--out", metavar="DIR", help="the study's folder [runs/ablate-STUDY-DATA]")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs per cell [3]")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), metavar="NAME",
        help=f"one for masks [moco-v2], several for budgets [{' '.join(studies.BUDGET_METHODS)}]",
    )  # fmt: skip
    for name, text in (
        ("--grid-sizes", "masks: cells per side [the paper's that suit the size of a view]"),
        ("--budgets", "budgets: epochs of whole runs [fifths of --epochs]"),
    ):
        parser.add_argument(name, type=int, nargs="+", metavar="N", help=text)
    parser.add_argument(
        "--ratio", dest="ratios", type=float, nargs="+", action=RatioAction, const=True,
        metavar="SHARE",
        help="masks: share of own pixels, or two numbers for a range; repeat the option for "
        "several [--ratio 0.5 --ratio 0.25 0.75 --ratio 0 1]",
    )  # fmt: skip
    parser.add_argument(
        "--baseline-lr", type=float, metavar="LR",
        help="budgets: learning rate without mixing, tuned separately [as --lr]",
    )  # fmt: skip
    add_run_fields(parser, only=_PASSED_ON)
    add_shared(parser, "--device", "--threads")
