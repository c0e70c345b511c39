"""Steps of solo-learn's methods in two processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from solo_models import (
    BLOCKS,
    Tiny,
    compare_step,
    make_cfg,
    needs_solo,
)
from solo_oracles import (
    METHODS,
)
from torch.multiprocessing.spawn import spawn

from mixmask.integrations import solo as integration
from mixmask.integrations.solo import Step


def _in_two_processes(work: Callable[..., None], tmp_path: Path) -> None:
    spawn(_process, (work, str(tmp_path / "meeting")), nprocs=2)


def _process(rank: int, work: Callable[..., None], meeting: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    from solo.methods import METHODS as REGISTERED
    from solo.methods.base import BaseMethod

    BaseMethod._BACKBONES["tiny"] = Tiny
    classes = dict(REGISTERED)
    integration.patch()
    try:
        work(REGISTERED, classes)
    finally:
        dist.destroy_process_group()


def _compare_all(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in METHODS:
        compare_step(ours, theirs, name, BLOCKS["default"])
        if name != "barlow_twins":
            # Where λ differs, its gradients meet those of other processes at their λ.
            compare_step(ours, theirs, name, BLOCKS["partner=random"])


def _uneven(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    del theirs
    rows = 6 - 2 * dist.get_rank()
    for name in ("mocov3", "nnclr", "simclr", "vicreg"):
        model = ours[name](make_cfg(name, mixmask={"grid_size": 4}))
        criterion = model.recipe.criterion(model, Step(), 1)
        with pytest.raises(
            ValueError, match=r"same number of images, got \[6, 4\] by rank; use drop"
        ):
            criterion(torch.randn(rows, 8), torch.randn(rows, 8))


@needs_solo
@pytest.mark.slow
def test_in_two_processes_a_step_is_theirs_plus_the_mixed_term(tmp_path: Path) -> None:
    _in_two_processes(_compare_all, tmp_path)


@needs_solo
@pytest.mark.slow
def test_an_uneven_batch_is_refused_by_every_process(tmp_path: Path) -> None:
    _in_two_processes(_uneven, tmp_path)
