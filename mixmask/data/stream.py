"""Batches: from tensors on the device, or from stored images that workers read and crop."""

from __future__ import annotations

import atexit
import signal
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixmask._checks import one_line
from mixmask._seeds import fold_seed
from mixmask._signals import without_worker_errors
from mixmask.data.folders import ImageSource
from mixmask.data.images import Picture, take_crops
from mixmask.data.stored import Images, StoredImages, read_any

# Images that a worker hands over at once: few enough for shared memory and a quick start, enough
# that the transfer is cheap beside decoding.
_PART = 32

# What reading from a worker raises that dies in the middle of an answer.
CUT_OFF = (EOFError, OSError)

_Anything = TypeVar("_Anything")


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
    """Return what `RandomView` takes, (crops * N, C, H, W) on the device, for each draw.

    The first N images are the first view of each, and so on. A tensor's images are whole ones,
    stored ones are random resized crops, which follow from the draws alone, whatever the number
    of workers.

    Args:
        images: A tensor on the device, or stored images.
        draws: What the steps take, in order.
        size: Height and width of the crops, in pixels.
        min_scale: Smallest share of an image's area that a crop takes.
        workers: Processes that read; 0 for none but a thread.
        device: Where the batches go.
    """
    if isinstance(images, StoredImages):
        return Stream(images, draws, size=size, min_scale=min_scale, workers=workers, device=device)
    return (images[draw.images].repeat(draw.crops, 1, 1, 1) for draw in draws)


def part_bytes(images: StoredImages, size: int, crops: int) -> int:
    """Return what a worker hands over at once: `crops` of size x size pixels of a few images."""
    return _PART * crops * images.shape[1] * size * size * images.dtype.itemsize


class _Request(NamedTuple):
    """A part of a draw: these images, from this place in a batch of `total` on."""

    numbers: list[int]
    first: int
    total: int
    crops: int
    seed: int


class _Answer(NamedTuple):
    """Crops (crops, n, S, S, C), what others stand in for, and why reading cannot go on."""

    request: _Request
    crops: Tensor
    unreadable: dict[int, str]
    error: str


@dataclass(frozen=True)
class _Reader(Dataset[_Answer]):
    """What a worker does: read images and crop them."""

    source: ImageSource
    size: int
    min_scale: float

    def __getitem__(self, request: _Request) -> _Answer:
        generator = torch.Generator()

        def crop(image: Picture) -> Tensor:
            return take_crops(
                image, request.crops, self.size, min_scale=self.min_scale, generator=generator
            )

        shape = (request.crops, len(request.numbers), self.size, self.size, self.source.channels)
        answer = _Answer(request, torch.empty(shape, dtype=self.source.dtype), {}, "")
        try:
            for place, number in enumerate(request.numbers):
                # One seed per image: crops do not depend on how a batch is split into parts.
                generator.manual_seed(fold_seed(request.seed, request.first + place))
                crops, unreadable = read_any(self.source, number, crop)
                answer.unreadable.update(unreadable)
                answer.crops[:, place] = crops.permute(0, 2, 3, 1)  # (crops, S, S, C)
        except (OSError, TypeError, ValueError) as error:  # A worker's would come with a traceback.
            return answer._replace(error=str(error))
        return answer


def start_worker(number: int) -> None:
    """Ignore what asks to end: the training process finishes its step, then ends the workers."""
    del number
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP.
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")


@contextmanager
def explain_dead_workers(*others: type[Exception]) -> Iterator[None]:
    """Say in one line that a worker has died, of which torch's error or one of `others` tells.

    Whatever the error, workers end now, not when whoever caught it lets go of it.
    """
    try:
        yield
    except Exception as error:
        # Their variables hold the loader, and with it the workers.
        traceback.clear_frames(error.__traceback__)
        text = one_line(error)
        torchs = isinstance(error, RuntimeError) and text.startswith("DataLoader worker")
        if not torchs and not isinstance(error, others):
            raise
        raise ChildProcessError(
            f"a process that decodes images died ({text}); if memory was short, use fewer --workers"
        ) from None


class Stream(Iterator[Tensor]):
    """Crops of stored images, as `read_batches` returns them, one batch ahead.

    A thread collects what the workers hand over and copies it to the device, beside the step
    that runs. Workers start with the first batch.
    """

    def __init__(
        self,
        images: StoredImages,
        draws: Iterable[Draw],
        *,
        size: int,
        min_scale: float,
        workers: int,
        device: torch.device,
    ) -> None:
        self.images, self.device, self.workers = images, device, workers
        self.loader: DataLoader[_Answer] = DataLoader(
            _Reader(images.source, size, min_scale),
            batch_size=None,
            sampler=_Parts(draws),
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=start_worker,
            # Otherwise the loader draws from the global generator, in the middle of a step.
            generator=torch.Generator(),
        )
        self.ready: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | BaseException]
        self.ready, self.room, self.closed = SimpleQueue(), Semaphore(), Event()
        self.quiet = ExitStack()
        self.thread = Thread(target=self._read_ahead, name="read ahead", daemon=True)

    def __next__(self) -> Tensor:
        """Return the next batch, (crops * N, C, S, S), channels last.

        Raises:
            OSError: If the images are gone or none of them can be read.
            ChildProcessError: If a worker has died.
        """
        if self.closed.is_set():
            raise StopIteration
        if self.thread.ident is None:
            atexit.register(self.close)  # Workers do not end by themselves.
            if self.workers:  # The thread notices one that dies.
                self.quiet.enter_context(without_worker_errors())
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
        self.quiet.close()
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
        """Join the parts of each batch: (crops * N, C, S, S)."""
        batch = torch.empty(0)
        for request, crops, unreadable, error in self._answers():
            if self.closed.is_set():
                return
            if error:
                raise OSError(error)
            self.images.note(unreadable)
            if request.first == 0:
                shape = (len(crops), request.total, *crops.shape[2:])  # (crops, N, S, S, C)
                # A GPU copies from pinned memory beside its work.
                pinned = self.device.type == "cuda"
                batch = torch.empty(shape, dtype=crops.dtype, pin_memory=pinned)
            end = request.first + len(request.numbers)
            batch[:, request.first : end] = crops
            if end == request.total:
                yield batch.flatten(0, 1).permute(0, 3, 1, 2)  # (crops * N, C, S, S)

    def _answers(self) -> Iterator[_Answer]:
        """Return what the workers hand over, in order."""
        with explain_dead_workers(*CUT_OFF if self.workers else ()):
            yield from self.loader


@dataclass(frozen=True)
class _Parts:
    """The parts of all draws, in order, drawn when a worker is to have the next one."""

    draws: Iterable[Draw]

    def __iter__(self) -> Iterator[_Request]:
        for draw in self.draws:
            numbers = draw.images.tolist()
            for first in range(0, len(numbers), _PART):
                part = numbers[first : first + _PART]
                yield _Request(part, first, len(numbers), draw.crops, draw.seed)


def _identity(answer: _Anything) -> _Anything:
    return answer
