"""What is evaluated: backbones from checkpoints, and the images that they share."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn

from mixmask._checks import check_integer
from mixmask._devices import choose_device
from mixmask.checkpoints.load import Loaded, load_backbone
from mixmask.data.sets import Images, Split
from mixmask.data.views import MEAN, STD, Normalization
from mixmask.evaluation.features import extract_features, only_size
from mixmask.evaluation.metrics import Interval
from mixmask.figures.style import short_path
from mixmask.runs.images import check_code, load_images
from mixmask.runs.options import LARGEST, check_options, check_range, flag
from mixmask.runs.records import plural


@dataclass(frozen=True)
class BackboneSource:
    """Where a backbone and its images come from, see `mixmask.checkpoints.load.Loaded`."""

    checkpoint: str  # The run folder or the file, as it was named.
    layout: str
    arch: str
    small_stem: bool
    data: str  # Name of a data set, or the absolute path of a folder.
    image_size: int  # Height and width at which the backbone sees images, in pixels.
    mean: tuple[float, ...] = MEAN  # Of each channel, by which images are normalised.
    std: tuple[float, ...] = STD
    file: str = ""  # That was read, of a run folder "last.pt" or an older one.
    sha256: str = ""  # Of that file, as `sha256sum` prints it.
    step: int | None = None  # Done by one of our runs; unknown of others, as are its epochs.
    epoch: int | None = None
    planned_epochs: int | None = None

    @property
    def normalization(self) -> Normalization:
        """Mean and deviation of each channel."""
        return self.mean, self.std

    @property
    def unfinished(self) -> bool:
        """Whether the run had epochs left to do."""
        return None not in (self.epoch, self.planned_epochs) and self.epoch != self.planned_epochs

    @property
    def title(self) -> str:
        """The run's name for titles and messages, which says how far an unfinished one came."""
        name, state = short_path(Path(self.checkpoint).resolve()), ""
        if self.unfinished:
            state = f" (unfinished, epoch {self.epoch} of {self.planned_epochs})"
        return name + state


@dataclass(frozen=True)
class ProtocolOptions:
    """What all protocols share: options as fields, checked when they are set."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def label(self) -> str:
        """The name, and each option that is not at its default, as results are named by them."""
        label = self.name
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                # A number is written alike from Python and from the command line: 50 and 50.0.
                text = Path(value).stem if isinstance(value, str) else f"{value:.10g}"
                label += f"_{flag(field.name)[2:]}-{text}"
        return label


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
    frozen_interval: Interval


@dataclass(frozen=True, repr=False)
class Task:
    """Backbones, and the images that measure them or are shown.

    Attributes:
        backbones: (n, C, H, W) -> (n, D) each, on the device that computes.
        sources: Where each of them and the images come from.
        train: (N, C, H, W) uint8 or float, labels (N,) where they are known, file names.
        test: (M, C, H, W), in the same form; `train` itself where there is no other split.
        classes: Names of the classes.
    """

    backbones: tuple[nn.Module, ...]
    sources: tuple[BackboneSource, ...]
    train: Split
    test: Split
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        names = ", ".join(f"{source.arch} of {source.title}" for source in self.sources)
        return (
            f"Task({names} on {self.sources[0].data}: {len(self.train.images):,} images to train, "
            f"{len(self.test.images):,} to test, {len(self.classes)} classes, {self.device})"
        )

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
            raise ValueError(f"--data {data} has no test split; {fix}, or train with --holdout 0.1")
        if self.train.labels is None or self.test.labels is None:
            raise ValueError(f"--data {data} has no labels; {fix}")
        return self.train.labels, self.test.labels

    def extract(self, images: Images, number: int = 0) -> Tensor:
        """Compute the features (n, D) of images (n, C, H, W) by one of the backbones."""
        source, backbone = self.sources[number], self.backbones[number]
        return extract_features(
            backbone, images, size=source.image_size, normalization=source.normalization
        )

    def features(self) -> tuple[Tensor, Tensor]:
        """Compute the features (N, D) and (M, D) of both splits by the first backbone."""
        return self.extract(self.train.images), self.extract(self.test.images)


def load_task(
    *runs: Path | str,
    data: str | Path | None = None,
    image_size: int | None = None,
    arch: str | None = None,
    small_stem: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str | int | None = None,
    labelled: bool = True,
) -> Task:
    """Load backbones, and the images that they share.

    Args:
        *runs: Run folders or checkpoint files.
        data: Name of a data set, or a folder. Default: the runs' own.
        image_size: Height and width at which all backbones see the images, in pixels. Default:
            each run's own; of other checkpoints the only one that the backbone takes, or 224.
        arch: As in `load_backbone`.
        small_stem: As in `load_backbone`.
        mean: As in `load_backbone`.
        std: As in `load_backbone`.
        device: Where to compute. Default: a GPU where there is one.
        labelled: Whether labels on both splits are needed, as they are to measure.

    Raises:
        ValueError: If a checkpoint or the data cannot be loaded, the runs used different data,
            the backbone does not take the image size or channels, or labels are missing.
    """
    if not runs:
        raise ValueError("a task needs a run folder or a checkpoint file, got none; name one")
    device = choose_device(device)
    loaded = [
        load_backbone(run, arch=arch, small_stem=small_stem, mean=mean, std=std) for run in runs
    ]
    names = {str(each.config["data"]) for each in loaded if each.config.get("data")}
    if data is None and len(names) != 1:
        problem = f"used {', '.join(sorted(names))}" if names else "do not record their data"
        raise ValueError(f"the runs {problem}; name the data to look at with --data")
    if data is None:
        check_code(next(iter(names)), runs[0])
    data = str(data or names.pop())
    sizes = [_choose_size(each, image_size) for each in loaded]
    # A run's own images must be those that it was started on.
    own = [each.config for each in loaded if each.config.get("data") == data]
    images = load_images(own[0] if own else {}, max(sizes), data=data, where=str(runs[0]))
    train = images.train
    for run, each in zip(runs, loaded, strict=True):
        if len(each.mean) != (channels := train.images.shape[1]):
            raise ValueError(
                f"{run} takes images of {plural(len(each.mean), 'channel')}, those of {data} have "
                f"{channels}; name others with --data"
            )
    if train.files and Path(data).exists():  # From another folder its name may mean others.
        data = str(Path(data).resolve())
    test = images.test or train
    if images.labelled:  # STL-10's unlabelled images can neither vote nor be named.
        before = len(train.images) + len(test.images)
        train, test = images.labelled_splits()
        if left := before - len(train.images) - len(test.images):
            text = f"left out of {data}: {plural(left, 'image')} without a label"
            warnings.warn(text, stacklevel=2)
    task = Task(
        tuple(each.backbone.to(device).to(memory_format=torch.channels_last) for each in loaded),
        tuple(
            _describe(run, each, data, size)
            for run, each, size in zip(runs, loaded, sizes, strict=True)
        ),
        train,
        test,
        images.classes,
    )
    if labelled:
        _ = task.labels
    return task


def _choose_size(loaded: Loaded, given: int | None) -> int:
    """Return at what size a backbone sees images: the given one, its run's, or its only one."""
    only = only_size(loaded.backbone)
    if given is None:
        return int(loaded.config.get("image_size", 0)) or only or 224
    check_integer("--image-size", given, 1, "leave it out for that of the run")
    check_range("image_size", given, None, LARGEST)
    if only not in (None, given):
        raise ValueError(f"{loaded.arch} takes images of {only} px only, got --image-size {given}")
    return given


def _describe(run: Path | str, loaded: Loaded, data: str, image_size: int) -> BackboneSource:
    """Note which file was read and, of one of our runs, how far it had come."""
    assert loaded.file is not None
    planned = None if loaded.step is None else loaded.config.get("epochs")
    names = ("layout", "arch", "small_stem", "mean", "std", "sha256", "step", "epoch")
    return BackboneSource(
        checkpoint=str(run), data=data, image_size=image_size, file=loaded.file.name,
        planned_epochs=planned, **{name: getattr(loaded, name) for name in names},
    )  # fmt: skip
