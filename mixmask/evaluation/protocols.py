"""Measuring a backbone by a protocol, and one record of the results for all protocols."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from mixmask._version import __version__
from mixmask.evaluation.classifier import FineTuning, LinearSGD
from mixmask.evaluation.linear import Linear
from mixmask.evaluation.metrics import Accuracy, measure_accuracy
from mixmask.evaluation.neighbours import KNN
from mixmask.evaluation.tasks import BackboneSource, Details, Task
from mixmask.figures.features import figure_confusion
from mixmask.figures.style import short_path, write_figure
from mixmask.runs.files import atomic_write, check_readable, make_folder

# Each holds its options, a `name`, and `measure(task, progress)`.
Protocol = KNN | Linear | LinearSGD | FineTuning


@dataclass(frozen=True, repr=False)
class Result:
    """How well a backbone did on the test images, and under which circumstances."""

    protocol: Protocol
    source: BackboneSource
    details: Details
    accuracy: Accuracy
    classes: tuple[str, ...]
    seconds: float
    device: str
    date: str  # In UTC, ISO 8601.

    def __repr__(self) -> str:
        return f"Result({', '.join(self._title().splitlines())})"

    def to_json(self) -> dict[str, object]:
        """Return what the JSON file holds."""
        return {
            **_circumstances(self.protocol, self.source),
            "n_test": int(self.accuracy.confusion.sum()),
            **self.details,  # Of an option that depends on the images, what was used.
            "seconds": round(self.seconds, 2),
            "device": self.device,
            "date": self.date,
            **self.accuracy.to_json(self.classes),
        }

    def _title(self) -> str:
        """Say in the figure whose accuracy it is, on what."""
        source, images = self.source, int(self.accuracy.confusion.sum())
        low, high = self.accuracy.intervals()["top1"]
        return (
            f"{source.title}, {self.protocol.name} on {short_path(source.data)}\n"
            f"top-1 {self.accuracy.top1:.1%} (95 %: {low:.1%} ... {high:.1%}), "
            f"n = {images:,} test images"
        )

    def write(self, folder: Path | str, *, force: bool = False) -> Path:
        """Write the JSON file, see `results_file`, and the confusion matrix as PNG beside it."""
        make_folder(folder := Path(folder))
        path = results_file(self.protocol, self.source, folder, force=force)
        with atomic_write(path, path.with_suffix(".png")) as (text, picture):
            content = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
            # As `write_text` writes names that are not UTF-8.
            text.write_text(content + "\n", encoding="utf-8", errors="backslashreplace")
            figure = figure_confusion(self.accuracy.confusion, self.classes, title=self._title())
            write_figure(figure, picture)
        return path


def results_file(
    protocol: Protocol, source: BackboneSource, folder: Path | str, *, force: bool = False
) -> Path:
    """Name the JSON file of an evaluation, in which no other one's results must lie.

    Its name tells the protocol with the options that are not at their defaults, the data, the size
    of views, how far an unfinished run had come and, outside of the run's own folder, the run:
    `evaluate-knn_k-5_clothing64_32px_epoch-10-of-28.json`.

    Raises:
        ValueError: If the file holds something else than this evaluation of the same weights by
            the same versions, and is not to be replaced by `force`.
    """
    run, folder = Path(source.checkpoint), Path(folder)
    parts = [protocol.label, Path(source.data).name, f"{source.image_size}px"]
    if source.unfinished:
        parts.append(f"epoch-{source.epoch}-of-{source.planned_epochs}")
    if not run.is_dir():
        parts.append(run.stem)
    elif run.resolve() != folder.resolve():
        parts.append(run.resolve().name)
    name = re.sub(r"[^\w.-]+", "-", "_".join(parts))
    path = folder / f"evaluate-{name}.json"
    if force or not path.exists():
        return path
    check_readable(path)
    try:
        held = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        held = {}
    known = _circumstances(protocol, source)
    # A path can be spelt in two ways; details say what was used of an option in the file's name.
    compared = known.keys() - {"checkpoint"} - Details.__annotations__.keys()
    if any(held.get(name) != known[name] for name in compared):
        raise ValueError(
            f"{path} holds another evaluation, of other weights, data or versions; replace it with "
            "--force, or name another folder with --out"
        )
    return path


def _circumstances(protocol: Protocol, source: BackboneSource) -> dict[str, object]:
    """Return what is known of an evaluation before it: two that agree in it measure the same."""
    import timm

    known = {**dataclasses.asdict(source), **dataclasses.asdict(protocol)}
    return {
        "protocol": protocol.name,
        # As JSON has them, which knows no tuples.
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in known.items()
            if value not in ("", None)
        },
        "unfinished": source.unfinished,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "mixmask": __version__,
        },
    }


def evaluate(task: Task, protocol: Protocol, *, progress: bool = False) -> Result:
    """Measure a task's first backbone.

    Args:
        task: Backbone and images, see `load_task`.
        protocol: What to do with them.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If one of them is something else, such as a path or a name.
        ValueError: If the protocol's options do not suit the images, or labels are missing.
        FloatingPointError: If a training diverges.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task must be a Task, got {task!r}; load one with load_task({task!r})")
    if not isinstance(protocol, Protocol):
        raise TypeError(f"protocol must be one such as KNN(), got {protocol!r}; build one")
    began = time.perf_counter()
    scores, details = protocol.measure(task, progress)
    accuracy = measure_accuracy(scores, task.labels[1])
    return Result(
        protocol,
        task.sources[0],
        details,
        accuracy,
        task.classes,
        seconds=time.perf_counter() - began,
        device=torch.cuda.get_device_name(task.device) if scores.is_cuda else str(task.device),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
