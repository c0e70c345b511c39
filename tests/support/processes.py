"""Run a function in several processes, which form a group or are started as by a launcher."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

# A process whose partner has failed gives up after this.
_PATIENCE = timedelta(seconds=60)


def run_in_processes(work: Callable[[int], Any], folder: Path, world: int = 2) -> list[Any]:
    """Return what `work(rank)` returns in each process, in the order of their ranks.

    Args:
        work: A function of a module. Warnings in it are errors.
        folder: An empty folder, in which the processes meet.
        world: How many processes there are.
    """
    spawn(_run, (work, world, str(folder)), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _run(rank: int, work: Callable[[int], Any], world: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=_PATIENCE,
    )
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def launch_processes(
    work: Callable[[int, Path], Any], folder: Path, *, seconds: float, codes: Sequence[int] = (0, 0)
) -> list[Any]:
    """Start processes as `accelerate launch` does, which join when the work asks for it.

    Args:
        work: A function of a module, called with its rank and the folder. A process that ends
            itself leaves its result as `RANK.pt` first.
        folder: Where results go.
        seconds: How long they may take.
        codes: The exit codes to be expected, one per process.

    Returns:
        The results, in the order of the ranks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_launched, args=(work, rank, len(codes), port, folder))
        for rank in range(len(codes))
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    assert [process.exitcode for process in processes] == list(codes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(codes))]


def _launched(
    work: Callable[[int, Path], Any], rank: int, world: int, port: int, folder: Path
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
