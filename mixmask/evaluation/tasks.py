"""What is evaluated: backbones from checkpoints, and the images that they share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from mixmask.checkpoints.load import load_backbone
from mixmask.data.sets import Split
from mixmask.evaluation.features import extract_features
from mixmask.runs.images import load_images
from mixmask.runs.options import check_options, check_range


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
class Options:
    """What all protocols share: options as fields, checked when they are set."""

    def __post_init__(self) -> None:
        """Check the limits of the options."""
        check_options(self)


class Details(TypedDict, total=False):
    """What a protocol reports beside its scores; the last ones only where it has them."""

    n_train: int
    k: int  # Neighbours that voted.
    batch_size: int  # That was used.
    dim: int  # Width of the features.
    penalty: float  # L2 penalty that was chosen.
    schedule: str  # Of the learning rate.
    subset: str  # How the training images were chosen.
    frozen_top1: float  # Accuracy of a linear probe before fine-tuning, on the same images.


@dataclass(frozen=True)
class Task:
    """Backbones, and the images that measure them or are shown.

    Attributes:
        backbones: (n, 3, H, W) -> (n, D) each, on the device that computes.
        sources: Where each of them and the images come from.
        train: (N, 3, H, W) uint8, labels (N,) where they are known, file names.
        test: (M, 3, H, W) uint8 likewise; `train` itself where there is no other split.
        classes: Names of the classes.
    """

    backbones: tuple[nn.Module, ...]
    sources: tuple[Source, ...]
    train: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the backbones compute."""
        return next(self.backbones[0].parameters()).device

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Labels (N,) and (M,) int64 of both splits; a ValueError where they are missing."""
        data = self.sources[0].data
        fix = "pass a folder with train and test (or val), each with one folder per class"
        if self.test is self.train:
            raise ValueError(f"--data {data} has no test split; {fix}")
        if self.train.labels is None or self.test.labels is None:
            raise ValueError(f"--data {data} has no labels; {fix}")
        return self.train.labels, self.test.labels

    def features(self) -> tuple[Tensor, Tensor]:
        """Compute the features (N, D) and (M, D) of both splits by the first backbone."""
        splits = (self.train, self.test)
        x, x_test = (extract_features(self.backbones[0], split.images) for split in splits)
        return x, x_test


def load_task(
    *runs: Path,
    data: str | None = None,
    image_size: int | None = None,
    arch: str | None = None,
    small_stem: bool | None = None,
    device: torch.device | str = "cpu",
    labelled: bool = True,
) -> Task:
    """Load backbones, and the images that they share.

    Args:
        *runs: Run folders or checkpoint files.
        data: Name of a data set, or a folder. Default: the runs' own.
        image_size: Height and width of the views, in pixels. Default: the runs' own, or 224.
        arch: As in `load_backbone`.
        small_stem: As in `load_backbone`.
        device: Where to compute.
        labelled: Whether labels on both splits are needed, as they are to measure.

    Raises:
        ValueError: If a checkpoint or the data cannot be loaded, the runs used different data, or
            labels are missing.
    """
    loaded = [load_backbone(run, arch=arch, small_stem=small_stem) for run in runs]
    names = {str(each.config["data"]) for each in loaded if each.config.get("data")}
    if data is None and len(names) != 1:
        problem = f"used {', '.join(sorted(names))}" if names else "do not record their data"
        raise ValueError(f"the runs {problem}; name the data to look at with --data")
    data = data or names.pop()
    if image_size is None:
        image_size = max(int(each.config.get("image_size", 0)) for each in loaded) or 224
    check_range("image_size", image_size, 1)
    # A run's own images must be those that it was started on.
    own = [each.config for each in loaded if each.config.get("data") == data]
    images = load_images(own[0] if own else {}, image_size, data=data, where=str(runs[0]))
    train = images.train
    if images.labelled:  # STL-10's unlabelled images can neither vote nor be named.
        (known, labels), _ = images.labelled_splits()
        train = dataclasses.replace(train, images=known, labels=labels)
    task = Task(
        tuple(each.backbone.to(device).to(memory_format=torch.channels_last) for each in loaded),
        tuple(
            Source(str(run), each.layout, each.arch, each.small_stem, data, image_size)
            for run, each in zip(runs, loaded, strict=True)
        ),
        train,
        images.test or train,
        images.classes,
    )
    if labelled:
        _ = task.labels
    return task
