"""One cell of the evidence: its data, its training, and the record that it leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import circumstances, write_json
from evidence_cells import RECIPE_VERSION, Cell, Record
from image_files import read_files
from torch import Tensor, nn

from mixmask.data.sets import ImageData, Split, load_data
from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy
from mixmask.runs.folder import Row
from mixmask.trainers.config import RunConfig
from mixmask.trainers.loop import train_method
from mixmask.trainers.methods import build_method, make_config
from mixmask.trainers.mixtures import Method

# Neighbours that vote, and the temperature of their votes.
_K, _TEMPERATURE = 20, 0.1
_POINTS = 10


@dataclass(frozen=True)
class Splits:
    """Images (N, 3, H, W) uint8 and labels (N,) of both sides of an evaluation."""

    images: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


def read_splits(cell: Cell, root: Path | None) -> Splits:
    """Read what a cell is trained and tested on; nothing is downloaded.

    Args:
        cell: The cell.
        root: The folder that holds the data: `.npz` files whose names start with that of the data
            set, torchvision's folder `cifar-100-python`, or a folder of images.

    Raises:
        ValueError: If the data is not there.
    """
    read = {"cifar100": _read_cifar, "clothing64": _read_clothing}.get(cell.data, _read_folder)
    data = read(cell, root)
    train, test = data.train, data.test
    if test is None or train.labels is None or test.labels is None:
        raise ValueError(f"{cell.data} needs a labelled test split; look at --data-root {root}")
    known = cell.images or len(train.labels)
    pixels, labels = train.images[:known], train.labels[:known]
    assert isinstance(pixels, Tensor)
    if cell.split == "test":
        assert isinstance(test.images, Tensor)
        return Splits(pixels, labels, test.images, test.labels)
    behind = slice(known, 2 * known)
    assert isinstance(train.images, Tensor)
    return Splits(pixels, labels, train.images[behind], train.labels[behind])


def _read_cifar(cell: Cell, root: Path | None) -> ImageData:
    count = None if cell.images is None else cell.images * (1 + (cell.split == "validation"))
    if root is not None and (root / "cifar-100-python").is_dir():
        import torchvision

        splits = []
        for train in (True, False):
            found: Any = torchvision.datasets.CIFAR100(root, train=train, download=False)
            images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
            splits.append(Split(images, torch.tensor(found.targets)))
        return ImageData(splits[0], splits[1], ())
    return _read_npz(cell.data, root, None, count)


def _read_clothing(cell: Cell, root: Path | None) -> ImageData:
    del root  # It comes with the package.
    return load_data("clothing64", cell.options.get("image_size", 32))


def _read_folder(cell: Cell, root: Path | None) -> ImageData:
    size = cell.options["image_size"]
    if root is not None:
        for folder in sorted(root.glob(f"{cell.data}*/")):
            return load_data(str(folder), size, stream="never")
    return _read_npz(cell.data, root, round(size * 8 / 7), cell.images)


def _read_npz(name: str, root: Path | None, size: int | None, count: int | None) -> ImageData:
    splits: list[Split] = []
    for words in (("train",), ("test", "val")):
        paths = [p for word in words for p in sorted((root or Path()).glob(f"{name}*{word}*.npz"))]
        if root is None or not paths:
            raise ValueError(
                f"{name} must lie in --data-root, as {name}_{words[0]}*.npz or in a folder; got "
                f"{root}"
            )
        splits.append(Split(*read_files(paths, size=size, count=None if splits else count)))
    return ImageData(splits[0], splits[1], ())


@dataclass
class Watch:
    """Measures a cell's backbone before the run, at every tenth of it, and at its end."""

    splits: Splits
    epochs: int
    image_size: int  # At which the backbone sees the images; those of CIFAR are taken as they are.
    epoch: int = -1
    parent: int = field(default_factory=os.getppid)
    busy: float = field(default_factory=time.process_time)

    def due(self) -> bool:
        """Whether this epoch ends a tenth of the run."""
        tenths = (self.epochs * i / _POINTS for i in range(1, _POINTS + 1))
        return self.epoch in {round(epoch) for epoch in tenths}

    def __call__(self, backbone: nn.Module, thorough: bool) -> dict[str, float]:
        """Measure, and stop the run where the process that started it is gone."""
        self.epoch += 1
        found = self.measure(backbone, thorough) if thorough or self.due() else {}
        now = time.process_time()
        found["busy_seconds"] = now - self.busy
        self.busy = now
        if os.getppid() != self.parent:
            signal.raise_signal(signal.SIGTERM)  # The loop saves this epoch and stops.
        return found

    def measure(self, backbone: nn.Module, thorough: bool) -> dict[str, float]:
        """Return the accuracies of the nearest neighbours and, if asked, of a linear probe."""
        s = self.splits
        x, x_test = (
            extract_features(backbone, each, size=self.image_size) for each in (s.images, s.test)
        )
        known = x, s.labels, x_test, s.test_labels
        found = {"knn": knn_accuracy(*known, k=_K, temperature=_TEMPERATURE)}
        if thorough:
            found["linear"] = linear_accuracy(*known)
        return found


def passes(config: RunConfig) -> tuple[float, float]:
    """Count the encoder's passes per image of a step: with a gradient, and without one.

    A pass over smaller views counts by their area. Steps without mixed views are averaged in.
    """
    model = build_method(config)
    mixed, plain = (_step_passes(model, config, mix) for mix in (True, False))
    rarely = 1 / config.mix_every
    gradient, forward = (m * rarely + p * (1 - rarely) for m, p in zip(mixed, plain, strict=True))
    return gradient, forward


def _step_passes(model: Method, config: RunConfig, mix: bool) -> list[float]:
    counts = [0.0, 0.0]
    n, size = 8, config.image_size

    def count(backbone: nn.Module, given: tuple[Tensor, ...]) -> None:
        del backbone
        area = given[0].shape[-1] * given[0].shape[-2] / size**2
        counts[not torch.is_grad_enabled()] += len(given[0]) / n * area

    backbones = [part for name, part in model.named_children() if name.endswith("backbone")]
    hooks = [backbone.register_forward_pre_hook(count) for backbone in backbones]
    x1, x2, *extra = torch.randn(2 + config.extra_crops, n, 3, size, size)
    for _ in model.terms(x1, x2, torch.Generator(), extra=extra if mix else [], mix=mix):
        pass
    for hook in hooks:
        hook.remove()
    return counts


def train(cell: Cell, splits: Splits, folder: Path) -> list[Row]:
    """Train a cell with the package's own trainer, from its checkpoint where it has one."""
    config = make_config(**cell.config_options(), measure_every=1)
    watch = Watch(splits, cell.epochs, config.image_size)
    rows = saved_rows(folder)
    if rows:
        watch.epoch = int(rows[-1]["epoch"])
        if watch.epoch == cell.epochs:
            return rows
    begun = (folder / "last.pt").exists() or (folder / "previous.pt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, rows = train_method(
            config, splits.images, folder, monitor=watch, resume=begun, progress=False
        )
    return rows


def saved_rows(folder: Path) -> list[Row]:
    """Return the rows of the newest whole checkpoint, from which the trainer goes on."""
    for name in ("last.pt", "previous.pt"):
        try:
            rows: list[Row] = torch.load(folder / name, weights_only=True)["rows"]
        except (OSError, RuntimeError, EOFError):
            continue
        return rows
    return []


# Trains a cell in its folder and returns its rows, from epoch 0.
Trainer = Callable[[Cell, Splits, Path], list[Row]]


def run_cell(
    cell: Cell, trainer: Trainer, root: Path | None, state: Path, out: Path, command: str
) -> Record:
    """Train a cell, or what is left of it, and write its record.

    Args:
        cell: The cell, with its learning rate.
        trainer: What trains it.
        root: The folder of the data.
        state: The folder of unfinished runs.
        out: The folder of the records.
        command: What reruns it.

    Raises:
        BlockingIOError: If another process is at it.
        KeyboardInterrupt: If it was interrupted, once it is saved.
    """
    folder = state / f"version-{RECIPE_VERSION}" / cell.name
    with _own(folder, cell):
        splits = read_splits(cell, root)
        failed = None
        try:
            rows = trainer(cell, splits, folder / "run")
        except FloatingPointError as error:  # That, too, is a result.
            rows, failed = saved_rows(folder / "run"), str(error).split(";")[0]
        record = _record(cell, splits, rows, failed, command)
        if cell.code != "mixmask":
            record["versions"][cell.code] = metadata.version(cell.code)
        write_json(out / f"{cell.name}.json", record)
    shutil.rmtree(folder)
    return record


@contextmanager
def _own(folder: Path, cell: Cell) -> Iterator[None]:
    """Hold a cell's folder, emptied if it is of a cell of that name with other options."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(cell), indent=2)
    described = folder / "cell.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not described.exists() or described.read_text(encoding="utf-8") != content:
            shutil.rmtree(folder / "run", ignore_errors=True)
            described.write_text(content, encoding="utf-8")
        yield


def _record(
    cell: Cell, splits: Splits, rows: list[Row], failed: str | None, command: str
) -> Record:
    config = make_config(**cell.config_options())
    gradient, forward = passes(config)
    seen = len(splits.images) // config.batch_size * config.batch_size  # Per epoch.
    epochs = int(rows[-1]["epoch"]) if rows else 0
    tests = len(splits.test)
    measured = [row for row in rows[1:] if "knn" in row]
    return {
        "script": "evidence",
        "name": cell.name,
        "recipe_version": RECIPE_VERSION,
        "cell": asdict(cell),
        "config": asdict(config),
        # As accelerate chooses.
        **circumstances("cuda" if torch.cuda.is_available() else "cpu"),
        "command": command,
        "training_images": len(splits.images),
        "test_images": tests,
        "untrained": _accuracies(rows[0], tests) if rows else None,
        "curve": [
            {"epoch": int(row["epoch"]), "knn": row["knn"], "loss": row.get("loss")}
            for row in measured
        ],
        "final": None if failed else _accuracies(rows[-1], tests),
        "failed": failed,
        "epochs": epochs,
        "images_seen": epochs * seen,
        # A forward pass alone is a third of a forward-backward pass.
        "passes_per_image": gradient + forward / 3,
        "passes": epochs * seen * (gradient + forward / 3),
        "gradient_passes": epochs * seen * gradient,
        "seconds": sum(row.get("seconds", 0.0) for row in rows),
        "busy_seconds": sum(row.get("busy_seconds", 0.0) for row in rows),
    }


def _accuracies(row: Row, tests: int) -> dict[str, float]:
    """Return accuracies with the standard error that the choice of test images gives them."""
    found = {}
    for name in ("knn", "linear"):
        value = row[name]
        found[name] = value
        found[f"{name}_error"] = (value * (1 - value) / tests) ** 0.5
    return found
