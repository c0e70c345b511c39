"""How many workers read images, by cores and by shared memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixmask.data import resources
from mixmask.data.resources import choose_workers


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Set the cores and the free bytes of shared memory."""

    def be(cores: int, shared: int) -> None:
        monkeypatch.setattr(resources, "available_cores", lambda: cores)
        monkeypatch.setattr(resources, "_SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=shared))

    return be


@pytest.mark.parametrize("cores, workers", [(1, 0), (2, 1), (9, 8), (64, 16)])
def test_workers_by_cores(cores: int, workers: int, machine: Callable[[int, int], None]) -> None:
    machine(cores, 10**12)
    assert choose_workers(0, 1000) == workers
    assert choose_workers(40, 1000) == 40


def test_workers_by_shared_memory(machine: Callable[[int, int], None]) -> None:
    machine(9, 64 * 2**20)
    with pytest.warns(UserWarning, match="shared memory has room for 1 of 8 workers"):
        assert choose_workers(0, 10 * 2**20) == 1
    message = r"--workers 3 needs 90 MiB of shared memory, which has room for 1; .*--shm-size"
    with pytest.raises(ValueError, match=message):
        choose_workers(3, 10 * 2**20)


def test_cores_and_memory_are_shared_by_local_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, free = resources.available_cores(), resources.free_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resources.available_cores() == max(1, alone // 4)
    assert resources.free_bytes() < 0.6 * free
