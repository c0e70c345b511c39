"""How near a step comes to what its machine can do: arithmetic, memory traffic, idle time.

A step's arithmetic is counted by torch, its traffic as the bytes that each operation of the
eager step reads and writes; a compiled step moves fewer, so its share of the memory's speed is an
upper bound. Both are set against a plain matrix product and a plain copy on the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from common import Figure, Side, synchronise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Best of so many short calls: what the machine can do, also where others use it meanwhile.
_TRIES = 40


class TrafficMode(TorchDispatchMode):
    """Adds up the bytes that operations read and write; views and allocations move none."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count it."""
        del types
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func.__name__ or "detach" in func.__name__):
            leaves = tree_leaves((args, kwargs, out))
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return out


def work(side: Side) -> tuple[int, int]:
    """Return the floating-point operations and the bytes of one call."""
    with FlopCounterMode(display=False) as flops:
        side()
    with TrafficMode() as traffic:
        side()
    return flops.get_total_flops(), traffic.bytes


def ceilings(device: str, dtype: torch.dtype, *, small: bool = False) -> tuple[float, float]:
    """Measure FLOP/s of a square matrix product and bytes/s of a copy, read and written."""
    on_gpu = torch.device(device).type == "cuda"
    n = 256 if small else 8192 if on_gpu else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    count = 2**16 if small else 2**29 if on_gpu else 2**24
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b), device)
    copy = _best(lambda: target.copy_(source), device)
    return 2 * n**3 / product, 8 * count / copy


def _best(side: Side, device: str) -> float:
    seconds = []
    for _ in range(_TRIES + 1):
        synchronise(device)
        start = time.perf_counter()
        side()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def roofline(
    sides: Mapping[str, Side],
    seconds: Mapping[str, float],
    *,
    device: str,
    dtype: torch.dtype,
    small: bool = False,
) -> list[Figure]:
    """Say for each side which share of the machine's ceilings its step reaches.

    Args:
        sides: One eager step each, by what they are called.
        seconds: What a step of each takes, by the same names.
        device: Where they run.
        dtype: Of the matrix product that is the ceiling.
        small: Whether this is a trial, with ceilings measured on little.
    """
    name = str(dtype).removeprefix("torch.")
    most_flops, most_bytes = ceilings(device, dtype, small=small)
    figures = [
        Figure(f"ceiling: matrix product in {name}", most_flops, "FLOP/s"),
        Figure("ceiling: copy", most_bytes, "B/s"),
    ]
    for label, side in sides.items():
        flops, moved = work(side)
        figures += [
            Figure(f"{label}: arithmetic", flops / seconds[label], "FLOP/s"),
            Figure(f"{label}: of the matrix product", flops / seconds[label] / most_flops, "share"),
            Figure(f"{label}: of the copy", moved / seconds[label] / most_bytes, "share"),
        ]
    return figures


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """Return the length of the union of intervals, each (start, end).

    Example:
        >>> covered([(0, 4), (2, 5), (7, 8)])
        6
    """
    total = until = 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def start_profile(device: str) -> torch.profiler.profile | None:
    """Start to note what a CUDA device runs; None for other devices."""
    if torch.device(device).type != "cuda":
        return None
    synchronise(device)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profile.start()
    return profile


def busy_seconds(profile: torch.profiler.profile) -> float:
    """End a profile and return for how long the device ran something."""
    torch.cuda.synchronize()
    profile.stop()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    nanoseconds = covered(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profile.profiler.kineto_results.events()
        # Annotations span kernels and the gaps between them.
        if event.device_type().name == "CUDA" and not event.name().startswith("Optimizer.")
    )
    return nanoseconds / 1e9
