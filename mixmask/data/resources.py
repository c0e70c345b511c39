"""The share of a machine that this process may use: memory, cores, worker processes."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import psutil
import torch

from mixmask._distributed import launched

# By default, images are kept in memory if they take at most this, and this share of what is free.
MAX_BYTES = 24 * 2**30
SHARE_OF_FREE = 0.25

_MAX_WORKERS = 16
# Workers hand their images over in it; containers often have 64 MiB.
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # Nothing is written there but by torch.


def local_processes() -> int:
    """Return how many training processes share this machine."""
    return launched("LOCAL_WORLD_SIZE")


def available_cores() -> int:
    """Return how many cores this process may use, its neighbours' share left out."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, cores // local_processes())


def free_bytes() -> int:
    """Return the free bytes for this process: of its share of the host, or of its GPU if fewer."""
    host: int = psutil.virtual_memory().available // local_processes()
    if not torch.cuda.is_available():
        return host
    device: int = torch.cuda.mem_get_info()[0]
    return min(host, device)


def memory_gib(device: torch.device) -> float:
    """Return the GiB taken: of a GPU by tensors at their peak, of the host by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    taken: int = psutil.Process().memory_info().rss
    return taken / 2**30


def choose_workers(asked: int, part_bytes: int) -> int:
    """Return the number of worker processes.

    Args:
        asked: How many; 0 = CPU cores - 1, at most 16 and at most what shared memory has room
            for, which may be none.
        part_bytes: What one part of a batch takes, of which a worker has up to three at a time.

    Raises:
        ValueError: If shared memory has no room for those asked for.
    """
    room = _MAX_WORKERS * 1000
    if _SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(_SHARED_MEMORY).free // local_processes()
        room = int(0.8 * free / (3 * part_bytes))
    fix = f"give {_SHARED_MEMORY} more room (a container's --shm-size)"
    if asked > room:
        raise ValueError(
            f"--workers {asked} needs {asked * 3 * part_bytes / 2**20:.0f} MiB of shared memory, "
            f"which has room for {room}; {fix}, or use --workers {room}"
        )
    if asked:
        return asked
    wanted = min(_MAX_WORKERS, available_cores() - 1)
    if wanted > room:
        warnings.warn(
            f"shared memory has room for {room} of {wanted} workers that decode images; {fix}",
            stacklevel=3,
        )
    return min(wanted, room)
