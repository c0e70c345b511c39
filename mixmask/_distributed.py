"""Rows and averages over all processes, with their gradients; nothing where there is one."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch has renamed it, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


def world_size() -> int:
    """Return the number of processes, 1 where none were started."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def launched(name: str = "WORLD_SIZE") -> int:
    """Return how many processes a launcher says it has started, 1 without one."""
    text = os.environ.get(name) or "1"
    if not text.isdecimal():
        raise ValueError(
            f"{name}, which launchers set, must be a number of processes, got {text!r}; unset it"
        )
    return int(text)


def rank() -> int:
    """Return the number of this process, 0 where none were started."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(rows: Tensor, *, checked: bool = True) -> Tensor:
    """Stack the rows (N, ...) of all W processes by rank, (W * N, ...), with gradients.

    `checked` refuses another N of another process, see `check_even`.
    """
    if world_size() == 1:
        return rows
    if checked:
        check_even(len(rows), rows.device, rows.shape[1:])
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def exchange_rows(rows: Tensor) -> Tensor:
    """Exchange rows (N, ...) so that every process holds an equal part of each one's, by rank.

    Exchanged again, they are the rows given. No gradients pass.
    """
    world, own = world_size(), rank()
    share, rest = divmod(len(rows), world)
    # As many to a process as from it, so that a second exchange undoes the first.
    sizes = [share + ((own + other) % world < rest) for other in range(world)]
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, rows.contiguous(), sizes, sizes)
    return received


def average(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, with gradients."""
    if world_size() == 1:
        return value
    averaged: Tensor = _Average.apply(value)
    return averaged


# Rows at the last comparison, by what was compared.
_compared: dict[object, tuple[int, int]] = {}


def check_even(n: int, device: torch.device, kind: object = None) -> None:
    """Refuse a batch that is split unevenly; every process must call this, on the group's device.

    On a CPU all of them raise, on a GPU those whose size has changed since their last call.
    """
    world = world_size()
    if world == 1 or torch.compiler.is_compiling():
        return
    # Always exchanged, for a process cannot know whether another one is about to read.
    sizes = torch.empty(world, dtype=torch.int64, device=device)  # (W,)
    _all_gather(sizes, torch.full((1,), n, dtype=torch.int64, device=device))
    # Reading would wait for a GPU, so there it is done only when the own size has changed.
    if device.type != "cpu" and _compared.get(kind) == (world, n):
        return
    counts = sizes.tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"every process must hold the same number of images, got {counts} by rank; use "
            "drop_last=True in the loader, with a DistributedSampler"
        )
    _compared[kind] = world, n


class _Gather(torch.autograd.Function):
    """Stack rows; each process gets back what all of them ask of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Return (W * N, ...)."""
        ctx.rows = len(rows)
        gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of this process's rows, (N, ...)."""
        # Every process computes a loss of its own from these rows: the gradients add up.
        total = grad.contiguous().clone()  # (W * N, ...)
        dist.all_reduce(total)
        first = rank() * ctx.rows
        return total[first : first + ctx.rows]


class _Average(torch.autograd.Function):
    """Average; the gradient is averaged too, as every process has a loss of its own."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        """Return the mean over processes."""
        return _mean(value)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        """Return the sum of the gradients over processes, divided by their number."""
        return _mean(grad)


def _mean(value: Tensor) -> Tensor:
    total = value.contiguous().clone()
    dist.all_reduce(total)
    return total.div_(world_size())
