"""Object detection on a pretrained backbone: training, average precision, results."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import horizontal_flip
from tqdm import tqdm

from mixmask._seeds import fold_seed
from mixmask.detection.config import DetectionConfig
from mixmask.detection.data import DetectionData, Target
from mixmask.detection.metrics import batches, evaluate_detector
from mixmask.detection.model import batch_norms, train_mode
from mixmask.detection.run import (
    Row,
    Run,
    generator,
    write_json,
)

# Seconds between two checkpoints within an epoch.
_SAVE_EVERY = 300
# Batches from which the statistics of batch norm are measured anew before a test.
_STATISTICS = 50


def train_detector(
    config: DetectionConfig,
    data: DetectionData,
    backbone: nn.Module,
    out: Path,
    *,
    source: dict[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a detector, leaving `config.json`, `results.json` and `last.pt` in a folder.

    SGD with momentum 0.9; the learning rate rises over the first steps and drops to a tenth after
    3/4 and again after 11/12 of the run. Images are flipped at random and resized to a random
    one of eleven sizes. Before each test the statistics of tuned batch norms are measured anew.
    Every step's randomness follows from (seed, step), so a run that was stopped and resumed ends
    in the same weights as one that was not.

    Args:
        config: The run's options.
        data: The two splits; with masks for Mask R-CNN.
        backbone: A model of timm's, which the detector takes over.
        out: The run folder, made if need be.
        source: What results.json should say of the backbone.
        resume: Go on from the newest whole checkpoint in `out`.
        progress: Show a progress bar.
        on_row: Called with what was measured after each epoch.

    Returns:
        The detector and the content of `results.json`.

    Raises:
        ValueError: If the backbone does not suit, or there is nothing to resume.
        FloatingPointError: If the loss is no longer finite; the last checkpoint is kept.
    """
    run = Run.build(config, data, backbone, out, source or {})
    if resume:
        run.load()
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(dataclasses.asdict(config), out / "config.json")
    total = run.steps * config.epochs
    with tqdm(total=total, initial=run.step, unit="step", disable=not progress) as bar:
        for epoch in range(run.step // run.steps + 1, config.epochs + 1):
            row = {"epoch": epoch, **_train_epoch(run, epoch, bar)}
            last = epoch == config.epochs
            if last or (config.monitor and epoch % config.monitor == 0):
                row.update(_test(run))
            run.rows.append(row)
            run.save()
            if on_row:
                on_row(row)
    return run.detector, run.results()


def _train_epoch(run: Run, epoch: int, bar: Any) -> Row:
    """Train one epoch, or what a resumed run has left of it."""
    config, began = run.config, time.perf_counter()
    saved = began
    train_mode(run.detector)
    done = run.step % run.steps
    # What a checkpoint within the epoch took down, so that its means are whole.
    sums, seconds = dict(run.sums), run.seconds
    order = torch.randperm(len(run.data.train), generator=generator(config.seed, "order", epoch))
    index = order[: run.steps * config.batch_size].tolist()[done * config.batch_size :]
    for batch in batches(run.data.train, index, config.batch_size, config.workers):
        losses = _train_step(run, batch)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss
        if not math.isfinite(sum(losses.values())):
            raise FloatingPointError(
                f"the loss became {sum(losses.values())} in epoch {epoch}; lower --lr"
            )
        run.step += 1
        bar.update()
        bar.set_postfix_str(f"loss {sum(losses.values()):.3f}")
        if time.perf_counter() - saved > _SAVE_EVERY and run.step % run.steps:
            saved = time.perf_counter()
            run.sums, run.seconds = sums, seconds + saved - began
            run.save()
    run.sums, run.seconds = {}, 0.0
    means = {name: total / run.steps for name, total in sums.items()}
    return {
        "loss": sum(means.values()),
        **means,
        "seconds": seconds + time.perf_counter() - began,
        "lr": run.optimizer.param_groups[0]["lr"],
    }


def _train_step(run: Run, batch: list[tuple[Tensor, Target]]) -> dict[str, float]:
    """Take one step on a batch and return the losses."""
    images, targets = _flipped(batch, generator(run.config.seed, "flips", run.step), run.device)
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


def _flipped(
    batch: list[tuple[Tensor, Target]], draw: torch.Generator, device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Bring a batch to the device as floats, half of its images flipped from left to right."""
    images, targets = [], []
    flips = torch.rand(len(batch), generator=draw) < 0.5
    for flip, (image, annotated) in zip(flips.tolist(), batch, strict=True):
        target = {name: value.to(device) for name, value in annotated.items()}
        pixels = image.to(device).float() / 255
        if flip:
            pixels = horizontal_flip(pixels)
            left, top, right, bottom = target["boxes"].unbind(1)
            width = pixels.shape[-1]
            target["boxes"] = torch.stack([width - right, top, width - left, bottom], dim=1)
            if "masks" in target:
                target["masks"] = target["masks"].flip(-1)
        images.append(pixels)
        targets.append(target)
    return images, targets


def _test(run: Run) -> Row:
    _measure_statistics(run)
    began = time.perf_counter()
    measured = evaluate_detector(
        run.detector,
        run.data.test,
        run.data.classes,
        batch_size=run.config.batch_size,
        workers=run.config.workers,
    )
    return {**measured, "test_seconds": time.perf_counter() - began}


@torch.no_grad()
def _measure_statistics(run: Run) -> None:
    """Replace running means by means over training batches with the weights as they are now.

    Running means lag behind the weights, which harms a detector more than a classifier (MoCo's
    configuration asks for it as `PRECISE_BN`).
    """
    tuned = [norm for norm in batch_norms(run.detector) if norm.weight.requires_grad]
    if not tuned:
        return
    config = run.config
    train_mode(run.detector)
    momenta = [norm.momentum for norm in tuned]
    for norm in tuned:
        norm.reset_running_stats()
        norm.momentum = None  # A plain mean over all batches.
    order = torch.randperm(len(run.data.train), generator=generator(config.seed, "statistics"))
    index = order[: min(_STATISTICS, run.steps) * config.batch_size].tolist()
    torch.manual_seed(fold_seed(config.seed, "statistics"))
    for batch in batches(run.data.train, index, config.batch_size, config.workers):
        run.detector(*_flipped(batch, generator(config.seed, "statistics"), run.device))
    for norm, momentum in zip(tuned, momenta, strict=True):
        norm.momentum = momentum
