"""Cells of the evidence: what a plan's file stands for, and which results there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT

# Raised when a change alters what the runs draw: only cells of one version are compared.
RECIPE_VERSION = 1

Record = dict[str, Any]

# Seconds per forward pass of 10,000 images by `narrow` at 32 px on one core; a backward pass
# costs two of them. Finished cells correct the estimate.
_PASS_SECONDS = 2.0
_WEIGHTS = {"narrow": 1.0, "medium": 2.6}
# Forward passes per image of a step, as the passes with a gradient and those without one.
_PLAIN_COST = {"moco-v2": 4, "simclr": 6, "simsiam": 6, "byol": 8}


@dataclass(frozen=True)
class Cell:
    """One run: everything that its result follows from.

    Attributes:
        data: "cifar100", "imagenette" or "clothing64".
        images: How many training images, the first ones; None for all.
        split: "test", or "validation": training images behind those that are trained on.
        arch: The backbone.
        method: The method's name, as the trainers spell it.
        arm: What the plan calls the mixture and its options, for instance "block grid 2".
        options: All other options of the run.
        lr: Learning rate; "best" stands for the validated one, None for the recipe's.
        epochs: Length of the schedule.
        seed: Seed of everything that is drawn.
        code: Whose training code runs, "mixmask" or "lightly".
    """

    data: str
    images: int | None
    split: str
    arch: str
    method: str
    arm: str
    options: dict[str, Any]
    lr: float | str | None
    epochs: int
    seed: int
    code: str = "mixmask"

    @property
    def name(self) -> str:
        """The name of its file: what distinguishes it from the other cells of a plan."""
        size = self.options.get("image_size", 32)
        parts = [
            f"{self.data}-{size}px-{self.arch}",
            self.method if self.code == "mixmask" else f"{self.method}-of-{self.code}",
            re.sub(r"[^a-z0-9]+", "-", self.arm.lower()).strip("-"),
            f"lr-{'own' if self.lr is None else self.lr}",
            f"{self.epochs}-epochs",
            *([self.split] if self.split != "test" else []),
            f"seed-{self.seed}",
        ]
        return "_".join(parts)

    @property
    def mixes(self) -> bool:
        """On which side it stands: with a mixed view, or without."""
        return bool(self.options["mix"] != "none")

    @property
    def resolved(self) -> bool:
        """Whether its learning rate is known."""
        return self.lr != "best"

    def config_options(self) -> dict[str, Any]:
        """Return the options for `make_config`."""
        own = {name: getattr(self, name) for name in ("data", "arch", "method", "epochs", "seed")}
        return {**own, **self.options, **({} if self.lr is None else {"lr": self.lr})}

    def estimate(self) -> float:
        """Guess the seconds that it takes on one core, evaluation included."""
        size = self.options.get("image_size", 32)
        mixed = self.options.get("mixed_size") or size
        cost: float = _PLAIN_COST.get(self.method, 6)
        if self.mixes:
            views = 2 if self.options["mix"] == "both" else 1
            cost += 3 * views * (mixed / size) ** 2 / self.options.get("mix_every", 1)
            cost -= 3 * self.options.get("replace_clean", False)
        images = self.images or {"imagenette": 9469, "clothing64": 3409}.get(self.data, 50_000)
        work = _PASS_SECONDS * _WEIGHTS.get(self.arch, 4.0) * (size / 32) ** 2
        seconds: float = self.epochs * images / 10_000 * cost * work + 120
        return seconds


@dataclass(frozen=True)
class Part:
    """A part of a plan: an experiment, whose cells later parts may share.

    Attributes:
        name: One word.
        about: The question.
        cells: Its runs.
        plots: Which plots show it; see `evidence_plots`.
        paper: What is published for each arm.
    """

    name: str
    about: str
    cells: tuple[Cell, ...]
    plots: tuple[str, ...]
    paper: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What a plan's file says, its cells in the order of their priority."""

    name: str
    about: str
    parts: tuple[Part, ...]

    @property
    def cells(self) -> dict[str, Cell]:
        """All cells by name, each once."""
        return {cell.name: cell for part in self.parts for cell in part.cells}

    def find(self, name: str) -> Cell:
        """Return a cell by its name.

        Raises:
            ValueError: If there is none.
        """
        cells = self.cells
        if name not in cells:
            near = ", ".join(get_close_matches(name, cells, 3, 0.3))
            raise ValueError(f"plan {self.name} has no cell {name}; nearest names: {near}")
        return cells[name]

    def select(self, part: str | None) -> Plan:
        """Return the plan with one of its parts alone, by its number or its name.

        Raises:
            ValueError: If there is no such part.
        """
        if part is None:
            return self
        found = [p for i, p in enumerate(self.parts, 1) if part in (str(i), p.name)]
        if not found:
            known = ", ".join(f"{i} ({p.name})" for i, p in enumerate(self.parts, 1))
            raise ValueError(f"--part must be one of {known}; got {part}")
        return replace(self, parts=tuple(found))


def load_plan(name: str) -> Plan:
    """Read a plan by the name of its file in plans/, or by its path.

    The file holds `settings` by data and method, `arms` by name, and `parts`. A part has `groups`,
    each of which stands for all combinations of its `arms`, `epochs`, `lr` and `seeds`.

    Raises:
        ValueError: If there is no such plan.
    """
    path = Path(name) if name.endswith(".json") else ROOT / "plans" / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "plans").glob("*.json")))
        raise ValueError(f"--plan must be one of {known}, or a JSON file; got {name}")
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = tuple(
        Part(
            part["name"],
            part["about"],
            tuple(cell for group in part["groups"] for cell in _expand(group, content)),
            tuple(part.get("plots", ())),
            part.get("paper", {}),
        )
        for part in content["parts"]
    )
    return Plan(path.stem, content["about"], parts)


def _expand(group: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield the cells of a group, a whole comparison for each seed."""
    fixed = {"data": "cifar100", "arch": "narrow", "method": "moco-v2", "split": "test"}
    fixed |= {key: group[key] for key in (*fixed, "code") if key in group}
    setting = content["settings"].get(f"{fixed['data']}/{fixed['method']}", {})
    images = group.get("images", content["images"].get(fixed["data"]))
    rates = group.get("lr", ["best"])
    for seed in group["seeds"]:
        for epochs in group["epochs"]:
            for arm in group["arms"]:
                options = {**setting, **content["arms"][arm], **group.get("options", {})}
                for lr in rates:
                    yield Cell(
                        **fixed, images=images, arm=arm, options=options, lr=lr, epochs=epochs,
                        seed=seed,
                    )  # fmt: skip


def read_results(folder: Path) -> dict[str, Record]:
    """Read the results of this version of the recipe, by the names of their cells."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["recipe_version"] == RECIPE_VERSION:
            found[path.stem] = record
    return found


def is_done(cell: Cell, results: Mapping[str, Record]) -> bool:
    """Tell whether there is a result of a cell, with just its options."""
    record = results.get(cell.name)
    # Through JSON, which knows no tuples.
    return record is not None and record["cell"] == json.loads(json.dumps(asdict(cell)))


def resolve(plan: Plan, results: Mapping[str, Record]) -> Plan:
    """Put the best learning rates in, where all cells that decide about them are done.

    A rate is that of the highest kNN and linear accuracy, on average, among the validation cells
    of the same method and side.
    """
    rates: dict[tuple[str, bool], float | str | None] = {}
    validated = [cell for cell in plan.cells.values() if cell.split == "validation"]
    for method, mixes in dict.fromkeys((cell.method, cell.mixes) for cell in validated):
        own = [cell for cell in validated if (cell.method, cell.mixes) == (method, mixes)]
        if all(is_done(cell, results) for cell in own):
            rates[method, mixes] = max(own, key=lambda cell: _score(results[cell.name])).lr

    def fill(cell: Cell) -> Cell:
        if cell.resolved:
            return cell
        return replace(cell, lr=rates.get((cell.method, cell.mixes), "best"))

    parts = (replace(part, cells=tuple(map(fill, part.cells))) for part in plan.parts)
    return replace(plan, parts=tuple(parts))


def resolve_within(plan: Plan, whole: Plan, results: Mapping[str, Record]) -> Plan:
    """Put the whole plan's learning rates into a part of it."""
    names = {part.name for part in plan.parts}
    rated = resolve(whole, results)
    return Plan(plan.name, plan.about, tuple(part for part in rated.parts if part.name in names))


def _score(record: Record) -> float:
    """Return what a learning rate is chosen by; a run that has failed loses."""
    final = record["final"]
    return -1.0 if final is None else (final["knn"] + final["linear"]) / 2


def pace(plan: Plan, results: Mapping[str, Record]) -> float:
    """Return by how much finished cells took longer than their estimates, at the median."""
    ratios = [
        results[cell.name]["busy_seconds"] / cell.estimate()
        for cell in plan.cells.values()
        if is_done(cell, results) and results[cell.name]["final"] is not None
    ]
    return median(ratios) if ratios else 1.0


def missing(part: Part, results: Mapping[str, Record]) -> list[Cell]:
    """Return the cells of a part that have no result, each once."""
    cells = {cell.name: cell for cell in part.cells if not is_done(cell, results)}
    return list(cells.values())


def next_cells(
    plan: Plan, results: Mapping[str, Record], begun: Sequence[str], busy: Sequence[str]
) -> Iterator[Cell]:
    """Yield the cells that can start now, in the order in which they should.

    Parts come in their order. Within one, cells that were begun come first, then long ones, so
    that the end of a window finds short ones to fill it.
    """
    for part in plan.parts:
        waiting = [cell for cell in missing(part, results) if cell.resolved]
        for cell in sorted(waiting, key=lambda cell: (cell.name not in begun, -cell.estimate())):
            if cell.name not in busy:
                yield cell
