"""Processes that train: started together, alike, and ended by a signal or by another's death."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from mixmask._devices import choose_device
from mixmask._distributed import world_size
from mixmask.runs.files import LAST, PREVIOUS

Result = TypeVar("Result")

# Seconds that a process waits for the others: the first one measures accuracies alone.
_TIMEOUT = 1800
# How torch's backends begin to say that another process is gone or late.
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "timeout",
    "NCCL", "Socket", "Broken pipe",
)  # fmt: skip
# What asks a process to end: Ctrl-C, `kill`, and a terminal that is closed, where there is one.
_ENDINGS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def start_processes(device: torch.device | str | None = None) -> PartialState:
    """Join the processes that a launcher has started, and choose this one's device.

    Args:
        device: "cpu", "cuda:1", "mps". Default: what accelerate chooses, a GPU where there is one.

    Raises:
        ValueError: If there is no such device, or there are several processes, which have a device
            each, and one is named.
    """
    joined = dist.is_available() and dist.is_initialized()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    named = None if device is None else choose_device(device)
    if several and named is not None and named.type != "cpu":
        raise ValueError(f"--device {device} is for one process; of several, each has its own")
    if not joined:  # An earlier run in this process may have had another.
        AcceleratorState._reset_state(reset_partial_state=True)
    cpu = named is not None and named.type == "cpu"
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    seconds = float(os.environ.get("MIXMASK_TIMEOUT", _TIMEOUT))
    options = {"timeout": timedelta(seconds=seconds)} if several and not joined else {}
    state = PartialState(cpu=cpu, **options)
    if named is not None and not several:
        state.device = named
        if named.type == "cuda" and named.index is not None:
            torch.cuda.set_device(named)  # Events and streams are those of the current one.
    return state


def gather_objects(value: object) -> list[Any]:
    """Return what each process passed, in the order of their ranks."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def call_together(call: Callable[[], Result]) -> Result:
    """Call a function in each process; where one refuses, all of them raise."""
    result: Result | None = None
    refusal: Exception | None = None
    try:
        result = call()
    except (ValueError, TypeError, OSError) as error:
        refusal = error
    # Who refuses takes part too, for the others wait here.
    texts = gather_objects(str(refusal) if refusal else "")
    if refusal:
        raise refusal
    for rank, text in enumerate(texts):
        if text:
            raise ValueError(f"process {rank} failed: {text}")
    return result  # type: ignore[return-value]


def agree(facts: Mapping[str, object]) -> None:
    """Check that all processes have the same facts; otherwise all of them raise.

    Raises:
        ValueError: If they differ, naming the first that do.
    """
    first, *others = gather_objects(dict(facts))
    for rank, other in enumerate(others, start=1):
        names = [n for n in {**first, **other} if first.get(n) != other.get(n)]
        if names:
            shown = ", ".join(
                f"{n.replace('_', '-')} ({_shorten(first.get(n))} and {_shorten(other.get(n))})"
                for n in names[:3]
            )
            raise ValueError(
                f"processes 0 and {rank} differ in {shown}; start all of them with the same "
                "command, version and data"
            )


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]} ..."


def interruptible() -> AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, unless they are handled."""
    return at_first_signal(signal.default_int_handler, only_free=True)


@contextmanager
def at_first_signal(
    call: Callable[[int, FrameType | None], None], *, only_free: bool = False
) -> Iterator[None]:
    """Call a function at the first SIGINT, SIGTERM or SIGHUP; a second one acts as before.

    Args:
        call: Takes the signal's number and a frame.
        only_free: Leave alone the signals that are handled or ignored already.
    """
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    if threading.current_thread() is not threading.main_thread():  # No other may set handlers.
        before.clear()
    for number, handler in list(before.items()):
        taken = only_free and handler is not signal.SIG_DFL
        # nohup has a process ignore the end of its terminal. None was not set from Python, and
        # could not be set again.
        outlives = number.name == "SIGHUP" and handler is signal.SIG_IGN
        if taken or outlives or handler is None:
            del before[number]

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        call(number, frame)

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def report_lost_processes(folder: Path) -> Iterator[None]:
    """Say in one line that another process died or is not responding, and what is kept."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not any(text in str(error) for text in _LOST):
            raise
        kept = next((p for p in (folder / LAST, folder / PREVIOUS) if p.exists()), None)
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"another process died or is not responding ({reason}); "
            + (f"{kept} is kept: " if kept else "")
            + f"start all processes again with --resume {folder}"
        ) from None
