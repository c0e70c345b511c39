"""Images that are read when they are indexed, from files or from a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from mixmask.data.folders import Source
from mixmask.data.images import Picture, UnreadableError, take_square
from mixmask.data.resources import available_cores

# How many files in a row may be unreadable before the whole folder is taken to be.
_TRIES = 100

_Content = TypeVar("_Content")


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Images in a folder or a data set, read as squares when they are indexed.

    Where a file cannot be read, the next one that can stands in for it, so that images and labels
    keep their places; the first such file is named in a warning, later ones are counted.

    Attributes:
        source: Where they are.
        size: Height and width of the squares, in pixels.
    """

    source: Source
    size: int
    _unreadable: set[int] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or float32 for values within [0, 1]."""
        return self.source.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of all squares, (N, C, size, size)."""
        return torch.Size((len(self), self.source.channels, self.size, self.size))

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Read the images of an index, as a tensor would take it: (..., C, size, size)."""
        numbers = torch.arange(len(self))[index]
        squares = torch.empty(numbers.numel(), *self.shape[1:], dtype=self.dtype)
        with ThreadPoolExecutor(min(16, available_cores())) as pool:
            read = pool.map(self._read, numbers.flatten().tolist())
            for place, (square, unreadable) in enumerate(read):
                squares[place] = square
                self.note(unreadable)
        return squares.view(*numbers.shape, *squares.shape[1:])

    def _read(self, number: int) -> tuple[Tensor, dict[int, str]]:
        return read_any(self.source, number, lambda image: take_square(image, self.size))

    def subset(self, index: Tensor) -> StoredImages:
        """Return some of the images, by their indices (n,), still where they are."""
        return StoredImages(self.source.subset(index.tolist()), self.size)

    def note(self, unreadable: Mapping[int, str]) -> None:
        """Warn of files that others stand in for: the first by its name, ten, a hundred ..."""
        for number, reason in unreadable.items():
            if number in self._unreadable:
                continue
            self._unreadable.add(number)
            count = len(self._unreadable)
            if count == 1:
                name = self.source.name(number)
                text = f"{name} is no readable image ({reason}); another stands in for it"
                warnings.warn(text, stacklevel=2)
            elif str(count).strip("0") == "1":
                self._warn_count()

    def warn_rest(self) -> None:
        """Say how many files could not be read so far, if there was more than one."""
        if len(self._unreadable) > 1:
            self._warn_count()

    def _warn_count(self) -> None:
        warnings.warn(f"{len(self._unreadable)} unreadable images so far", stacklevel=3)


Images = Tensor | StoredImages


def read_one(
    source: Source, number: int, read: Callable[[Picture], _Content]
) -> _Content | UnreadableError:
    """Read an image, or return why it cannot be read."""
    try:
        with source.open(number) as image:
            return read(image)
    except UnreadableError as error:
        return error


def read_any(
    source: Source, number: int, read: Callable[[Picture], _Content]
) -> tuple[_Content, dict[int, str]]:
    """Read an image or, if it is unreadable, the next one that is not.

    Args:
        source: All images.
        number: Which one to read.
        read: What to do with the opened image.

    Returns:
        What was read, and the numbers of the images that could not be, each with the reason.

    Raises:
        OSError: If the folder is gone, or a hundred files in a row are unreadable.
    """
    tried: dict[int, str] = {}
    while len(tried) < min(_TRIES, len(source)):
        content = read_one(source, number, read)
        if not isinstance(content, UnreadableError):
            return content, tried
        tried[number] = str(content)
        number = (number + 1) % len(source)
    first, reason = next(iter(tried.items()))
    raise OSError(
        f"{len(tried)} images in a row cannot be read, the first of them {source.name(first)} "
        f"({reason}); check whether the data set is complete"
    )
