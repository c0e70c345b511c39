"""Processes that train: started together, alike, and ended by a signal or by another's death."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from mixmask._distributed import world_size
from mixmask.runs.folder import LAST, PREVIOUS

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
        ValueError: If there are several processes, which have a device each, and one is named.
    """
    joined = dist.is_available() and dist.is_initialized()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    named = None if device is None else torch.device(device)
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


def gather_objects(value: Any) -> list[Any]:
    """Return what each process passed, in the order of their ranks."""
    gathered = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def together(call: Callable[[], Result]) -> Result:
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
            raise ValueError(f"process {rank} refuses: {text}")
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


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, unless they are handled."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with _handling(interrupt, lambda _, handler: handler is signal.SIG_DFL):
        yield


@contextmanager
def postponing(request: Callable[[], None]) -> Iterator[None]:
    """Call a function instead at the first SIGINT, SIGTERM or SIGHUP; a second acts as before."""

    def is_handled(number: int, handler: object) -> bool:
        # nohup has a process ignore the end of its terminal.
        return signal.Signals(number).name != "SIGHUP" or handler is not signal.SIG_IGN

    with _handling(request, is_handled):
        yield


@contextmanager
def _handling(
    call: Callable[[], None], is_handled: Callable[[int, object], bool]
) -> Iterator[None]:
    """Call a function at the first of each signal that it is to handle."""
    if threading.current_thread() is not threading.main_thread():  # No other may set handlers.
        yield
        return
    before = {
        number: handler
        for number in _ENDINGS
        # None is a handler that was not set from Python, and cannot be set again.
        if (handler := signal.getsignal(number)) is not None and is_handled(number, handler)
    }

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        call()

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def losing_others(folder: Path) -> Iterator[None]:
    """Say in one line that another process has died or hangs, and what is kept."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not any(text in str(error) for text in _LOST):
            raise
        kept = next((p for p in (folder / LAST, folder / PREVIOUS) if p.exists()), None)
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"another process has died or hangs ({reason}); "
            + (f"{kept} is kept: " if kept else "")
            + f"start all processes again with --resume {folder}"
        ) from None
