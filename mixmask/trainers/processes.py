"""Processes that train: started together, alike, and ended by a signal or by another's death."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from mixmask._devices import choose_device
from mixmask._distributed import launched, world_size
from mixmask.runs.files import LAST, PREVIOUS
from mixmask.runs.options import LARGEST

Result = TypeVar("Result")

# Seconds that a process waits for the others: the first one measures accuracies alone.
_TIMEOUT = 1800
# How torch's backends begin to say that another process is gone or late.
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "timeout",
    "NCCL", "Socket", "Broken pipe",
)  # fmt: skip


def start_processes(device: torch.device | str | None = None) -> PartialState:
    """Join the processes that a launcher has started, and choose this one's device.

    Args:
        device: "cpu", "cuda:1", "mps". Default: what accelerate chooses, a GPU where there is one.

    Raises:
        ValueError: If there is no such device, or there are several processes, which have a device
            each, and one is named, or MIXMASK_TIMEOUT, for which they wait, is no such number.
    """
    joined = dist.is_available() and dist.is_initialized()
    several = launched() > 1
    named = None if device is None else choose_device(device)
    if several and named is not None and named.type != "cpu":
        raise ValueError(f"--device {device} is for one process; of several, each has its own")
    options = {"timeout": _read_timeout()} if several and not joined else {}
    if not joined:  # An earlier run in this process may have had another.
        AcceleratorState._reset_state(reset_partial_state=True)
    cpu = named is not None and named.type == "cpu"
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, **options)
    if named is not None and not several:
        state.device = named
        if named.type == "cuda" and named.index is not None:
            torch.cuda.set_device(named)  # Events and streams are those of the current one.
    return state


def _read_timeout() -> timedelta:
    text = os.environ.get("MIXMASK_TIMEOUT") or str(_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= LARGEST:
        raise ValueError(
            f"MIXMASK_TIMEOUT must be a number of seconds within 1 ... {LARGEST}, got {text!r}; "
            f"leave it out for {_TIMEOUT}"
        )
    return timedelta(seconds=seconds)


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
