"""Images that are read when they are indexed, from files or from a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from mixmask.data.folders import ImageSource
from mixmask.data.images import Picture, UnreadableError, take_square
from mixmask.data.resources import available_cores

# How many files in a row may be unreadable before the whole folder is taken to be.
_TRIES = 100
# How many squares may wait in memory.
_AHEAD = 256

_Content = TypeVar("_Content")


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Images in a folder or a data set, read as squares when they are indexed.

    Where a file cannot be read, the next one that can stands in for it, so that images and labels
    keep their places; the first such file is named in a warning, later ones are counted.

    Attributes:
        source: Where they are.
        size: Height and width of the squares, in pixels.
        unreadable: Numbers of the files that could not be read so far.
    """

    source: ImageSource
    size: int
    unreadable: set[int] = field(default_factory=set, repr=False)

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
        numbers = torch.arange(len(self))[index]  # Of any shape; negative indices are resolved.
        flat = numbers.flatten().tolist()
        squares = torch.empty(len(flat), *self.shape[1:], dtype=self.dtype)

        def read(number: int) -> tuple[Tensor, dict[int, str]]:
            return read_any(self.source, number, lambda image: take_square(image, self.size))

        # Threads, not processes: Pillow decodes without Python's lock.
        with ThreadPoolExecutor(min(16, available_cores())) as pool:
            for first in range(0, len(flat), _AHEAD):
                squares_read = pool.map(read, flat[first : first + _AHEAD])
                for place, (square, unreadable) in enumerate(squares_read, first):
                    squares[place] = square
                    self.note(unreadable)
        return squares.view(*numbers.shape, *squares.shape[1:])

    def subset(self, index: Tensor) -> StoredImages:
        """Return some of the images, by their indices (n,), still where they are."""
        return StoredImages(self.source.subset(index.tolist()), self.size)

    def note(self, unreadable: Mapping[int, str]) -> None:
        """Warn of files that cannot be read: of the first with the reason, ten, a hundred ..."""
        for number, reason in unreadable.items():
            if number in self.unreadable:
                continue
            self.unreadable.add(number)
            count = len(self.unreadable)
            if count == 1:
                fate = "another stands in for it, or it is left out"
                warnings.warn(f"{reason}; {fate}", stacklevel=2)
            elif str(count).strip("0") == "1":
                self.warn_rest()

    def warn_rest(self) -> None:
        """Say how many files could not be read so far, if there was more than one."""
        if len(self.unreadable) > 1:
            warnings.warn(f"{len(self.unreadable)} unreadable images so far", stacklevel=2)


Images = Tensor | StoredImages


def read_any(
    source: ImageSource, number: int, read: Callable[[Picture], _Content]
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
        try:
            with source.open(number) as image:
                return read(image), tried
        except UnreadableError as error:  # noqa: PERF203  # Reading takes longer.
            tried[number] = str(error)
            number = (number + 1) % len(source)
    raise OSError(
        f"{len(tried)} images in a row cannot be read: {next(iter(tried.values()))}; check whether "
        "the data set is complete"
    )
