"""Folders and archives of images: their files, splits and classes; nothing is decoded."""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mixmask._checks import few
from mixmask.data.datasets import DatasetImages, describe_door, find_splits
from mixmask.data.images import UnreadableError, image_suffixes, open_image

_LIKE_SPLITS = (
    r"(train|test|val|valid|validation|dev|eval|evaluation|holdout)"
    r"([-_. ]?(ing|set|data|split|\d+))?"
)
_ANNOTATIONS = "val_annotations.txt"
# What is raised for a file that cannot be opened, or a member of an archive: one that is gone,
# damaged or compressed in a way that Python does not know.
_UNREADABLE = (
    UnreadableError, OSError, EOFError, BadZipFile, zlib.error, KeyError, NotImplementedError,
)  # fmt: skip
# What archives of macOS and some file servers add; names with a dot are hidden anyhow.
_RUBBISH = ("__MACOSX", "@eaDir")


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder, their names kept as one block of bytes.

    A list of a million strings would be copied into each worker process, page by page, as their
    reference counts change.

    Attributes:
        root: The folder, which may lie in an archive.
        names: (N,) bytes, relative to it.
        archive: The .zip file that holds the folder, if one does.

    Example:
        >>> files = Files.of(Path("photos"), ["cat/1.jpg", "dog/2.jpg"])
        >>> len(files), files[1].as_posix()
        (2, 'photos/dog/2.jpg')
    """

    root: Path
    names: npt.NDArray[np.bytes_]
    archive: Path | None = None

    # Files are read as RGB of 8 bits, whatever they hold.
    channels = 3
    dtype = torch.uint8

    @classmethod
    def of(cls, root: Path, names: Iterable[str], archive: Path | None = None) -> Files:
        """Pack names relative to a folder."""
        return cls(root, np.array([os.fsencode(name) for name in names], np.bytes_), archive)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.root / self.name(index)

    def name(self, number: int) -> str:
        """Return a file's name relative to the root."""
        return os.fsdecode(self.names[number])

    def subset(self, numbers: Iterable[int]) -> Files:
        """Return some of the files."""
        return replace(self, names=self.names[list(numbers)])

    @contextmanager
    def open(self, number: int) -> Iterator[Image.Image]:
        """Open an image.

        Raises:
            UnreadableError: As in `open_image`.
            FileNotFoundError: If the whole folder is gone.
        """
        try:
            with open_image(read_file(self[number], self.archive)) as image:
                yield image
        except _UNREADABLE as error:
            if not (self.archive or self.root).exists():
                text = f"the folder of images, {self.root}, is gone"
                raise FileNotFoundError(text) from error
            # As for TIFF files of several bands.
            fix = describe_door(self.root / f"*{self[number].suffix}")
            text = f"{self[number]} is not a readable image ({error})"
            raise UnreadableError(f"{text}; {fix}" if fix else text) from error


ImageSource = Files | DatasetImages


class Listed(NamedTuple):
    """The images of a split and, where they are known, labels (N,) int64."""

    files: ImageSource
    labels: Tensor | None


class ListedData(NamedTuple):
    """A training split, a test split where there is one, and the classes."""

    train: Listed
    test: Listed | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Tree:
    """Images and folders below a folder, by their names relative to it, with slashes."""

    path: Path
    archive: Path | None
    names: list[str]
    folders: set[str]

    def below(self, top: str) -> _Tree:
        """Return what lies below one of the folders."""
        start = f"{top}/"
        names, folders = (
            [name[len(start) :] for name in found if name.startswith(start)]
            for found in (self.names, self.folders)
        )
        return _Tree(self.path / top, self.archive, names, set(folders))

    def labels(self) -> list[str]:
        """Return the class of each image, the first folder on the way to it; empty if any has none.

        Raises:
            ValueError: If a class folder holds no images.
        """
        if any("/" not in name for name in self.names):
            return []
        labels = [printable(name.partition("/")[0]) for name in self.names]
        empty = {printable(name) for name in self.folders if "/" not in name} - set(labels)
        if labels and empty:
            raise ValueError(
                f"class folders without images in {self.path}: {few(sorted(empty))}; fill or "
                "remove them, or pass the folder that holds images alone"
            )
        return labels


def printable(name: str) -> str:
    """Write the bytes of a name that is not UTF-8 as escapes, which every output takes."""
    return name.encode(errors="backslashreplace").decode()


def list_folder(path: Path) -> ListedData:
    """List the images of a folder or of a .zip file of one, in the order of their names.

    These layouts are known: images at any depth, which then have no labels; one folder per class;
    either of them within `train` (or `training`) and, for a test split, `test`, `testing`, `val`,
    `valid`, `validation`, `dev` or `eval`, in any case; Tiny ImageNet's, whose
    `val/val_annotations.txt` names the classes. Numbered pieces of a split are joined: `train.X1`,
    `train.X2`, ... as ImageNet-100 has them, or `train_1`, `train_2`. A single folder around all
    images is not a class. Links to folders are followed; names that start with a dot are skipped;
    other files, and folders beside the splits, are named in a warning.

    Raises:
        ValueError: If there are fewer than two images, a class folder holds none, there is a test
            split alone, or it has classes missing from the training split.
    """
    tree = _list_tree(path)
    while True:
        tops = {name.partition("/")[0] for name in [*tree.folders, *tree.names]}
        trains, tests = find_splits(tops & tree.folders)
        tested = [name for names in tests for name in names]
        if tested and tops <= set(tested):
            raise ValueError(
                f"{tree.path} holds {few(sorted(tested))} and no training split; put one beside "
                f"it, named train, or pass {tree.path / tested[0]} to train on that"
            )
        # A folder in a folder and nothing beside it: the content of an archive, or `all/`.
        if len(tops) > 1 or not tops <= tree.folders:
            break
        tree = tree.below(*tops)
    if trains and (beside := tops - {*trains, *tested}):
        warnings.warn(f"not read, beside the splits of {path}: {few(sorted(beside))}", stacklevel=2)
    # Without a training split the whole folder is one.
    files, labels = _list_split(tree, trains)
    classes = tuple(sorted(set(labels)))
    if len(classes) == 1:  # There is nothing to tell apart.
        classes, labels = (), []
    if like := [name for name in classes if re.fullmatch(_LIKE_SPLITS, name, re.IGNORECASE)]:
        fix = "call them train and test (or val)"
        warnings.warn(f"classes of {path} look like splits: {few(like)}; {fix}", stacklevel=2)
    if len(files) < 2:
        found = f"one image, {files.name(0)}" if len(files) else "no images"
        raise ValueError(f"{path} holds {found}; training needs at least a batch of two")
    test = _choose_test(tree, tests, classes) if trains else None
    return ListedData(Listed(files, _to_labels(labels, classes)), test, classes)


def _list_split(
    tree: _Tree, tops: Sequence[str], *, labelled: bool = True
) -> tuple[Files, list[str]]:
    """List the pieces of a split as one, and each image's class; none if a piece has none."""
    parts = [tree.below(top) for top in tops] or [tree]
    root, names = parts[0].path, parts[0].names
    if len(parts) > 1:
        root = tree.path
        names = [f"{part.path.name}/{name}" for part in parts for name in part.names]
    labels = [(_read_annotations(part) or part.labels()) if labelled else [] for part in parts]
    files = Files.of(root, names, tree.archive)
    return files, [label for part in labels for label in part] if all(labels) else []


def _list_tree(path: Path) -> _Tree:
    """List what lies in a folder or an archive, and name what is not an image."""
    archive = path if path.is_file() else None
    tree, skipped = _Tree(path, archive, [], set()), Counter[str]()
    for name, kind in _walk_archive(path) if archive else walk_folder(path):
        end = os.path.splitext(name)[1].lower()  # noqa: PTH122  # A million Paths take time.
        if kind == "folder":
            tree.folders.add(name)
        elif kind == "file" and end in image_suffixes():
            tree.names.append(name)
        else:  # To open a pipe would wait forever.
            skipped[(end or "without an ending") if kind == "file" else kind] += 1
    tree.names.sort(key=lambda name: name.split("/"))
    if not tree.names:
        fixes = (describe_door(path / f"*{end}") for end, _ in skipped.most_common())
        fix = next(filter(None, fixes), "pass the folder above them")
        raise ValueError(f"{path} holds no images that Pillow reads; {fix}")
    if skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common(5))
        warnings.warn(f"skipped what holds no images in {path}: {kinds}", stacklevel=3)
    return tree


def walk_folder(path: Path) -> Iterator[tuple[str, str]]:
    """Yield names below a folder, and what they are; a link to a folder above ends there."""
    seen, waiting = set(), [""]
    while waiting:
        start = waiting.pop()
        here = (path / start).stat()
        if (here.st_dev, here.st_ino) in seen:
            continue
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(path / start) as entries:
            for entry in entries:
                if _is_rubbish(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append(f"{start}{entry.name}/")
                    yield start + entry.name, "folder"
                else:
                    kind = "file" if entry.is_file() else "pipes, devices or broken links"
                    yield start + entry.name, kind


def _walk_archive(path: Path) -> Iterator[tuple[str, str]]:
    """Yield names in a .zip file, and what they are."""
    try:
        entries = open_archive(path).infolist()
    except BadZipFile as error:
        fix = "pass a folder of images, or a .zip file of one"
        raise ValueError(f"{path} is not a folder of images; {fix}") from error
    if any(entry.flag_bits & 1 for entry in entries):
        raise ValueError(f"{path} is encrypted; unpack it and pass the folder")
    for entry in entries:
        parts = entry.filename.rstrip("/").split("/")
        if any(map(_is_rubbish, parts)):
            continue
        # An archive need not list the folders that it has.
        for depth in range(1, len(parts) + entry.is_dir()):
            yield "/".join(parts[:depth]), "folder"
        if not entry.is_dir():
            yield entry.filename, "file"


def _is_rubbish(name: str) -> bool:
    return name.startswith(".") or name in _RUBBISH


def open_archive(path: Path) -> ZipFile:
    """Open an archive, once per process: forks would share one place in the file."""
    found = path.stat()
    return _open_archive(path, found.st_ino, found.st_mtime_ns, found.st_size, os.getpid())


@lru_cache(maxsize=16)
def _open_archive(path: Path, *identity: int) -> ZipFile:
    del identity  # An archive that was replaced is another one.
    return ZipFile(path)


def read_file(path: Path, archive: Path | None) -> bytes:
    """Read a file from a folder, or from an archive."""
    if archive is None:
        return path.read_bytes()
    return open_archive(archive).read(path.relative_to(archive).as_posix())


def _choose_test(
    tree: _Tree, tests: Sequence[Sequence[str]], classes: tuple[str, ...]
) -> Listed | None:
    """Return the first split with labels, or the first one if none has."""
    listed: list[Listed] = []
    refusals: list[ValueError] = []
    for tops in tests:
        try:
            listed.append(_list_test(tree, tops, classes))
        except ValueError as error:  # noqa: PERF203  # There are five at most.
            refusals.append(error)
    labelled = [each for each in listed if each.labels is not None]
    if refusals and not labelled:
        raise refusals[0]
    return next(iter(labelled or listed), None)


def _list_test(tree: _Tree, tops: Sequence[str], classes: tuple[str, ...]) -> Listed:
    files, labels = _list_split(tree, tops, labelled=bool(classes))
    if not len(files):
        raise ValueError(f"{files.root} holds no images; fill or remove it")
    # A single folder within the folder is not a class.
    if not classes or not labels or (len(set(labels)) == 1 and labels[0] not in classes):
        return Listed(files, None)
    if unknown := set(labels) - set(classes):
        raise ValueError(
            f"{files.root} has classes missing from the training split: {few(sorted(unknown))}; "
            "use the same class folders in both"
        )
    return Listed(files, _to_labels(labels, classes))


def _read_annotations(part: _Tree) -> list[str] | None:
    """Read Tiny ImageNet's table, if there is one: a file's name, its class, and numbers."""
    table = part.path / _ANNOTATIONS
    try:
        rows = os.fsdecode(read_file(table, part.archive)).splitlines()
    except (FileNotFoundError, KeyError):
        return None
    labels = dict(row.split("\t")[:2] for row in rows if "\t" in row)
    found = [labels.get(name.rpartition("/")[2], "") for name in part.names]
    if missing := [name for name, label in zip(part.names, found, strict=True) if not label]:
        raise ValueError(f"{table} names no class for {few(missing, 1)}; unpack the data set again")
    return found


def _to_labels(names: Sequence[str], classes: tuple[str, ...]) -> Tensor | None:
    if not classes:
        return None
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in names])
