"""Batches of crops: from tensors on the device, or from files that workers decode and crop."""

from __future__ import annotations

import atexit
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mixmask.data.crops import Answer, Reader, Request, start_worker
from mixmask.data.jpegs import decode_crops
from mixmask.data.sets import FolderImages, Images

# Images that a worker hands over at once: few enough for shared memory and a quick start, enough
# that handing over costs little beside decoding.
_PART = 32


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
    decode: str = "workers",
) -> Batches:
    """Return what `RandomView` takes, (crops * N, 3, H, W) uint8 on the device, for each draw.

    The first N images are the first view of each, and so on. A tensor's images are whole ones,
    a folder's are crops of `size`; see `Stream`.

    Args:
        images: A tensor on the device, or a folder.
        draws: What the steps take, in order.
        size: Height and width of a folder's crops, in pixels.
        min_scale: Smallest share of an image's area that a folder's crop takes.
        workers: Processes that read a folder; 0 for none but a thread.
        device: Where the batches go.
        decode: Who decodes a folder's JPEGs, "workers" or "device".
    """
    if isinstance(images, FolderImages):
        return Stream(
            images,
            draws,
            size=size,
            min_scale=min_scale,
            workers=workers,
            device=device,
            decode=decode,
        )
    return (images[draw.images].repeat(draw.crops, 1, 1, 1) for draw in draws)


def part_bytes(size: int, crops: int, largest_file: int = 0) -> int:
    """Return what a worker hands over at once: the crops of a few images, or files that are larger.

    Args:
        size: Height and width of the crops, in pixels.
        crops: How many of each image.
        largest_file: Bytes of a large file, where JPEGs are left to the device.
    """
    return _PART * max(crops * 3 * size * size, largest_file)


class Stream(Iterator[Tensor]):
    """Random resized crops of a folder's images, decoded by workers and copied one batch ahead.

    Which crops are taken follows from the draws alone, whatever the number of workers. A thread
    collects what the workers hand over and copies it to the device, beside the step that runs; or
    the workers hand over JPEGs as they are, and the device decodes and crops them on that thread's
    stream.

    Args:
        images: The folder.
        draws: What the steps take, in order.
        size: Height and width of the crops, in pixels.
        min_scale: Smallest share of an image's area that a crop takes.
        workers: Processes that read; 0 for none but that thread.
        device: Where the batches go.
        decode: Who decodes JPEGs, "workers" or "device".
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
        decode: str = "workers",
    ) -> None:
        """Start nothing yet: workers start with the first batch."""
        self.images = images
        self.device = device
        self.workers = workers
        self.reader = Reader(images.files, size, min_scale)
        self.on_device = decode == "device"
        self.loader = DataLoader(
            replace(self.reader, keep_jpegs=self.on_device),
            batch_size=None,
            sampler=_Parts(draws),
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=start_worker,
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
            copies = None
            if self.device.type == "cuda":
                # A thread starts on the first GPU, whatever the process's own is.
                torch.cuda.set_device(self.device)
                copies = torch.cuda.Stream(self.device)
            with torch.cuda.stream(copies):  # Of its own, beside the step's; on a CPU, none.
                for batch in self._collect():
                    self.room.acquire()
                    if self.closed.is_set():
                        return
                    moved = batch.to(self.device, non_blocking=True)
                    self.ready.put((moved, copies.record_event() if copies else None))
            self.ready.put(StopIteration())
        except BaseException as error:  # It is raised in the main thread.
            # The frames hold the loader, and with it the workers.
            traceback.clear_frames(error.__traceback__)
            error.__context__ = None
            self.ready.put(error)

    def _collect(self) -> Iterator[Tensor]:
        """Join the parts of each batch: (crops * N, 3, S, S), on the device if it decodes there."""
        batch = torch.empty(0)
        for part in self._answers():
            if self.closed.is_set():
                return
            self._check(part)
            request = part.request
            end = request.first + len(request.numbers)
            if request.first == 0:
                batch = self._room_for(part)
            self._fill(batch[:, request.first : end], part)
            if end == request.total:
                yield batch.flatten(0, 1).permute(0, 3, 1, 2)

    def _check(self, part: Answer) -> None:
        if part.error:
            raise OSError(part.error)
        self.images.note(part.unreadable)

    def _room_for(self, part: Answer) -> Tensor:
        """Return an empty batch, (crops, N, S, S, 3): on the device, or in memory that it reads."""
        crops, _, *pixels = part.images.shape
        shape = (crops, part.request.total, *pixels)
        if self.on_device:
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _fill(self, batch: Tensor, part: Answer) -> None:
        """Fill a part of a batch, (crops, n, S, S, 3), and decode what workers did not.

        A JPEG that the device cannot decode is read as ever, and if that fails too, the next file
        stands in for it.
        """
        if not part.places:
            batch[:] = part.images
            return
        rest = [place for place in range(batch.shape[1]) if place not in part.places]
        for place, images in zip(rest, part.images.unbind(1), strict=True):
            batch[:, place] = images
        decoded = decode_crops(part.jpegs, self.reader.size, self.device)
        for place, crops in zip(part.places, decoded, strict=True):
            batch[:, place] = self._read_one(part.request, place) if crops is None else crops

    def _read_one(self, request: Request, place: int) -> Tensor:
        """Read one image of a part as a worker would: its (crops, S, S, 3), or a stand-in's."""
        answer = self.reader[request.one(place)]
        self._check(answer)
        return answer.images[:, 0]

    def _answers(self) -> Iterator[Answer]:
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


class _Parts(Sampler[Request]):
    """The parts of all draws, in order, drawn when a worker is to have the next one."""

    def __init__(self, draws: Iterable[Draw]) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[Request]:
        for draw in self.draws:
            numbers = draw.images.tolist()
            for first in range(0, len(numbers), _PART):
                part = numbers[first : first + _PART]
                yield Request(part, first, len(numbers), draw.crops, draw.seed)


def _unchanged(answer: Any) -> Any:
    return answer
