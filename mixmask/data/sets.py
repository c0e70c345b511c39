"""Data sets by name, folder or function: images in memory, or stored ones, and their labels."""

from __future__ import annotations

import hashlib
import os
import statistics
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixmask._checks import check_choice
from mixmask.data.datasets import MapDataset, call_function, describe_door, is_function
from mixmask.data.folders import Files, ImageSource, Listed, list_folder
from mixmask.data.given import list_datasets
from mixmask.data.images import UnreadableError, is_deep, read_deep
from mixmask.data.named import NAMED, load_named
from mixmask.data.resources import MAX_BYTES, SHARE_OF_FREE, free_bytes
from mixmask.data.stored import Images, StoredImages

__all__ = ["Images", "StoredImages"]

STREAM = ("auto", "always", "never")
# Images that tell how large a data set's images are, and how bright.
_LOOKED = 16
# 16-bit images that reach less than this share of their range would keep few of 256 grey levels.
_DIM = 1 / 8

# Data sets with a recipe that must be downloaded by hand.
_UNPACKED = ("tiny-imagenet", "imagenette", "imagenet100", "imagenet")


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) and, where they are known, labels (N,) int64.

    Attributes:
        images: uint8, or float32 within [0, 1]; in memory or stored.
        labels: None where they are not known, -1 for an image without one.
        names: Of images in memory that were read from files, relative to the split's folder.
        lost: The files that could not be read into memory: place among all, name and label.
    """

    images: Images
    labels: Tensor | None = None
    names: tuple[str, ...] = ()
    lost: tuple[tuple[int, str, int], ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files, relative to the split's folder: class/name.jpg."""
        if isinstance(self.images, StoredImages) and isinstance(self.images.source, Files):
            return tuple(map(self.images.source.name, range(len(self.images))))
        return self.names

    @property
    def listed(self) -> tuple[tuple[str, int], ...]:
        """The name and label (0 without labels) of each file, those that are lost too."""
        names = self.files
        labels = [0] * len(names) if self.labels is None or not names else self.labels.tolist()
        listed = list(zip(names, labels, strict=True))
        for place, name, label in self.lost:
            listed.insert(place, (name, label))
        return tuple(listed)

    def subset(self, index: Tensor) -> Split:
        """Return some of the images, by their indices (n,); files that are lost belong to none."""
        images = self.images
        images = images[index] if isinstance(images, Tensor) else images.subset(index)
        names = tuple(self.names[i] for i in index.tolist()) if self.names else ()
        return Split(images, None if self.labels is None else self.labels[index], names)

    def drop_unlabelled(self) -> Split:
        """Return the images that have a label."""
        assert self.labels is not None
        known = self.labels >= 0
        # Selecting copies, which is slow for a large data set.
        return self if known.all() else self.subset(known.nonzero()[:, 0])


@dataclass(frozen=True)
class ImageData:
    """A training split and, where there is one, a test split."""

    train: Split
    test: Split | None
    classes: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Channels of all images, for which a backbone is built."""
        return self.train.images.shape[1]

    @property
    def labelled(self) -> bool:
        """Whether accuracy can be measured: labels on both splits."""
        return self.test is not None and None not in (self.train.labels, self.test.labels)

    @property
    def streamed(self) -> bool:
        """Whether the images stay where they are stored."""
        return isinstance(self.train.images, StoredImages)

    def labelled_splits(self) -> tuple[Split, Split]:
        """Return both splits without the images that have no label, as most of STL-10's."""
        assert self.test is not None
        return self.train.drop_unlabelled(), self.test.drop_unlabelled()

    def fingerprint(self) -> dict[str, object]:
        """Return what tells data apart, as `config.json` has it.

        These are the numbers of training and test images, the names of the classes, and two
        checksums: "sum" is of the files' names or, where they have none, of some images, "labels"
        of all labels.
        """
        digest, labels = (hashlib.blake2b(digest_size=8) for _ in range(2))
        splits = [split for split in (self.train, self.test) if split]
        for split in splits:
            for name, label in split.listed:
                digest.update(os.fsencode(f"{name}\n"))
                labels.update(b"%d " % label)
            if not split.files:
                labels.update(str(None if split.labels is None else split.labels.tolist()).encode())
                looked = split.images[_spread(len(split.images))]
                digest.update(looked.cpu().contiguous().numpy().tobytes())
        # Files that cannot be read count, as they do where images stay on disk.
        train, test = (
            len(split.images) + len(split.lost) if split else 0 for split in (self.train, self.test)
        )
        return {
            "train": train, "test": test, "classes": list(self.classes),
            "sum": digest.hexdigest(), "labels": labels.hexdigest(),
        }  # fmt: skip


def hold_out(data: ImageData, share: float, *, seed: int = 0) -> ImageData:
    """Set a share of each class's training images aside as the test split.

    Args:
        data: Labelled, without a test split.
        share: Of each class, 0 ... 1; at least one image, and at least one is left.
        seed: Of the choice.

    Raises:
        ValueError: If there are no labels, a test split is there already, a class has but one
            image, or the share is out of its range.

    Example:
        >>> train = Split(torch.zeros(8, 3, 4, 4), torch.arange(8) % 2)
        >>> data = hold_out(ImageData(train, None, ("cat", "dog")), 0.25)
        >>> data.test.labels.tolist()
        [0, 1]
    """
    labels = data.train.labels
    if labels is None:
        raise ValueError("holding out images needs labels, got none; leave it out")
    if data.test is not None:
        raise ValueError("the data has a test split already, so none is held out; leave it out")
    if not 0 < share < 1:
        raise ValueError(f"the share held out must lie between 0 and 1, got {share}; use 0.1")
    lost = data.train.lost
    if lost:  # They take their places, so that the choice is that of images on disk.
        labels = torch.tensor([label for _, label in data.train.listed])
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels[labels >= 0].unique().tolist():
        index = (labels == label).nonzero()[:, 0]  # (n,)
        if len(index) < 2:
            name = data.classes[label]
            raise ValueError(f"class {name} has one image, which cannot be split; add images")
        count = min(max(1, round(share * len(index))), len(index) - 1)  # 1 is left on each side.
        held[index[torch.randperm(len(index), generator=generator)[:count]]] = True
    train, test = (_take(data.train, side) for side in (~held, held))
    return replace(data, train=train, test=test)


def _take(split: Split, chosen: Tensor) -> Split:
    """Return the part of a split that a mask (N,) over all of its files chooses."""
    read = torch.ones(len(chosen), dtype=torch.bool)
    read[[place for place, _, _ in split.lost]] = False
    lost = [
        (int(chosen[:place].sum()), name, label)
        for place, name, label in split.lost
        if chosen[place]
    ]
    return replace(split.subset(chosen[read].nonzero()[:, 0]), lost=tuple(lost))


class DataListing(NamedTuple):
    """What is known of data before they are read; see `ListedData`."""

    title: str  # Their name in messages.
    train: Listed
    test: Listed | None
    classes: tuple[str, ...]
    side: float  # Median of the shorter sides of a few images, in pixels; infinity for none.


GivenData = str | Path | MapDataset | tuple[MapDataset, MapDataset] | Mapping[str, MapDataset]


def list_data(data: GivenData) -> DataListing:
    """List a folder or archive of images, or a data set of one's own, and look at a few images.

    Args:
        data: See `load_data`, which also takes what this returns; none of the named data sets.

    Raises:
        ValueError, OSError: As from `load_data`.

    Example:
        >>> list_data([torch.zeros(3, 40, 50)] * 2).side
        40.0
    """
    if not isinstance(data, (str, Path)):
        title, splits = "the data set", list_datasets("the data set", data)
    elif is_function(title := str(data)):
        title = f"--data {title}"
        splits = list_datasets(title, call_function(str(data)))
    else:
        splits = list_folder(_check_path(title))
    return DataListing(title, *splits, _look(title, splits.train.files))


def load_data(
    name: GivenData | DataListing,
    image_size: int,
    root: Path | None = None,
    *,
    stream: str = "auto",
) -> ImageData:
    """Load a data set by name, a folder or archive of images, or a data set of one's own.

    See `list_folder` for the layouts of folders, and `DatasetImages` for the items of data sets.
    The images of both are cropped to their central squares and resized to 8/7 of `image_size`.
    They are kept in memory if they take at most 24 GiB and a quarter of what is free, of the
    host and of the GPU; otherwise they stay where they are, as `StoredImages`.

    Files become RGB of 8 bits, upright as their EXIF orientation says. Greyscale images of 16 and
    32 bits are divided by the range of their format, 65,535 for integers and 1 for floats.

    Args:
        name: "clothing64", "cifar10", "cifar100", "stl10"; a path; "package.module:function",
            which returns a data set or a training and a test one; these themselves; or what
            `list_data` returned for them.
        image_size: Size of the views, in pixels.
        root: Where torchvision keeps its downloads. Default: ~/.cache/mixmask.
        stream: "always" leaves images where they are, "never" keeps them in memory.

    Raises:
        ValueError: If there is no such data, it does not fit into memory with "never", or is
            already there with "always".
        OSError: If nothing in it can be read.
    """
    check_choice("--stream", stream, STREAM)
    if isinstance(name, str) and name in NAMED:
        if stream == "always":
            raise ValueError(
                f"--stream always needs a folder of images, got --data {name}; leave it out"
            )
        train_pair, test_pair, classes = load_named(name, root)
        named = ImageData(Split(*train_pair), Split(*test_pair), classes)
        _warn_small(name, named.train.images.shape[-1], image_size)
        return named
    listing = name if isinstance(name, DataListing) else list_data(name)
    title, train, test, classes, side = listing
    _warn_small(title, side, image_size)
    size = round(image_size * 8 / 7)  # As 256 to 224: crops of it lose little of the image.
    count = len(train.files) + (len(test.files) if test else 0)
    needed = count * train.files.channels * size * size * train.files.dtype.itemsize
    streams = _streams(stream, title, needed)
    splits = [_take_split(listed, size, streams=streams) for listed in (train, test) if listed]
    return ImageData(splits[0], splits[1] if test else None, classes)


def _check_path(name: str) -> Path:
    """Return the path of a folder or an archive."""
    path = Path(name)
    if path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file()):
        return path
    if name.startswith("<"):
        raise ValueError(
            f"the data set {name} was given from Python; give it again as data=, or pass a folder "
            "or package.module:function with --data"
        )
    fix = f"unpack {name} and pass its folder, with --recipe {name}"
    if name not in _UNPACKED:
        fix = describe_door(path) or "see `Your own data` in the trainers' README for other kinds"
    raise ValueError(
        f"--data must be a folder or one of {', '.join(NAMED)}, a .zip file of a folder, or "
        f"package.module:function, got {name}; {fix}"
    )


def _streams(stream: str, title: str, needed: int) -> bool:
    """Decide whether images stay where they are stored; all processes decide alike."""
    free = free_bytes()
    if stream == "never" and needed > free:
        raise ValueError(
            f"the images of {title} take {needed / 2**30:.3g} GiB in memory, and "
            f"{free / 2**30:.3g} GiB are free; leave out --stream never, or use a smaller "
            "--image-size"
        )
    too_many = needed > min(MAX_BYTES, SHARE_OF_FREE * free)
    choice = stream == "always" or (stream == "auto" and too_many)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return choice
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([choice])[0])


def _warn_small(title: str, side: float, image_size: int) -> None:
    """Warn where views are much larger than the images that they are taken from."""
    if image_size > 2 * side:
        warnings.warn(
            f"the images of {title} are about {side:.0f} px, and views of {image_size} px enlarge "
            f"them; --image-size {side:.0f} is faster",
            stacklevel=3,
        )


def _look(title: str, source: ImageSource) -> float:
    """Return the median of the shorter sides of a few images, in pixels; infinity for none."""
    sides: list[int] = []
    reached: list[float] = []
    for number in _spread(len(source)).tolist():
        # What cannot be read is named when all images are.
        with suppress(UnreadableError), source.open(number) as image:
            if isinstance(image, Tensor):
                sides.append(min(image.shape[1:]))
                continue
            sides.append(min(image.size))
            if is_deep(image):
                reached.append(read_deep(image).max().item())
    # Of 12 bits in files of 16, say, the 4,096 grey levels would become 16.
    if reached and max(reached) < _DIM:
        raise ValueError(
            f"the greyscale images of {title} reach {max(reached):.2%} of their format's range, of "
            f"which 8 bits keep {round(255 * max(reached)) + 1} levels; divide them by their own "
            "largest value in a function, --data package.module:function"
        )
    return statistics.median(sides) if sides else float("inf")


def _spread(count: int) -> Tensor:
    """Return the numbers of a few images, evenly spread."""
    return torch.linspace(0, count - 1, min(count, _LOOKED), dtype=torch.float64).long()


def _take_split(listed: Listed, size: int, *, streams: bool) -> Split:
    """Leave images where they are, or read all that can be read into memory."""
    stored = StoredImages(listed.files, size)
    if streams:
        return Split(stored, listed.labels)
    names = Split(stored).files
    split = Split(stored[:], listed.labels, names)
    stored.warn_rest()
    if not stored.unreadable:
        return split
    kept = [number for number in range(len(stored)) if number not in stored.unreadable]
    lost = [
        (number, names[number], 0 if listed.labels is None else int(listed.labels[number]))
        for number in sorted(stored.unreadable)
        if names
    ]
    return replace(split.subset(torch.tensor(kept)), lost=tuple(lost))
