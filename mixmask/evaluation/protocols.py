"""Protocols that measure a backbone: their options, and one record of the results for all."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mixmask._version import __version__
from mixmask.evaluation.classifier import Training
from mixmask.evaluation.features import extract_features
from mixmask.evaluation.finetune import (
    balanced_subset,
    finetune_scores,
    linear_sgd_scores,
    listed_subset,
)
from mixmask.evaluation.knn import knn_scores
from mixmask.evaluation.linear import linear_scores
from mixmask.evaluation.metrics import Accuracy, measure_accuracy, top1_accuracy
from mixmask.evaluation.tasks import Source, Task
from mixmask.figures.features import figure_confusion
from mixmask.figures.style import short_path, write_figure
from mixmask.runs.folder import atomic_write
from mixmask.runs.options import check_options, check_range, option

# A batch of a small subset is a tenth of it, so that an epoch has enough steps.
_BATCH, _LEAST_BATCH, _STEPS = 256, 16, 10


@dataclass(frozen=True)
class Outcome:
    """What a protocol has computed; None where a protocol has no such value.

    Attributes:
        scores: (M, C) scores of the test images.
        used: The protocol with the options that were used.
        n_train: Number of training images.
        dim: Number of features.
        penalty: L2 penalty that was chosen.
        schedule: Of the learning rate.
        subset: How the training images were chosen.
        frozen_top1: Accuracy of a linear probe before fine-tuning, on the same images.
    """

    scores: Tensor
    used: Protocol
    n_train: int
    dim: int | None = None
    penalty: float | None = None
    schedule: str | None = None
    subset: str | None = None
    frozen_top1: float | None = None


@dataclass(frozen=True)
class _Options:
    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class KNN(_Options):
    """Weighted nearest neighbours on frozen features, see `knn_scores`."""

    k: int = option(20, "number of neighbours", low=1)
    temperature: float = option(0.1, "temperature of the votes", positive=True)
    name: ClassVar[str] = "knn"

    def _measure(self, task: Task, progress: bool) -> Outcome:
        del progress
        x, x_test = _features(task)
        used = dataclasses.replace(self, k=min(self.k, len(x)))
        scores = knn_scores(
            x, task.train_labels, x_test, k=used.k, temperature=self.temperature,
            classes=len(task.classes),
        )  # fmt: skip
        return Outcome(scores, used, len(x), x.shape[1])


@dataclass(frozen=True)
class Linear(_Options):
    """Logistic regression on frozen features of whole images, see `linear_scores`."""

    seed: int = option(0, "seed of all random draws", low=0)
    name: ClassVar[str] = "linear"

    def _measure(self, task: Task, progress: bool) -> Outcome:
        del progress
        x, x_test = _features(task)
        scores, penalty = linear_scores(
            x, task.train_labels, x_test, classes=len(task.classes), seed=self.seed
        )
        return Outcome(scores, self, len(x), x.shape[1], penalty)


@dataclass(frozen=True)
class LinearSGD(_Options):
    """A linear head on a frozen backbone, trained on random crops, see `linear_sgd_scores`."""

    epochs: int = option(100, "passes over the images", low=1)
    batch_size: int = option(_BATCH, "images per step", low=2)
    lr: float = option(30.0, "learning rate at the start", positive=True)
    seed: int = option(0, "seed of all random draws", low=0)
    name: ClassVar[str] = "linear-sgd"

    def _measure(self, task: Task, progress: bool) -> Outcome:
        training = Training(
            self.epochs, self.batch_size, task.source.image_size, seed=self.seed, progress=progress
        )
        scores = linear_sgd_scores(
            task.backbone, task.train, task.train_labels, task.test, training,
            lr=self.lr, classes=len(task.classes),
        )  # fmt: skip
        schedule = "a tenth after 60 % and 80 % of the epochs"
        return Outcome(scores, self, len(task.train), schedule=schedule)


@dataclass(frozen=True)
class FineTuning(_Options):
    """Backbone and head trained on all labels or on some, see `finetune_scores`."""

    percent: float = option(100.0, "share of the labels in %, equally many per class")
    subset_list: str = option("", "file with one name of a training image per line")
    epochs: int = option(20, "passes over the images", low=1)
    batch_size: int = option(
        0, "images per step; 0: 256, or a tenth of the images where they are few, at least 16"
    )
    lr: float = option(0.01, "learning rate of the backbone at the start", positive=True)
    head_lr: float = option(0.2, "learning rate of the head at the start", positive=True)
    seed: int = option(0, "seed of all random draws", low=0)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.batch_size != 0:
            check_range("batch_size", self.batch_size, 2)
        if self.subset_list and self.percent != 100:
            raise ValueError("--percent and --subset-list exclude each other; use one of them")

    @property
    def name(self) -> str:
        """The protocol with its subset, as in the names of files."""
        return f"finetune-{'list' if self.subset_list else f'{self.percent:g}'}"

    def subset(self, task: Task) -> tuple[Tensor, str]:
        """Return the indices (n,) of the images to fine-tune on, and how they are chosen."""
        if not self.subset_list:
            index = balanced_subset(
                task.train_labels, self.percent, seed=self.seed, classes=task.classes
            )
            return index, f"{self.percent:g} %"
        if len(task.files) != len(task.train):
            raise ValueError(
                f"--subset-list needs a folder of images, got {task.source.data}, whose images "
                "have no file names; use --percent"
            )
        lines = map(str.strip, Path(self.subset_list).read_text(encoding="utf-8").splitlines())
        return listed_subset(task.files, list(filter(None, lines))), f"listed in {self.subset_list}"

    def batch_of(self, images: int) -> int:
        """Return the number of images per step for this number of images."""
        return self.batch_size or min(_BATCH, max(_LEAST_BATCH, images // _STEPS))

    def _measure(self, task: Task, progress: bool) -> Outcome:
        index, subset = self.subset(task)
        images = task.train[index] if isinstance(task.train, Tensor) else task.train.subset(index)
        labels, classes = task.train_labels[index], len(task.classes)
        used = dataclasses.replace(self, batch_size=self.batch_of(len(index)))
        training = Training(
            self.epochs, used.batch_size, task.source.image_size, nesterov=True, seed=self.seed,
            progress=progress,
        )  # fmt: skip
        scores = finetune_scores(
            task.backbone, images, labels, task.test, training,
            lr=self.lr, head_lr=self.head_lr, classes=classes,
        )  # fmt: skip
        x, x_test = (extract_features(task.backbone, part) for part in (images, task.test))
        frozen, _ = linear_scores(x, labels, x_test, classes=classes, seed=self.seed)
        top1 = top1_accuracy(frozen, task.test_labels)
        return Outcome(scores, used, len(index), subset=subset, frozen_top1=top1)


Protocol = KNN | Linear | LinearSGD | FineTuning


@dataclass(frozen=True)
class Result:
    """How well a backbone did on the test images, and under which circumstances."""

    source: Source
    outcome: Outcome
    accuracy: Accuracy
    classes: tuple[str, ...]
    seconds: float
    device: str
    date: str  # In UTC, ISO 8601.

    def to_json(self) -> dict[str, object]:
        """Return what `evaluate-PROTOCOL.json` holds."""
        import timm

        used = self.outcome.used
        details = {
            field.name: getattr(record, field.name)
            for record in (self.outcome, used)
            for field in dataclasses.fields(record)
            if field.name not in ("scores", "used")
        }
        return {
            "protocol": used.name,
            **dataclasses.asdict(self.source),
            "n_test": len(self.outcome.scores),
            **{name: value for name, value in details.items() if value not in (None, "")},
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
        source, images = self.source, len(self.outcome.scores)
        return (
            f"{short_path(source.checkpoint)}, {self.outcome.used.name} on "
            f"{short_path(source.data)}\ntop-1 {self.accuracy.top1:.1%}, n = {images:,} test images"
        )

    def write(self, folder: Path) -> Path:
        """Write `evaluate-PROTOCOL.json`, and the confusion matrix as PNG beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"evaluate-{self.outcome.used.name}.json"
        with atomic_write(path, path.with_suffix(".png")) as (text, picture):
            content = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
            text.write_text(content + "\n", encoding="utf-8")
            figure = figure_confusion(self.accuracy.confusion, self.classes, title=self._title())
            write_figure(figure, picture)
        return path


def evaluate(task: Task, protocol: Protocol, *, progress: bool = False) -> Result:
    """Measure a backbone.

    Args:
        task: Backbone and images, see `load_task`.
        protocol: What to do with them.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the protocol's options do not suit the images.
        FloatingPointError: If a training diverges.
    """
    began = time.perf_counter()
    outcome = protocol._measure(task, progress)
    accuracy = measure_accuracy(outcome.scores, task.test_labels)
    seconds, device = time.perf_counter() - began, task.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Result(task.source, outcome, accuracy, task.classes, seconds, name, date)


def _features(task: Task) -> tuple[Tensor, Tensor]:
    """Compute the features (N, D) and (M, D) of both splits."""
    return extract_features(task.backbone, task.train), extract_features(task.backbone, task.test)
