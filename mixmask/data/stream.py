"""Batches: from tensors on the device, or from files that workers decode and crop."""

from __future__ import annotations

import atexit
import traceback
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mixmask.data.crops import Answer, Reader, Request, start_worker
from mixmask.data.sets import FolderImages, Images

# Images that a worker hands over at once: few enough for shared memory and a quick start, enough
# that the transfer is cheap beside decoding.
_PART = 32


class Batches(Iterator[Tensor], Protocol):
    """An iterator that can be closed."""

    def close(self) -> None:
        """Stop reading ahead."""


class Draw(NamedTuple):
    """What a step takes from the data.

    Attributes:
        images: (N,) int64, which images; on the device where the images are.
        crops: Number of views per image.
        seed: Seed of all draws for them.
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
        workers: Processes that read a folder; 0 for none but a thread.
        device: Where the batches go.
    """
    if isinstance(images, FolderImages):
        return Stream(images, draws, size=size, min_scale=min_scale, workers=workers, device=device)
    return (images[draw.images].repeat(draw.crops, 1, 1, 1) for draw in draws)


def part_bytes(size: int, crops: int) -> int:
    """Return what a worker hands over at once: the crops of a few images.

    Args:
        size: Height and width of the crops, in pixels.
        crops: How many of each image.
    """
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
        workers: Processes that read; 0 for none but that thread.
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
            Reader(images.files, size, min_scale),
            batch_size=None,
            sampler=_Parts(draws),
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=start_worker,
            # Otherwise the loader draws from the global generator, in the middle of a step.
            generator=torch.Generator(),
        )
        self.ready: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | BaseException] = (
            SimpleQueue()
        )
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
        item = self.ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, copied = item
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
        """Join the parts of each batch: (crops * N, 3, S, S)."""
        batch = torch.empty(0)
        for request, images, unreadable, error in self._answers():
            if self.closed.is_set():
                return
            if error:
                raise OSError(error)
            self.images.note(unreadable)
            if request.first == 0:
                crops, _, *pixels = images.shape
                # A GPU copies from pinned memory beside its work.
                batch = torch.empty(
                    crops, request.total, *pixels,
                    dtype=torch.uint8, pin_memory=self.device.type == "cuda",
                )  # (crops, N, S, S, 3)  # fmt: skip
            end = request.first + len(request.numbers)
            batch[:, request.first : end] = images
            if end == request.total:
                yield batch.flatten(0, 1).permute(0, 3, 1, 2)  # (crops * N, 3, S, S)

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


def _identity(answer: Any) -> Any:
    return answer
