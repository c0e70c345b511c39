"""Data sets as uint8 tensors that stay on the device."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mixmask.datasets import clothing64

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# Larger folders do not belong in memory.
_MAX_BYTES = 24 * 2**30


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8 and, where they are known, labels (N,) int64.

    Those of a folder keep their names, relative to that of the split: class/name.jpg.
    """

    images: Tensor
    labels: Tensor | None = None
    files: tuple[str, ...] = ()


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


def load_data(name: str, image_size: int, root: Path | None = None) -> ImageData:
    """Load a data set by name, or a folder of images.

    A folder may hold `train` and `test` (or `val`) folders; each with one folder a class, or
    with images at any depth, which then have no labels. Images are cropped to squares; those
    of a folder are resized to 8/7 of `image_size`.

    Args:
        name: "clothing64", "cifar10", "cifar100", "stl10", or a path.
        image_size: Size of the views, in pixels.
        root: Where torchvision keeps its downloads. Default: ~/.cache/mixmask.

    Raises:
        ValueError: If there is no such data, or nothing in it can be read.
    """
    if name == "clothing64":
        (train, train_labels), (test, test_labels), classes = clothing64()
        return ImageData(
            Split(_decode(train), torch.tensor(train_labels)),
            Split(_decode(test), torch.tensor(test_labels)),
            tuple(classes),
        )
    if name in _TORCHVISION:
        return _TORCHVISION[name](root or Path.home() / ".cache" / "mixmask")
    path = Path(name)
    if not path.is_dir():
        known = ", ".join(["clothing64", *_TORCHVISION])
        raise ValueError(f"--data must be a folder or one of {known}, got {name}")
    return _folder(path, round(image_size * 8 / 7))


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


def _folder(path: Path, size: int) -> ImageData:
    train_path, test_path = path, None
    if (path / "train").is_dir():
        train_path = path / "train"
        tests = (path / name for name in ("test", "val"))
        test_path = next((folder for folder in tests if folder.is_dir()), None)
    classes = _class_names(train_path)
    train = _read_split(train_path, size, classes)
    test = None if test_path is None else _read_split(test_path, size, classes)
    return ImageData(train, test, classes)


def _class_names(path: Path) -> tuple[str, ...]:
    """Name the class folders: those at the top that hold images, if no image lies beside them."""
    if any(_is_image(file) for file in path.iterdir()):
        return ()
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    return tuple(folder.name for folder in folders if any(map(_is_image, folder.rglob("*"))))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def _read_split(path: Path, size: int, classes: tuple[str, ...]) -> Split:
    files = sorted(file for file in path.rglob("*") if _is_image(file))
    if not files:
        raise ValueError(
            f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}); pass the folder above them"
        )
    needed = len(files) * 3 * size * size
    if needed > _MAX_BYTES:
        raise ValueError(
            f"{path} holds {len(files):,} images, {needed / 2**30:.0f} GiB at {size} px, which is "
            f"more than the {_MAX_BYTES / 2**30:.0f} GiB kept in memory; use a smaller "
            "--image-size or a part of the images"
        )
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    labels: list[int] = []
    names: list[str] = []
    unreadable: list[Path] = []
    with ThreadPoolExecutor() as pool:
        for file, image in zip(files, _lazily(pool, files, size), strict=True):
            if image is None:
                if not unreadable:
                    warnings.warn(f"skipped {file}, which is no readable image", stacklevel=2)
                unreadable.append(file)
                continue
            images[len(labels)] = torch.from_numpy(image).permute(2, 0, 1)
            names.append(file.relative_to(path).as_posix())
            top = file.relative_to(path).parts[0]
            labels.append(classes.index(top) if top in classes else -1)
    if not labels:
        raise ValueError(f"none of the {len(files)} images in {path} can be read")
    if unreadable:
        warnings.warn(f"skipped {len(unreadable)} unreadable images in {path}", stacklevel=2)
    known = bool(classes) and min(labels) >= 0
    return Split(images[: len(labels)], torch.tensor(labels) if known else None, tuple(names))


def _lazily(
    pool: ThreadPoolExecutor, files: list[Path], size: int
) -> Iterable[np.ndarray[Any, Any] | None]:
    """Read images in threads, a few ahead, so that not all wait in memory."""
    remaining = iter(files)
    while chunk := list(islice(remaining, 256)):
        yield from pool.map(lambda file: read_square(file, size), chunk)


def read_square(file: Path, size: int) -> np.ndarray[Any, Any] | None:
    """Read an image, crop its central square and resize it: (size, size, 3) uint8, or None."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))
