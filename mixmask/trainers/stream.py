"""Batches of crops: from tensors on the device, or from files that workers decode and crop."""

from __future__ import annotations

import atexit
import io
import math
import signal
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mixmask._seeds import fold_seed
from mixmask.trainers.data import UNREADABLE, FolderImages, Images, read_any, to_rgb
from mixmask.trainers.folders import Files
from mixmask.views import random_boxes

# Images that a worker hands over at once: few enough for shared memory and a quick start, enough
# that handing over costs little beside decoding.
_PART = 32
# How much larger than its views an image is at least decoded; closer to 1, views become sharper.
_MARGIN = 2


class Batches(Iterator[Tensor], Protocol):
    """An iterator that can be closed."""

    def close(self) -> None:
        """Stop what reads ahead."""


class Draw(NamedTuple):
    """What a step takes from the data.

    Attributes:
        images: (N,) int64, which images; on the device where the images are.
        crops: How many views of each.
        seed: From which all that is drawn for them follows.
    """

    images: Tensor
    crops: int
    seed: int


def read_batches(
    images: Images,
    draws: Iterable[Draw],
    *,
    size: int,
    min_scale: float,
    workers: int,
    device: torch.device,
) -> Batches:
    """Return what `RandomView` takes, (crops * N, 3, H, W) uint8 on the device, for each draw.

    The first N images are the first view of each, and so on. A tensor's images are whole ones,
    a folder's are crops of `size`; see `Stream`.

    Args:
        images: A tensor on the device, or a folder.
        draws: What the steps take, in order.
        size: Height and width of a folder's crops, in pixels.
        min_scale: Smallest share of an image's area that a folder's crop takes.
        workers: Processes that decode a folder; 0 for none but a thread.
        device: Where the batches go.
    """
    if isinstance(images, FolderImages):
        return Stream(images, draws, size=size, min_scale=min_scale, workers=workers, device=device)
    return (images[draw.images].repeat(draw.crops, 1, 1, 1) for draw in draws)


def part_bytes(size: int, crops: int) -> int:
    """Return what a worker hands over at once: the crops of a few images."""
    return _PART * crops * 3 * size * size


class Stream(Iterator[Tensor]):
    """Random resized crops of a folder's images, decoded by workers and copied one batch ahead.

    Which crops are taken follows from the draws alone, whatever the number of workers. A thread
    collects what the workers hand over and copies it to the device, beside the step that runs.

    Args:
        images: The folder.
        draws: What the steps take, in order.
        size: Height and width of the crops, in pixels.
        min_scale: Smallest share of an image's area that a crop takes.
        workers: Processes that decode; 0 for none but that thread.
        device: Where the batches go.
    """

    def __init__(
        self,
        images: FolderImages,
        draws: Iterable[Draw],
        *,
        size: int,
        min_scale: float,
        workers: int,
        device: torch.device,
    ) -> None:
        """Start nothing yet: workers start with the first batch."""
        self.images = images
        self.device = device
        self.workers = workers
        self.loader = DataLoader(
            _Decoder(images.files, size, min_scale),
            batch_size=None,
            sampler=_Parts(draws),
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            # Otherwise the loader draws from the global generator, in the middle of a step.
            generator=torch.Generator(),
        )
        self.ready: SimpleQueue[tuple[Tensor, Any] | BaseException] = SimpleQueue()
        self.room = Semaphore()
        self.closed = Event()
        self.thread = Thread(target=self._read_ahead, name="read ahead", daemon=True)

    def __next__(self) -> Tensor:
        """Return the next batch, (crops * N, 3, S, S) uint8, channels last.

        Raises:
            OSError: If the folder is gone or nothing in it can be read.
            ChildProcessError: If a worker has died.
        """
        if self.closed.is_set():
            raise StopIteration
        if self.thread.ident is None:
            atexit.register(self.close)  # Workers do not end by themselves.
            self.thread.start()
        found = self.ready.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        batch, copied = found
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            batch.record_stream(current)
        self.room.release()
        return batch

    def close(self) -> None:
        """Stop thread and workers, and say how many files could not be read."""
        if self.closed.is_set():
            return
        self.closed.set()
        atexit.unregister(self.close)
        self.room.release()
        if self.thread.ident is not None:
            self.thread.join()
        self.images.warn_rest()

    def _read_ahead(self) -> None:
        """Copy batches, of which one may wait; runs in the thread."""
        try:
            on_gpu = self.device.type == "cuda"
            copies = None
            if on_gpu:  # A thread starts on the first GPU, whatever the process's own is.
                torch.cuda.set_device(self.device)
                copies = torch.cuda.Stream(self.device)
            for batch in self._collect(pinned=on_gpu):
                self.room.acquire()
                if self.closed.is_set():
                    return
                self.ready.put(_copy(batch, self.device, copies))
            self.ready.put(StopIteration())
        except BaseException as error:  # It is raised in the main thread.
            # The frames hold the loader, and with it the workers.
            traceback.clear_frames(error.__traceback__)
            error.__context__ = None
            self.ready.put(error)

    def _collect(self, *, pinned: bool) -> Iterator[Tensor]:
        """Join the parts of each batch, in host memory: (crops * N, 3, S, S)."""
        batch = torch.empty(0)
        for part in self._answers():
            if self.closed.is_set():
                return
            if part.error:
                raise OSError(part.error)
            self.images.note(part.unreadable)
            crops, n, *rest = part.images.shape
            if part.first == 0:
                batch = torch.empty(crops, part.total, *rest, dtype=torch.uint8, pin_memory=pinned)
            batch[:, part.first : part.first + n] = part.images
            if part.first + n == part.total:
                yield batch.flatten(0, 1).permute(0, 3, 1, 2)

    def _answers(self) -> Iterator[_Answer]:
        """Return what the workers hand over, in order."""
        try:
            yield from self.loader
        except (EOFError, OSError, RuntimeError) as error:
            dead = str(error).startswith("DataLoader worker") or not isinstance(error, RuntimeError)
            if not (self.workers and dead):
                raise
            text = " ".join(str(error).split())
            raise ChildProcessError(
                f"a process that decodes images has died ({text}); if memory was short, use fewer "
                "--workers"
            ) from None


def _copy(batch: Tensor, device: torch.device, copies: Any) -> tuple[Tensor, Any]:
    """Copy a batch on a stream of its own, and return the event that ends it, if there is one."""
    if copies is None:
        return batch.to(device), None
    with torch.cuda.stream(copies):
        return batch.to(device, non_blocking=True), copies.record_event()


class _Request(NamedTuple):
    """A part of a draw: these images, from this place in a batch of so many on."""

    numbers: list[int]
    first: int
    total: int
    crops: int
    seed: int


class _Answer(NamedTuple):
    """A part of a batch, (crops, n, S, S, 3); what could not be read; what is wrong for good."""

    images: Tensor
    first: int
    total: int
    unreadable: list[int]
    error: str


class _Parts(Sampler[_Request]):
    """The parts of all draws, in order, drawn when a worker is to have the next one."""

    def __init__(self, draws: Iterable[Draw]) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[_Request]:
        for draw in self.draws:
            numbers = draw.images.tolist()
            for first in range(0, len(numbers), _PART):
                part = numbers[first : first + _PART]
                yield _Request(part, first, len(numbers), draw.crops, draw.seed)


@dataclass(frozen=True)
class _Decoder(Dataset[_Answer]):
    """What a worker does: read files and crop them."""

    files: Files
    size: int
    min_scale: float

    def __getitem__(self, request: _Request) -> _Answer:
        numbers, first, total, crops, seed = request
        images = torch.empty(crops, len(numbers), self.size, self.size, 3, dtype=torch.uint8)
        generator = torch.Generator()
        unreadable: list[int] = []
        error = ""

        def read(file: Path) -> Tensor | None:
            return read_crops(file, crops, self.size, min_scale=self.min_scale, generator=generator)

        try:
            for place, number in enumerate(numbers):
                generator.manual_seed(fold_seed(seed, first + place))
                found, tried = read_any(self.files, number, read)
                images[:, place] = found.permute(0, 2, 3, 1)
                unreadable += tried
        except OSError as problem:  # A worker's exception would come with its traceback.
            error = str(problem)
        return _Answer(images, first, total, unreadable, error)


def _unchanged(answer: Any) -> Any:
    return answer


def _start_worker(number: int) -> None:
    """Leave Ctrl-C and a scheduler's SIGTERM to the process that trains, which ends the step."""
    del number
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")


def read_crops(
    file: Path, count: int, size: int, *, min_scale: float, generator: torch.Generator
) -> Tensor | None:
    """Read an image and take random resized crops of it.

    A large JPEG is decoded at a half, a quarter or an eighth, of which even the smallest crop has
    twice the size. The crops hardly show it: photographs differ by about 0.3 grey levels of 256.

    Args:
        file: An image file.
        count: How many crops.
        size: Their height and width, in pixels.
        min_scale: Smallest share of the image's area that a crop takes; the largest is 1.
        generator: A CPU generator. As many numbers are drawn from it for every readable image.

    Returns:
        (count, 3, size, size) uint8, or None for a file that cannot be read.
    """
    try:
        # At once: over a network, many small reads take long.
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            width, height = image.size
            drawn = random_boxes(count, height, width, min_scale, generator=generator)
            boxes: list[list[int]] = drawn.long().tolist()
            smallest = min(min(w, h) for _, _, w, h in boxes)
            kept = _MARGIN * size / smallest
            image.draft("RGB", (math.ceil(width * kept), math.ceil(height * kept)))
            rgb = to_rgb(image)
    except UNREADABLE:
        return None
    reduction = round(width / rgb.width)
    if reduction > 1:
        return torch.stack([_crop_reduced(rgb, box, size, reduction) for box in boxes])
    pixels = _to_tensor(rgb)
    crops = [
        F.interpolate(
            pixels[None, :, top : top + h, left : left + w],
            (size, size),
            mode="bilinear",
            antialias=True,
        )
        for left, top, w, h in boxes
    ]
    return torch.cat(crops)


def _crop_reduced(image: Image.Image, box: list[int], size: int, reduction: int) -> Tensor:
    """Crop an image that was decoded smaller, to fractions of its pixels, which Pillow can."""
    left, top, w, h = (side / reduction for side in box)
    place = (left, top, left + w, top + h)
    return _to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, place))


def _to_tensor(image: Image.Image) -> Tensor:
    """Return (3, H, W) uint8, channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
