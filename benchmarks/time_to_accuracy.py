"""Seconds until MoCo v2 + MixMask reaches a kNN accuracy, evaluation included.

The target is an option. On CIFAR-10 its default is what lightly publishes for MoCo after 200
epochs; on other data it is what our plain MoCo reaches after all epochs, for which a run without
mixing comes first. A run that was stopped goes on where it was when it is started again with the
same `--run`; its clock goes on too.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import ROOT, circumstances, slug, write_json
from image_files import read_files
from torch import Tensor, nn

from mixmask.data.sets import ImageData, Split, load_data
from mixmask.evaluation import extract_features, knn_accuracy
from mixmask.trainers.config import PRESETS
from mixmask.trainers.loop import train_method
from mixmask.trainers.methods import make_config

# lightly's benchmark of MoCo on CIFAR-10: 200 epochs, batch 128, kNN with k 200.
_PUBLISHED = {"cifar10": 0.838}
# Seconds in which a GPU is to reach that.
_WITHIN = {"cifar10": 600.0}


@dataclass
class Clock:
    """Measures accuracies during a run, and the time since it was first started.

    The loop asks it after each epoch, and keeps the time in the run's rows and checkpoint; what
    has passed since the last of these is kept beside them when a run is interrupted.
    """

    folder: Path
    splits: tuple[Tensor, Tensor, Tensor, Tensor]
    size: int  # Height and width at which the backbone sees the images, in pixels.
    every: int
    target: float | None
    k: int
    epoch: int = 0
    before: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    reached: bool = False
    curve: list[dict[str, float]] = field(default_factory=list)

    def seconds(self) -> float:
        """Return the seconds since the run was first started, pauses left out."""
        return self.before + time.perf_counter() - self.began

    def resume(self) -> None:
        """Go on where a stopped run was."""
        rows = list(read_rows(self.folder / "metrics.csv"))
        self.epoch = int(rows[-1]["epoch"])
        self.before = max(row["wall"] for row in rows)
        paused = self.folder / "clock.json"
        if paused.exists():
            self.before = max(self.before, json.loads(paused.read_text())["seconds"])
        self.curve = [_point(row) for row in rows if "knn" in row]

    def pause(self) -> None:
        """Keep the time of an interrupted epoch."""
        write_json(self.folder / "clock.json", {"seconds": self.seconds()})

    def __call__(self, backbone: nn.Module, thorough: bool) -> dict[str, float]:
        """Measure after every so many epochs, and stop the run when the target is reached."""
        measured: dict[str, float] = {}
        start = self.epoch == 0 and not self.curve and thorough
        if not start:
            self.epoch += 1
        if thorough or self.epoch % self.every == 0:
            train, labels, test, test_labels = self.splits
            x, x_test = (extract_features(backbone, each, size=self.size) for each in (train, test))
            measured["knn"] = knn_accuracy(x, labels, x_test, test_labels, k=self.k)
        measured["wall"] = self.seconds()
        if "knn" in measured:
            self.curve.append(_point({"epoch": self.epoch, **measured}))
            print(line(self.curve[-1]), flush=True)
            if self.target is not None and measured["knn"] >= self.target and not start:
                self.reached = True
                signal.raise_signal(signal.SIGINT)  # The loop saves this epoch and stops.
        return measured


def train(options: argparse.Namespace, mix: str, target: float | None, data: ImageData) -> Clock:
    """Train until the target is reached, or to the end where there is none."""
    folder: Path = options.run / mix
    given = {**options.option, "mix": mix, "epochs": options.epochs, "seed": options.seed}
    config = make_config(data=options.data, recipe=options.recipe, **given, measure_every=1)
    assert data.test is not None
    assert data.train.labels is not None
    assert data.test.labels is not None
    train_images, test_images = data.train.images, data.test.images
    assert isinstance(train_images, Tensor)
    assert isinstance(test_images, Tensor)
    splits = (train_images, data.train.labels, test_images, data.test.labels)
    clock = Clock(folder, splits, config.image_size, options.every, target, options.k)
    resume = (folder / "last.pt").exists()
    if resume:
        clock.resume()
        clock.reached = any(target is not None and p["knn"] >= target for p in clock.curve[1:])
        if clock.reached or clock.epoch >= options.epochs:
            return clock
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train_method(config, train_images, folder, monitor=clock, resume=resume, progress=False)
    except KeyboardInterrupt:
        if not clock.reached:
            clock.pause()
            raise
    return clock


def main() -> None:
    """Find the target, train towards it, and record how long it took."""
    options = _options()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # As accelerate chooses.
    data = read_data(options.data, options.images)
    target, source = options.target, "given"
    if target is None and options.data in _PUBLISHED:
        target, source = _PUBLISHED[options.data], "published by lightly"
    record: dict[str, Any] = {
        "script": "time_to_accuracy",
        "small": options.small,
        **circumstances(device),
        "data": Path(options.data).name,
        "epochs": options.epochs,
    }
    if target is None:
        plain = train(options, "none", None, data)
        target = plain.curve[-1]["knn"]
        source = f"our plain MoCo after {plain.epoch} epochs, {plain.curve[-1]['seconds']:.0f} s"
        record["plain"] = plain.curve
    clock = train(options, options.mix, target, data)
    first = next((p for p in clock.curve[1:] if p["knn"] >= target), None)
    record.update(
        {
            "target": target,
            "target_from": source,
            "within": _WITHIN.get(options.data) if device == "cuda" else None,
            "reached": None if first is None else {"mix": options.mix, **first},
            "curve": clock.curve,
            "config": json.loads((options.run / options.mix / "config.json").read_text()),
        }
    )
    print(outcome(record))
    if options.out is not None or not options.small:
        name = f"time_to_accuracy-{record['data']}-{slug(device)}.json"
        write_json(options.out or ROOT / "results" / name, record)


def outcome(record: dict[str, Any]) -> str:
    """Say in a line whether and when the target was reached."""
    target = f"{record['target']:.1%} ({record['target_from']})"
    reached = record["reached"]
    if reached is None:
        best = max(point["knn"] for point in record["curve"])
        return (
            f"{record['data']}: {target} not reached in {record['epochs']} epochs; best {best:.1%}"
        )
    text = (
        f"{record['data']}: {target} reached by {reached['mix']} after {reached['seconds']:.0f} s, "
        f"{reached['epoch']:.0f} of {record['epochs']} epochs"
    )
    within = record["within"]
    if within is not None:
        text += f", bound {within:.0f} s {'reached' if reached['seconds'] <= within else 'MISSED'}"
    return text


def line(point: dict[str, float]) -> str:
    """Return one line about a measurement."""
    return f"epoch {point['epoch']:.0f}, {point['seconds']:.1f} s: kNN {point['knn']:.2%}"


def _point(row: dict[str, float]) -> dict[str, float]:
    return {"epoch": row["epoch"], "seconds": row["wall"], "knn": row["knn"]}


def read_rows(path: Path) -> Iterator[dict[str, float]]:
    """Read what a run has measured, without the columns that an epoch left empty."""
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {name: float(value) for name, value in row.items() if value}


def read_data(name: str, count: int | None) -> ImageData:
    """Load a data set by name, a folder of images, or a folder of `.npz` files.

    The latter are named `*train*.npz` and `*test*.npz` or `*val*.npz`; see `read_arrays`.
    """
    folder = Path(name)
    if folder.is_dir() and any(folder.glob("*train*.npz")):
        splits = []
        for words in (("train",), ("test", "val")):
            paths = sorted(path for word in words for path in folder.glob(f"*{word}*.npz"))
            if not paths:
                raise ValueError(f"{folder} holds no {' or '.join(words)} .npz; add one")
            splits.append(Split(*read_files(paths)))
        train, test = splits
        data = ImageData(train, test, ())
    else:
        data = load_data(name, 32)
    if not data.labelled:
        raise ValueError(f"--data {name} has no labelled test split, without which there is no kNN")
    known = data.train.labels
    assert known is not None
    if count is None:
        return data
    step = max(1, len(known) // count)
    return ImageData(Split(data.train.images[::step], known[::step]), data.test, data.classes)


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="cifar10", help="cifar10, cifar100, or a folder")
    parser.add_argument("--recipe", help="named settings; default: those of --data, or cifar10's")
    parser.add_argument("--target", type=float, help="kNN accuracy to reach, 0 ... 1")
    parser.add_argument("--epochs", type=int, default=200, help="length of the schedule")
    parser.add_argument("--every", type=int, default=10, help="epochs between two measurements")
    parser.add_argument("--k", type=int, default=200, help="neighbours that vote")
    parser.add_argument("--mix", default="mixmask", help="what fills the mixed view")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="training images to use; default: all")
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of the run, as precision=bf16 or lr=0.12; may be repeated",
    )
    parser.add_argument("--run", type=Path, help="run folder; default: runs/time-DATA")
    parser.add_argument("--small", action="store_true", help="a few photographs, to try the script")
    parser.add_argument("--out", type=Path, help="JSON to write; default: under results/")
    options = parser.parse_args()
    options.option = dict(options.option)
    if options.small:
        options.data, options.epochs, options.every, options.images = "clothing64", 2, 1, 64
        options.option = {"batch_size": 16, "queue_size": 32, **options.option}
    if options.recipe is None:
        options.recipe = options.data if options.data in PRESETS else "cifar10"
    options.run = options.run or Path("runs") / f"time-{Path(options.data).name}"
    return options


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        sys.exit(130)
