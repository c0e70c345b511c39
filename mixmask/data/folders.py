"""Folders of images: which files there are, their splits and their classes; nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# Where a test split is looked for; the first with labels counts.
_TEST_FOLDERS = ("test", "val", "val.X")
_ANNOTATIONS = "val_annotations.txt"


@dataclass(frozen=True, eq=False)
class Files(Sequence[Path]):
    """Paths below a folder, kept as one block of bytes.

    A list of a million strings would be copied into each worker process, page by page, as their
    reference counts change.

    Attributes:
        root: The folder.
        names: All names relative to it, one after the other.
        ends: (N + 1,) int64, where the names end; the first entry is 0.

    Example:
        >>> files = Files.of(Path("photos"), ["cat/1.jpg", "dog/2.jpg"])
        >>> len(files), files[1].as_posix()
        (2, 'photos/dog/2.jpg')
    """

    root: Path
    names: bytes
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, root: Path, names: Iterable[str]) -> Files:
        """Pack names relative to a folder."""
        packed = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, packed)], dtype=np.int64)
        return cls(root, b"".join(packed), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Path | Files:
        if isinstance(index, slice):
            return Files.of(self.root, (self.name(i) for i in range(*index.indices(len(self)))))
        return self.root / self.name(index)

    def sample(self, count: int) -> Files:
        """Return about so many of them, evenly spread, or all if they are fewer."""
        return self[:: max(1, len(self) // count)]

    def name(self, index: int) -> str:
        """Return a file's name relative to the root."""
        place = range(len(self))[index]
        return os.fsdecode(self.names[self.ends[place] : self.ends[place + 1]])


class Listed(NamedTuple):
    """The files of a split and, where they are known, labels (N,) int64."""

    files: Files
    labels: Tensor | None


class ListedFolder(NamedTuple):
    """A training split, a test split where there is one, and the classes."""

    train: Listed
    test: Listed | None
    classes: tuple[str, ...]


def list_folder(path: Path) -> ListedFolder:
    """List a folder's images, in the order of their names.

    These layouts are known: images at any depth, which then have no labels; one folder a class;
    either of them within `train` and, for a test split, `test` or `val`; Tiny ImageNet's, whose
    `val/val_annotations.txt` names the classes; and ImageNet-100's in parts, `train.X1`,
    `train.X2` ... and `val.X`. Links to folders are followed; names that start with a dot are not
    looked at.

    Raises:
        ValueError: If there are fewer than two images, a class folder holds none, or the test
            split has classes that the training split has not.
    """
    parts = [part for part in (path / "train",) if part.is_dir()]
    parts = parts or sorted(part for part in path.glob("train.X*") if part.is_dir())
    tests = [path / name for name in _TEST_FOLDERS if (path / name).is_dir()] if parts else []
    listed = [_list_part(part) for part in parts or [path]]
    classes = tuple(sorted({top for part in listed for top in part.classes}))
    if any(part.flat for part in listed):
        classes = ()
    root = parts[0] if len(parts) == 1 else path
    names = [f"{part.below(root)}{name}" for part in listed for name in part.names]
    if not names:
        raise ValueError(
            f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}); pass the folder above them"
        )
    if len(names) == 1:
        raise ValueError(
            f"{path} holds one image, {names[0]}; training needs at least a batch of two"
        )
    labels = [top for part in listed for top in part.tops()] if classes else []
    train = Listed(Files.of(root, names), _to_labels(labels, classes))
    return ListedFolder(train, _choose_test(tests, classes), classes)


@dataclass(frozen=True)
class _Part:
    """A folder's images, by names relative to it, and the class folders among its folders."""

    path: Path
    names: list[str]
    classes: tuple[str, ...]
    flat: bool

    def below(self, root: Path) -> str:
        """Return the way from a root to this folder, with a slash at its end."""
        return "" if self.path == root else f"{self.path.relative_to(root).as_posix()}/"

    def tops(self) -> Iterator[str]:
        """Return the first folder on the way to each image."""
        return (name.partition("/")[0] for name in self.names)


def _list_part(path: Path) -> _Part:
    names = sorted(_walk(path), key=lambda name: name.split("/"))
    flat = any("/" not in name for name in names)
    if flat or not names:
        return _Part(path, names, (), flat=flat)
    classes = tuple(dict.fromkeys(name.partition("/")[0] for name in names))
    folders = (f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if empty := sorted(set(folders) - set(classes)):
        shown = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        raise ValueError(
            f"class folders without images in {path}: {shown}; fill or remove them, or pass the "
            "folder that holds images alone"
        )
    return _Part(path, names, classes, flat=False)


def _walk(path: Path) -> Iterator[str]:
    """Yield names of images relative to a folder; a link back to a folder above ends there."""
    seen = set()
    for folder, below, files in os.walk(path, followlinks=True):
        here = os.stat(folder)  # noqa: PTH116  # A million Path objects take their time.
        if (here.st_dev, here.st_ino) in seen:
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        below[:] = [name for name in below if not name.startswith(".")]
        start = os.path.relpath(folder, path).replace(os.sep, "/") + "/"
        start = "" if start == "./" else start
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield start + name


def _choose_test(folders: list[Path], classes: tuple[str, ...]) -> Listed | None:
    """Return the first split with labels, or the first one if none has."""
    unlabelled: list[Listed] = []
    refused: ValueError | None = None
    for folder in folders:
        try:
            listed = _list_test(folder, classes)
        except ValueError as error:
            refused = refused or error
            continue
        if listed.labels is not None:
            return listed
        unlabelled.append(listed)
    if refused:
        raise refused
    return unlabelled[0] if unlabelled else None


def _list_test(folder: Path, classes: tuple[str, ...]) -> Listed:
    part = _list_part(folder)
    if not part.names:
        raise ValueError(f"{folder} holds no images; fill or remove it")
    files = Files.of(folder, part.names)
    tops = list(part.tops())
    annotations = folder / _ANNOTATIONS
    if classes and annotations.is_file():
        tops = _read_annotations(annotations, part.names)
    elif not classes or part.flat or (len(part.classes) == 1 and part.classes[0] not in classes):
        return Listed(files, None)  # A folder within the folder is no class.
    if unknown := sorted(set(tops) - set(classes)):
        raise ValueError(
            f"{folder} has classes that the training split has not: {', '.join(unknown[:3])}"
            f"{' ...' if len(unknown) > 3 else ''}; name the class folders alike"
        )
    return Listed(files, _to_labels(tops, classes))


def _read_annotations(annotations: Path, names: list[str]) -> list[str]:
    """Read Tiny ImageNet's table: a file's name, its class, and four numbers, with tabs."""
    rows = (line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines())
    labels = {row[0]: row[1] for row in rows if len(row) > 1}
    missing = [name for name in names if name.rpartition("/")[2] not in labels]
    if missing:
        raise ValueError(
            f"{annotations} names no class for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; unpack the data set anew"
        )
    return [labels[name.rpartition("/")[2]] for name in names]


def _to_labels(tops: list[str], classes: tuple[str, ...]) -> Tensor | None:
    if not classes:
        return None
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[top] for top in tops])
