"""Data sets: uint8 tensors in memory, or folders whose files are read on demand."""

from __future__ import annotations

import io
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mixmask._checks import check_choice
from mixmask.data.clothing import clothing64
from mixmask.data.folders import Files, Listed, list_folder
from mixmask.data.resources import MAX_BYTES, SHARE_OF_FREE, available_cores, free_bytes

_Content = TypeVar("_Content")
STREAM = ("auto", "always", "never")
# How many files in a row may be unreadable before the whole folder is taken to be.
_TRIES = 100
# What Pillow raises for files that hold no image, half an image, or too large a one.
UNREADABLE = (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8 and, where they are known, labels (N,) int64.

    Attributes:
        images: In memory, or on disk.
        labels: None where they are not known.
        names: Of images in memory that were read from files, relative to the split's folder.
    """

    images: Images
    labels: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files, relative to the split's folder: class/name.jpg."""
        if isinstance(self.images, FolderImages):
            return tuple(self.images.files.name(i) for i in range(len(self.images)))
        return self.names


@dataclass(frozen=True)
class ImageData:
    """A training split and, where there is one, a labelled test split."""

    train: Split
    test: Split | None
    classes: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Whether accuracy can be measured: labels on both splits."""
        return self.test is not None and None not in (self.train.labels, self.test.labels)

    def labelled_splits(self) -> tuple[tuple[Images, Tensor], tuple[Images, Tensor]]:
        """Return the labelled images (N, 3, H, W) of both splits with their labels (N,).

        STL-10's unlabelled images are left out.
        """
        assert self.test is not None
        assert self.test.labels is not None
        assert self.train.labels is not None
        train = self.train.images, self.train.labels
        known = self.train.labels >= 0
        if not known.all():  # Selecting copies, which is slow for a large data set.
            train = self.train.images[known], self.train.labels[known]
        return train, (self.test.images, self.test.labels)

    @property
    def streamed(self) -> bool:
        """Whether the images stay on disk."""
        return isinstance(self.train.images, FolderImages)


@dataclass(frozen=True, eq=False)
class FolderImages(Sequence[Tensor]):
    """Images on disk, read as squares when they are indexed.

    Where a file cannot be read, the next one that can stands in for it, so that images and labels
    keep their places; the first such file is named in a warning, later ones are counted.

    Attributes:
        files: Where they are.
        size: Height and width of the squares, in pixels.
    """

    files: Files
    size: int
    _unreadable: set[int] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> torch.Size:
        """The shape of all squares, (N, 3, size, size)."""
        return torch.Size((len(self), 3, self.size, self.size))

    def __getitem__(self, index: Any) -> Any:
        """Read the images of an index, as a tensor would take it: (..., 3, size, size) uint8."""
        numbers = torch.arange(len(self))[index]
        squares = torch.empty(numbers.numel(), 3, self.size, self.size, dtype=torch.uint8)
        with ThreadPoolExecutor(min(16, available_cores())) as pool:
            read = pool.map(self._read, numbers.flatten().tolist())
            for place, (square, unreadable) in enumerate(read):
                squares[place] = torch.from_numpy(square).permute(2, 0, 1)
                self.note(unreadable)
        return squares.view(*numbers.shape, *squares.shape[1:])

    def _read(self, number: int) -> tuple[np.ndarray[Any, Any], list[int]]:
        return read_any(self.files, number, lambda file: read_square(file, self.size))

    def subset(self, index: Tensor) -> FolderImages:
        """Return some of the images, by their indices (n,), still on disk."""
        names = (self.files.name(i) for i in index.tolist())
        return FolderImages(Files.of(self.files.root, names), self.size)

    def note(self, unreadable: Iterable[int]) -> None:
        """Warn of files that others stand in for: the first by its name, ten, a hundred ..."""
        for number in unreadable:
            if number in self._unreadable:
                continue
            self._unreadable.add(number)
            count = len(self._unreadable)
            if count == 1:
                text = f"{self.files[number]} is no readable image; another stands in for it"
                warnings.warn(text, stacklevel=2)
            elif str(count).strip("0") == "1":
                self._warn_count()

    def warn_rest(self) -> None:
        """Say how many files could not be read so far, if there was more than one."""
        if len(self._unreadable) > 1:
            self._warn_count()

    def _warn_count(self) -> None:
        text = f"{len(self._unreadable)} unreadable images in {self.files.root} so far"
        warnings.warn(text, stacklevel=3)


Images = Tensor | FolderImages


def load_data(
    name: str, image_size: int, root: Path | None = None, *, stream: str = "auto"
) -> ImageData:
    """Load a data set by name, or a folder of images; see `list_folder` for its layouts.

    A folder's images are cropped to their central squares and resized to 8/7 of `image_size`.
    They are kept in memory if they take at most 24 GiB and a quarter of what is free, of the
    host and of the GPU; otherwise they stay on disk, as `FolderImages`.

    Args:
        name: "clothing64", "cifar10", "cifar100", "stl10", or a path.
        image_size: Size of the views, in pixels.
        root: Where torchvision keeps its downloads. Default: ~/.cache/mixmask.
        stream: "always" leaves the images of a folder on disk, "never" keeps them in memory.

    Raises:
        ValueError: If there is no such data, nothing in it can be read, it does not fit into
            memory with "never", or is no folder with "always".
    """
    check_choice("--stream", stream, STREAM)
    if name != "clothing64" and name not in _TORCHVISION:
        return _load_folder(name, image_size, stream)
    if stream == "always":
        raise ValueError(
            f"--stream always needs a folder of images, got --data {name}; leave it out"
        )
    data = _load_named(name, root)
    _warn_small(name, data.train.images.shape[-1], image_size)
    return data


def _load_named(name: str, root: Path | None) -> ImageData:
    if name == "clothing64":
        (train, train_labels), (test, test_labels), classes = clothing64()
        return ImageData(
            Split(_decode(train), torch.tensor(train_labels)),
            Split(_decode(test), torch.tensor(test_labels)),
            tuple(classes),
        )
    return _TORCHVISION[name](root or Path.home() / ".cache" / "mixmask")


def _decode(files: Iterable[bytes]) -> Tensor:
    images = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _cifar(dataset: str) -> Callable[[Path], ImageData]:
    def load(root: Path) -> ImageData:
        import torchvision

        splits = []
        for train in (True, False):
            data: Any = getattr(torchvision.datasets, dataset)(root, train=train, download=True)
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            splits.append(Split(images, torch.tensor(data.targets)))
        return ImageData(splits[0], splits[1], tuple(data.classes))

    return load


def _stl10(root: Path) -> ImageData:
    """STL-10: pretraining on its 105,000 training and unlabelled images, as its authors mean it."""
    import torchvision

    def split(name: str) -> Any:
        return torchvision.datasets.STL10(root, split=name, download=True)

    train, test = split("train+unlabeled"), split("test")
    labels = torch.from_numpy(train.labels.astype(np.int64))
    return ImageData(
        Split(torch.from_numpy(train.data), labels),
        Split(torch.from_numpy(test.data), torch.from_numpy(test.labels.astype(np.int64))),
        tuple(train.classes),
    )


_TORCHVISION: dict[str, Callable[[Path], ImageData]] = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "stl10": _stl10,
}


# Data sets with a recipe that must be downloaded by hand.
_UNPACKED = ("tiny-imagenet", "imagenette", "imagenet100", "imagenet")


def _load_folder(name: str, image_size: int, stream: str) -> ImageData:
    path = Path(name)
    if not path.is_dir():
        known = ", ".join(["clothing64", *_TORCHVISION])
        fix = f"; unpack {name} and pass its folder, with --recipe {name}"
        raise ValueError(
            f"--data must be a folder or one of {known}, got {name}"
            + (fix if name in _UNPACKED else "")
        )
    train, test, classes = list_folder(path)
    _warn_small(name, _median_side(train.files), image_size)
    size = round(image_size * 8 / 7)
    count = len(train.files) + (len(test.files) if test else 0)
    read = _leave_split if _streams(stream, path, count * 3 * size * size) else _read_split
    return ImageData(read(train, size), read(test, size) if test else None, classes)


def _streams(stream: str, path: Path, needed: int) -> bool:
    """Decide whether a folder's images stay on disk; all processes decide alike."""
    free = free_bytes()
    if stream == "never" and needed > free:
        raise ValueError(
            f"the images in {path} take {needed / 2**30:.3g} GiB in memory, and {free / 2**30:.3g} "
            "GiB are free; leave out --stream never, or use a smaller --image-size"
        )
    too_many = needed > min(MAX_BYTES, SHARE_OF_FREE * free)
    return _agree(stream == "always" or (stream == "auto" and too_many))


def _leave_split(listed: Listed, size: int) -> Split:
    return Split(FolderImages(listed.files, size), listed.labels)


def _agree(choice: bool) -> bool:
    """Return the first process's choice, since all must hold the same images."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return choice
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([choice])[0])


def _warn_small(name: str, side: float, image_size: int) -> None:
    """Warn where views are much larger than the images that they are taken from."""
    if image_size > 2 * side:
        warnings.warn(
            f"the images of {name} are about {side:.0f} px, and views of {image_size} px enlarge "
            f"them; --image-size {side:.0f} is faster",
            stacklevel=3,
        )


def _median_side(files: Files) -> float:
    """Return the median of the shorter sides of a few images, in pixels; infinity for none."""
    sides = [side for file in files.sample(16) if (side := _side(file))]
    return statistics.median(sides) if sides else float("inf")


def _side(file: Path) -> int:
    """Return an image's shorter side, without decoding it; 0 if it is none."""
    try:
        with Image.open(file) as image:
            return min(image.size)
    except UNREADABLE:
        return 0


def _read_split(listed: Listed, size: int) -> Split:
    files, root = listed.files, listed.files.root
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    kept: list[int] = []
    with ThreadPoolExecutor(available_cores()) as pool:
        for number, image in enumerate(_lazily(pool, files, size)):
            if image is not None:
                images[len(kept)] = torch.from_numpy(image).permute(2, 0, 1)
                kept.append(number)
            elif len(kept) == number:
                warnings.warn(f"skipped {files[number]}, which is no readable image", stacklevel=2)
    if not kept:
        raise ValueError(f"none of the {len(files)} images in {root} can be read")
    if len(kept) < len(files):
        skipped = len(files) - len(kept)
        warnings.warn(f"skipped {skipped} unreadable images in {root}", stacklevel=2)
    labels = None if listed.labels is None else listed.labels[kept]
    return Split(images[: len(kept)], labels, tuple(listed.files.name(i) for i in kept))


def _lazily(
    pool: ThreadPoolExecutor, files: Files, size: int
) -> Iterable[np.ndarray[Any, Any] | None]:
    """Read images in threads, a few ahead, so that not all wait in memory."""
    remaining = iter(files)
    while chunk := list(islice(remaining, 256)):
        yield from pool.map(lambda file: read_square(file, size), chunk)


def read_any(
    files: Files, number: int, read: Callable[[Path], _Content | None]
) -> tuple[_Content, list[int]]:
    """Read a file or, if it is unreadable, the next one that is not.

    Args:
        files: All files.
        number: Which one to read.
        read: Returns None for a file that cannot be read.

    Returns:
        What was read, and the numbers of the files that could not be.

    Raises:
        OSError: If the folder is gone, or a hundred files in a row are unreadable.
    """
    tried: list[int] = []
    while len(tried) < min(_TRIES, len(files)):
        content = read(files[number])
        if content is not None:
            return content, tried
        if not files.root.is_dir():
            raise FileNotFoundError(f"the folder of images, {files.root}, is gone")
        tried.append(number)
        number = (number + 1) % len(files)
    raise OSError(
        f"{len(tried)} images in a row cannot be read, the first of them {files[tried[0]]}; check "
        "whether the data set is complete"
    )


def read_square(file: Path, size: int) -> np.ndarray[Any, Any] | None:
    """Read an image, crop its central square and resize it: (size, size, 3) uint8, or None."""
    try:
        with Image.open(file) as opened:
            # A JPEG of more than twice the size is decoded at a half, a quarter or an eighth.
            opened.draft("RGB", (2 * size, 2 * size))
            image = to_rgb(opened)
    except UNREADABLE:
        return None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB, dropping transparency, of a palette too."""
    if image.mode == "RGB":
        image.load()
        return image
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
