"""What is evaluated: a backbone from a checkpoint, and labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mixmask.checkpoints.load import Loaded, load_backbone
from mixmask.data.sets import Images, load_data
from mixmask.runs.options import check_range


@dataclass(frozen=True)
class Source:
    """Where a backbone and its images come from, see `mixmask.checkpoints.load.Loaded`."""

    checkpoint: str
    layout: str
    arch: str
    small_stem: bool
    data: str
    image_size: int  # Height and width, in pixels.


@dataclass(frozen=True)
class Task:
    """A backbone and the labelled images that measure it.

    Attributes:
        backbone: (n, 3, S, S) -> (n, D), on the device that computes.
        source: Where backbone and images come from.
        train: (N, 3, H, W) uint8.
        train_labels: (N,) int64.
        test: (M, 3, H, W) uint8.
        test_labels: (M,) int64.
        classes: Names of the classes.
        files: Names of the training images; empty for images without files.
    """

    backbone: nn.Module
    source: Source
    train: Images
    train_labels: Tensor
    test: Images
    test_labels: Tensor
    classes: tuple[str, ...]
    files: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        return next(self.backbone.parameters()).device


def load_task(
    run: Path,
    *,
    data: str | None = None,
    image_size: int | None = None,
    arch: str | None = None,
    small_stem: bool | None = None,
    device: torch.device | str = "cpu",
) -> Task:
    """Load a backbone and labelled images.

    Args:
        run: A run folder or a checkpoint file.
        data: Name of a data set, or a folder. Default: the run's own.
        image_size: Height and width of the views, in pixels. Default: the run's own, or 224.
        arch: As in `load_backbone`.
        small_stem: As in `load_backbone`.
        device: Where to compute.

    Raises:
        ValueError: If the checkpoint or the data cannot be loaded, or labels are missing.
    """
    (loaded,), data, size = load_sources(
        [run], data=data, image_size=image_size, arch=arch, small_stem=small_stem, device=device
    )
    images = load_data(data, size)
    fix = "pass a folder with train and test (or val), each with one folder per class"
    if images.test is None:
        raise ValueError(f"--data {data} has no test split; {fix}")
    if not images.labelled:
        raise ValueError(f"--data {data} has no labels; {fix}")
    (train, train_labels), (test, test_labels) = images.labelled_splits()
    return Task(
        loaded.backbone,
        Source(str(run), loaded.layout, loaded.arch, loaded.small_stem, data, size),
        train,
        train_labels,
        test,
        test_labels,
        images.classes,
        images.train.files,
    )


def load_sources(
    runs: Sequence[Path],
    *,
    data: str | None,
    image_size: int | None,
    arch: str | None,
    small_stem: bool | None,
    device: torch.device | str,
) -> tuple[list[Loaded], str, int]:
    """Load backbones onto a device, and choose the data and the image size that they share."""
    loaded = [load_backbone(run, arch=arch, small_stem=small_stem) for run in runs]
    recorded = [each.config for each in loaded]
    names = {str(config["data"]) for config in recorded if config.get("data")}
    if data is None and len(names) != 1:
        problem = f"used {', '.join(sorted(names))}" if names else "do not record their data"
        raise ValueError(f"the runs {problem}; name the data to look at with --data")
    if image_size is None:
        image_size = max(int(config.get("image_size", 0)) for config in recorded) or 224
    check_range("image_size", image_size, 1)
    for each in loaded:
        each.backbone.to(device).to(memory_format=torch.channels_last)
    return loaded, names.pop() if data is None else data, image_size
