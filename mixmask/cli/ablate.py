"""`mixmask ablate`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmask.cli._console import say
from mixmask.cli._training import accuracy_monitor
from mixmask.cli.pretrain import add_option
from mixmask.runs.folder import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mixmask.data.sets import ImageData
    from mixmask.trainers.studies import Cell, Line, Outcome, Plan

# Options of a run that hold in all cells of a study.
_PASSED_ON = (
    "data", "recipe", "arch", "small_stem", "image_size", "grid_size", "epochs", "batch_size",
    "lr", "weight_decay", "precision", "monitor", "queue_size", "temperature",
)  # fmt: skip


def ablate(study: str, out: Path | None, seeds: int, **given: Any) -> None:
    """Run a study cell by cell, writing its table and figure after each."""
    from mixmask.data.sets import load_data
    from mixmask.trainers.studies import plan_runs, read_finished

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ablate trains in one process; start it without a launcher")
    cells = _cells(study, given)
    config = cells[0].config
    out = out or Path("runs") / f"ablate-{study}-{Path(config.data).name}"
    plans = plan_runs(cells, seeds, out)
    data = load_data(config.data, config.image_size, stream=config.stream)
    monitor = accuracy_monitor(data)
    if monitor is None:
        raise ValueError(
            f"--data {config.data} has no labels on both splits, and a study is a table of "
            "accuracies; use a folder with train and test folders, each with one folder a class"
        )
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {plan: done for plan in plans if (done := read_finished(plan))}
    say(
        f"{study}: {len(cells)} lines, {len(plans)} runs of which {len(outcomes)} are finished; "
        f"tables and figure in {out}"
    )
    report = _Report(study, out, data, cells)
    report.write(outcomes)
    _run_all(plans, outcomes, report, lambda plan: _carry_out(plan, data, monitor))
    say("\n" + report.markdown(outcomes))
    failed = [plan for plan, outcome in outcomes.items() if outcome.error]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plans)} runs failed, {failed[0].label} the first "
            f"({outcomes[failed[0]].error}); the same command tries them again"
        )


def _carry_out(plan: Plan, data: ImageData, monitor: Any) -> Outcome:
    from mixmask.trainers.studies import carry_out

    return carry_out(plan, data.train.images, monitor)


def _run_all(
    plans: Sequence[Plan],
    outcomes: dict[Plan, Outcome],
    report: _Report,
    run: Callable[[Plan], Outcome],
) -> None:
    """Run what is missing, a line each, and keep table and figure up to date."""
    remaining = [plan for plan in plans if plan not in outcomes]
    rates: list[float] = []
    width = len(str(len(plans)))
    for number, plan in enumerate(remaining, start=1 + len(plans) - len(remaining)):
        say(f"[{number:>{width}}/{len(plans)}] {plan.label} … ", end="")
        began = time.perf_counter()
        outcome = outcomes[plan] = run(plan)
        minutes = (time.perf_counter() - began) / 60
        report.write(outcomes)
        if outcome.error:
            say(f"failed: {outcome.error}")
            continue
        rates.append(minutes / plan.config.epochs)
        left = sum(p.config.epochs for p in plans if p not in outcomes) * statistics.mean(rates)
        measured = ", ".join(
            f"{label} {100 * value:.1f} %"
            for name, label in (("knn", "kNN"), ("linear", "linear"))
            if (value := outcome.last(name)) is not None
        )
        say(f"{measured} ({minutes:.1f} min, about {left:.0f} min to go)")


def _cells(study: str, given: dict[str, Any]) -> list[Cell]:
    """Lay out the study, refusing options of the other one."""
    from mixmask.trainers.studies import budget_cells, mask_cells

    own = {"masks": ("grid_sizes", "ratios"), "budgets": ("budgets", "baseline_lr")}
    for other, names in own.items():
        for name in names:
            if other != study and name in given:
                raise ValueError(
                    f"--{name.replace('_', '-')} belongs to --study {other}, got --study {study}; "
                    "leave it out"
                )
    if study == "budgets":
        return budget_cells(**given)
    methods = given.pop("methods", ["moco-v2"])
    if len(methods) > 1:
        raise ValueError(
            f"--study masks takes one of --methods, got {' '.join(methods)}; run it once for each, "
            "with an --out of its own"
        )
    return mask_cells(method=methods[0], **given)


@dataclasses.dataclass(frozen=True)
class _Report:
    """The files of a study: a table as Markdown and CSV, and a figure."""

    study: str
    out: Path
    data: ImageData
    cells: Sequence[Cell]

    @property
    def title(self) -> str:
        config = self.cells[0].config
        arch = f"{config.arch} at {config.image_size} px"
        if self.study == "budgets":
            return f"{config.data}, {arch}"
        return f"{config.method} + mixmask on {config.data}, {arch}, {config.epochs} epochs"

    def markdown(self, outcomes: dict[Plan, Outcome]) -> str:
        from mixmask.trainers.studies import collect, markdown

        assert self.data.test is not None
        lines = collect(self.cells, outcomes)
        return markdown(lines, title=self.title, test_images=len(self.data.test.images))

    def write(self, outcomes: dict[Plan, Outcome]) -> None:
        from mixmask.figures.style import save_figure
        from mixmask.trainers.studies import collect, table_csv

        lines = collect(self.cells, outcomes)
        write_text(self.out / f"{self.study}.md", self.markdown(outcomes))
        write_text(self.out / f"{self.study}.csv", table_csv(lines))
        if any(line.accuracies["knn"] for line in lines):
            save_figure(self._figure(lines, outcomes), self.out / f"{self.study}.png")

    def _figure(self, lines: Sequence[Line], outcomes: dict[Plan, Outcome]) -> Figure:
        from mixmask.figures.runs import figure_budgets, figure_factors
        from mixmask.runs.records import describe_option
        from mixmask.trainers.studies import MEASURES

        panels: dict[str, Any] = {}
        if self.study == "budgets":
            for line in lines:
                config = line.cell.config
                for name, values in line.accuracies.items():
                    curves = panels.setdefault(config.method, {}).setdefault(name, {})
                    curve = curves.setdefault(describe_option("mix", config.mix), {})
                    curve[config.epochs] = values
            return figure_budgets(panels, title=self.title)
        for line in lines:
            panels.setdefault(line.cell.factor, {})[line.cell.value] = line.accuracies
        firsts = [outcome.rows[0] for outcome in outcomes.values() if outcome.rows]
        untrained = {
            name: statistics.fmean(row[name] for row in firsts if name in row)
            for name in MEASURES
            if any(name in row for row in firsts)
        }
        return figure_factors(panels, untrained=untrained, title=self.title)


def _ratio(text: str) -> float | tuple[float, float]:
    """Read a ratio: `0.5`, or a range such as `0.25-0.75`."""
    try:
        bounds = [float(part) for part in text.split("-")]
    except ValueError:
        bounds = []
    if len(bounds) == 1:
        return bounds[0]
    if len(bounds) == 2:
        return bounds[0], bounds[1]
    raise argparse.ArgumentTypeError(f"{text!r} is no ratio; write 0.5, or 0.25-0.75 for a range")


def add_ablate(commands: Any) -> None:
    """Add `ablate`."""
    from mixmask.trainers.config import RunConfig
    from mixmask.trainers.methods import METHODS
    from mixmask.trainers.studies import BUDGET_METHODS

    parser = commands.add_parser(
        "ablate",
        help="run a study: many small runs, their table and figure",
        description="Run a study over seeds. masks is the paper's table 1: grid size, pattern, "
        "ratio and switch, each varied while the others stay as the recipe has them. budgets is "
        "its figure 5: methods at several numbers of epochs, without and with MixMask. Each run "
        "is a folder below --out; the same command goes on with what was interrupted, and more "
        "seeds or values add to what is there.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=ablate, study="masks", out=None, seeds=3)
    parser.add_argument("--study", choices=("masks", "budgets"), help="which one [masks]")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="the study's folder, new or begun [runs/ablate-STUDY-DATA]",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each cell [3]")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), metavar="NAME",
        help=f"one for masks [moco-v2], several for budgets [{' '.join(BUDGET_METHODS)}]",
    )  # fmt: skip
    parser.add_argument(
        "--grid-sizes", type=int, nargs="+", metavar="N",
        help="masks: cells a side [the paper's that suit the size of a view]",
    )  # fmt: skip
    parser.add_argument(
        "--ratios", type=_ratio, nargs="+", metavar="R",
        help="masks: shares of own pixels, or ranges [0.5 0.25-0.75 0-1]",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=int, nargs="+", metavar="N",
        help="budgets: epochs of whole runs [fifths of --epochs]",
    )  # fmt: skip
    parser.add_argument(
        "--baseline-lr", type=float, metavar="LR",
        help="budgets: learning rate without mixing, tuned by itself [as --lr]",
    )  # fmt: skip
    for name in _PASSED_ON:
        owners = {
            method: entry.config.__dataclass_fields__[name]
            for method, entry in METHODS.items()
            if name in entry.config.__dataclass_fields__
        }
        shared = RunConfig.__dataclass_fields__.get(name)
        add_option(parser, shared or next(iter(owners.values())), () if shared else tuple(owners))
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to use")
