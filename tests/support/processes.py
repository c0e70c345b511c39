"""Run a function in several processes that form a group."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
