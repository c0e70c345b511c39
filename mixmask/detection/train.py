"""Object detection on a pretrained backbone: training, average precision, results."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixmask._checks import few
from mixmask._devices import choose_device
from mixmask._seeds import fold_seed, step_generator
from mixmask.data.stream import explain_dead_workers
from mixmask.detection.config import DetectionConfig
from mixmask.detection.data import DetectionData, Target
from mixmask.detection.metrics import evaluate_detector, predict, read_batches
from mixmask.detection.model import Source, batch_norms, build_detector, train_mode
from mixmask.figures.detection import figure_detections
from mixmask.figures.style import save_figure, short_path
from mixmask.runs.claim import claim_folder
from mixmask.runs.files import write_json
from mixmask.runs.folder import (
    RESULTS,
    adopt_checkpoint,
    is_unstarted,
    save_checkpoint,
    write_config,
)
from mixmask.runs.misfits import restore
from mixmask.runs.schedules import step_decay

# Seconds between two checkpoints within an epoch.
_SAVE_EVERY = 300
# Batches from which the statistics of batch norm are measured again before a test.
_STATISTICS = 50
# What a checkpoint holds of where a run stood.
_PROGRESS = {"step": int, "rows": list, "sums": dict, "seconds": float, "source": dict}
_LIBRARIES = ("torch", "torchvision", "timm", "torchmetrics", "pycocotools", "mixmask")
# Measurements of an epoch: epoch, loss, its parts under torchvision's names, lr and seconds; where
# there was a test, test_seconds and what `average_precision` returns.
Row = dict[str, Any]


class Run:
    """A run: its parts, its progress and its files."""

    def __init__(
        self,
        config: DetectionConfig,
        data: DetectionData,
        backbone: nn.Module,
        out: Path,
        source: Source,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Build a run at its first step; the seed alone decides the new layers' weights."""
        if config.model == "mask-rcnn":
            data = data._replace(train=data.train.with_masks(), test=data.test.with_masks())
        self.config, self.data, self.out, self.source = config, data, out, source
        self.device = choose_device(device)
        torch.manual_seed(fold_seed(config.seed, "weights"))
        self.detector = build_detector(backbone, len(data.classes), config).to(self.device)
        self.optimizer = torch.optim.SGD(
            [p for p in self.detector.parameters() if p.requires_grad],
            lr=0.0,  # Set in each step.
            momentum=0.9,
            weight_decay=config.weight_decay,
        )
        self.steps = max(1, len(data.train) // config.batch_size)  # Per epoch.
        self.step = 0
        self.rows: list[Row] = []
        # Sums of losses, and seconds, of the epoch that is under way.
        self.sums: dict[str, float] = {}
        self.seconds = 0.0

    def read_batches(
        self, first: int, last: int, draw: str, *epoch: int
    ) -> Iterator[list[tuple[Tensor, Target]]]:
        """Read training batches from `first` to before `last` of a random order."""
        generator = step_generator(self.config.seed, draw, *epoch)
        order = torch.randperm(len(self.data.train), generator=generator)
        size = self.config.batch_size
        index = order[first * size : last * size].tolist()
        return read_batches(self.data.train, index, size, self.config.workers)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step.

        It rises over 100 steps, or a tenth of the run where that is less, and drops to a tenth
        after 3/4 and after 11/12, as in MoCo's 24,000 steps on Pascal VOC.
        """
        peak = self.config.lr or 0.02 * self.config.batch_size / 16
        total = self.steps * self.config.epochs
        warmup = min(100, total // 10)
        rise = min(1.0, (self.step + 1) / (warmup + 1))
        return peak * rise * step_decay(self.step / total, (3 / 4, 11 / 12))

    def results(self) -> dict[str, Any]:
        """Return the content of `results.json`: the last test with its circumstances."""
        tested = next((row for row in reversed(self.rows) if "ap" in row), Row())
        names = ("ap", "ap50", "ap75", "per_class")
        splits = {"train": self.data.train, "test": self.data.test}
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "finished": self.step == self.steps * self.config.epochs,
            **{name: tested[name] for name in tested if name.removeprefix("mask_") in names},
            "classes": list(self.data.classes),
            "backbone": self.source,
            "config": dataclasses.asdict(self.config),
            "data": {
                "layout": self.data.layout,
                **{kind: {"split": s.name, "images": len(s)} for kind, s in splits.items()},
            },
            "hardware": {
                "machine": platform.machine(), "gpu": gpu, "threads": torch.get_num_threads(),
            },
            "versions": {
                "python": platform.python_version(), **{name: version(name) for name in _LIBRARIES},
            },
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "epochs": self.rows,
        }  # fmt: skip

    def save(self) -> None:
        """Write checkpoint and results; a crash at any moment leaves one whole checkpoint."""
        content = {
            "model": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "options": dataclasses.asdict(self.config),
            "classes": list(self.data.classes),
            "images": len(self.data.train),
            **{name: getattr(self, name) for name in _PROGRESS},
        }
        save_checkpoint(self.out, content)
        write_json(self.out / RESULTS, self.results())

    def load(self) -> None:
        """Restore the newest whole checkpoint; a warning names a damaged one."""
        if is_unstarted(self.out):  # Killed before its first checkpoint: it starts again.
            return
        parts = {"model": self.detector, "optimizer": self.optimizer}
        file, content = restore(self.out, parts, {"classes": list, "images": int, **_PROGRESS})
        classes, images = list(self.data.classes), len(self.data.train)
        if (content["classes"], content["images"]) != (classes, images):
            raise ValueError(
                f"{self.out} was started on {content['images']} images of "
                f"{few(content['classes'], 9)}, but {self.config.data} has {images} of "
                f"{few(classes, 9)}; continue with the original data"
            )
        for name in _PROGRESS:
            setattr(self, name, content[name])
        # What a kill while saving left out; there may be no step to save after.
        adopt_checkpoint(file)
        write_json(self.out / RESULTS, self.results())


def train_detector(
    config: DetectionConfig,
    data: DetectionData,
    backbone: nn.Module,
    out: Path,
    *,
    source: Source | None = None,
    device: torch.device | str | int | None = None,
    resume: bool = False,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a detector, leaving its configuration, results, checkpoints and a figure in a folder.

    SGD with momentum 0.9; images are flipped at random and resized to a random one of eleven
    sizes. Every step's randomness follows from (seed, step), so a run that was stopped and resumed
    ends in the same weights as one that was not.

    Args:
        config: The run's options.
        data: The two splits; with segmentations for Mask R-CNN.
        backbone: A timm model, which the detector takes over.
        out: The run folder, made if need be: `config.json`, `results.json`, `last.pt`,
            `previous.pt` and, at the end, `detections.png` with the first test images.
        source: What `results.json` says of the backbone.
        device: Where to compute. Default: a GPU where there is one.
        resume: Continue from the newest whole checkpoint in `out`.
        progress: Show a progress bar.
        on_row: Called with what was measured after each epoch.

    Raises:
        ValueError: If the backbone is not supported, or there is nothing to resume.
        FloatingPointError: If the loss is no longer finite; the last checkpoint is kept.
        ChildProcessError: If a worker has died; the last checkpoint is kept.
    """
    run = Run(config, data, backbone, out, source or {}, device)
    # Of a worker's death torch tells wherever the process is, not in reading alone.
    with claim_folder(out), explain_dead_workers():
        if resume:
            run.load()
        else:
            write_config(out, dataclasses.asdict(config) | {"source": run.source.get("run", "")})
        _train(run, progress, on_row)
    return run.detector, run.results()


def _train(run: Run, progress: bool, on_row: Callable[[Row], None] | None) -> None:
    """Train from the current step to the last epoch, with tests in between."""
    config = run.config
    total = run.steps * config.epochs
    with tqdm(total=total, initial=run.step, unit="step", disable=not progress) as bar:
        for epoch in range(run.step // run.steps + 1, config.epochs + 1):
            row = _train_epoch(run, epoch, bar)
            due = config.measure_every > 0 and epoch % config.measure_every == 0
            if due or epoch == config.epochs:
                _measure_statistics(run)
                start = time.perf_counter()
                row |= evaluate_detector(
                    run.detector, run.data.test, run.data.classes,
                    batch_size=config.batch_size, workers=config.workers,
                )  # fmt: skip
                row["test_seconds"] = time.perf_counter() - start
            run.rows.append(row)
            run.save()
            if on_row:
                on_row(row)
    _draw(run)


def _train_epoch(run: Run, epoch: int, bar: tqdm[NoReturn]) -> Row:
    """Train one epoch, or what a resumed run has left of it."""
    train_mode(run.detector)
    # The clock goes on with the seconds of an epoch that was interrupted.
    start, saved = time.perf_counter() - run.seconds, run.seconds
    for batch in run.read_batches(run.step % run.steps, run.steps, "order", epoch):
        losses = _train_step(run, batch)
        total = sum(losses.values())
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss became {total} in epoch {epoch}; lower --lr")
        run.step += 1
        run.sums = {name: run.sums.get(name, 0.0) + loss for name, loss in losses.items()}
        run.seconds = time.perf_counter() - start
        bar.update()
        bar.set_postfix_str(f"loss {total:.3f}")
        if run.seconds - saved > _SAVE_EVERY and run.step % run.steps:
            saved = run.seconds
            run.save()
    means = {name: total / run.steps for name, total in run.sums.items()}
    rate, seconds = run.optimizer.param_groups[0]["lr"], run.seconds
    run.sums, run.seconds = {}, 0.0
    return {**means, "epoch": epoch, "loss": sum(means.values()), "lr": rate, "seconds": seconds}


def _train_step(run: Run, batch: list[tuple[Tensor, Target]]) -> dict[str, float]:
    """Take one step on a batch and return the parts of the loss."""
    generator = step_generator(run.config.seed, "flips", run.step)
    images, targets = _flip_half(batch, generator, run.device)
    # torchvision draws sizes, anchors and regions from the global generator.
    torch.manual_seed(fold_seed(run.config.seed, "sampling", run.step))
    losses: dict[str, Tensor] = run.detector(images, targets)
    total = torch.stack(list(losses.values())).sum()
    run.optimizer.zero_grad()
    total.backward()
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate()
    run.optimizer.step()
    return {name: float(loss.detach()) for name, loss in losses.items()}


def _flip_half(
    batch: list[tuple[Tensor, Target]], generator: torch.Generator, device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Bring a batch to the device as floats, half of its images flipped from left to right."""
    images, targets = [], []
    flips = torch.rand(len(batch), generator=generator) < 0.5
    for flip, (image, annotated) in zip(flips.tolist(), batch, strict=True):
        target = {name: value.to(device) for name, value in annotated.items()}
        if flip:
            image = image.flip(-1)
            left, top, right, bottom = target["boxes"].unbind(1)  # (n, 4) -> 4 times (n,)
            width = image.shape[-1]
            target["boxes"] = torch.stack([width - right, top, width - left, bottom], dim=1)
            if "masks" in target:
                target["masks"] = target["masks"].flip(-1)
        images.append(image.to(device).float() / 255)
        targets.append(target)
    return images, targets


@torch.no_grad()
def _measure_statistics(run: Run) -> None:
    """Replace running means by means over training batches with the weights as they are now."""
    # Running means lag behind the weights, which harms a detector more than a classifier (MoCo's
    # configuration has it as `PRECISE_BN`). Frozen ones keep those of pretraining.
    tuned = [norm for norm in batch_norms(run.detector) if norm.weight.requires_grad]
    if not tuned:
        return
    train_mode(run.detector)
    momenta = [norm.momentum for norm in tuned]
    for norm in tuned:
        norm.reset_running_stats()
        norm.momentum = None  # A plain mean over all batches.
    torch.manual_seed(fold_seed(run.config.seed, "statistics"))
    generator = step_generator(run.config.seed, "statistics")
    for batch in run.read_batches(0, min(_STATISTICS, run.steps), "statistics"):
        run.detector(*_flip_half(batch, generator, run.device))
    for norm, momentum in zip(tuned, momenta, strict=True):
        norm.momentum = momentum


def _draw(run: Run) -> None:
    """Draw the first four test images with their annotations and detections."""
    test, row = run.data.test, run.rows[-1]
    images, targets = zip(*(test[i] for i in range(min(4, len(test)))), strict=True)
    title = (
        f"{short_path(run.out.resolve())}: AP {row['ap']:.1%}, AP50 {row['ap50']:.1%} on "
        f"{len(test):,} images of {test.name}, the first {len(images)} shown"
    )
    predictions = predict(run.detector, images)
    figure = figure_detections(images, targets, predictions, run.data.classes, title=title)
    save_figure(figure, run.out / "detections.png")
