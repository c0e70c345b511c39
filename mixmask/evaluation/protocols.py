"""Measuring a backbone by a protocol, and one record of the results for all protocols."""

from __future__ import annotations

import dataclasses
import json
import platform
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
from mixmask.evaluation.tasks import Details, Source, Task
from mixmask.figures.features import figure_confusion
from mixmask.figures.style import short_path, write_figure
from mixmask.runs.folder import atomic_write

# Each holds its options, a `name`, and `measure(task, progress)`.
Protocol = KNN | Linear | LinearSGD | FineTuning


@dataclass(frozen=True)
class Result:
    """How well a backbone did on the test images, and under which circumstances."""

    protocol: Protocol
    source: Source
    details: Details
    accuracy: Accuracy
    classes: tuple[str, ...]
    seconds: float
    device: str
    date: str  # In UTC, ISO 8601.

    def to_json(self) -> dict[str, object]:
        """Return what `evaluate-PROTOCOL.json` holds."""
        import timm

        options = dataclasses.asdict(self.protocol)
        return {
            "protocol": self.protocol.name,
            **dataclasses.asdict(self.source),
            "n_test": int(self.accuracy.confusion.sum()),
            **{name: value for name, value in options.items() if value != ""},
            **self.details,  # Of an option that depends on the images, what was used.
            "seconds": round(self.seconds, 2),
            "device": self.device,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "timm": timm.__version__,
                "mixmask": __version__,
            },
            "date": self.date,
            **self.accuracy.to_json(self.classes),
        }

    def _title(self) -> str:
        """Say in the figure whose accuracy it is, on what."""
        source, images = self.source, int(self.accuracy.confusion.sum())
        return (
            f"{short_path(source.checkpoint)}, {self.protocol.name} on "
            f"{short_path(source.data)}\ntop-1 {self.accuracy.top1:.1%}, n = {images:,} test images"
        )

    def write(self, folder: Path) -> Path:
        """Write `evaluate-PROTOCOL.json`, and the confusion matrix as PNG beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"evaluate-{self.protocol.name}.json"
        with atomic_write(path, path.with_suffix(".png")) as (text, picture):
            content = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
            text.write_text(content + "\n", encoding="utf-8")
            figure = figure_confusion(self.accuracy.confusion, self.classes, title=self._title())
            write_figure(figure, picture)
        return path


def evaluate(task: Task, protocol: Protocol, *, progress: bool = False) -> Result:
    """Measure a task's first backbone.

    Args:
        task: Backbone and images, see `load_task`.
        protocol: What to do with them.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the protocol's options do not suit the images, or labels are missing.
        FloatingPointError: If a training diverges.
    """
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
