"""solo-learn's steps on a pretended accelerator: mixed views add no wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mutations import mutate
from pretended import Accelerator, pretend
from pretended_known import SOLO
from pretended_processes import pretend_two_processes
from pretended_steps import MUTATIONS, Build, compare_waits, every_mutation, move_all
from solo_models import build, make_batch, make_cfg, needs_solo, take_step
from solo_oracles import METHODS
from torch import Tensor, nn

pytest_plugins = ("solo_fixtures",)

CASES = [(name, 0) for name in METHODS] + [(name, 2) for name in ("byol", "simclr", "swav")]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with pretend() as accelerator:
        yield accelerator


@pytest.fixture
def make(ours: dict[str, Any], theirs: dict[str, Any]) -> Callable[..., Build]:
    """Return what builds their models, patched and not."""

    def make(name: str, small: int = 0, **options: Any) -> Build:
        block = {"grid_size": 4, "ratio": (0.3, 0.7), **options}

        def build_one(mixes: bool, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
            cfg = make_cfg(name, small=small, mixmask=block if mixes else None)
            model = build(ours if mixes else theirs, cfg).to(device)
            if name == "dino":
                # No buffer: their first step would move it.
                model.dino_loss_func.center = model.dino_loss_func.center.to(device)
            batch = move_all(make_batch(small), device)
            return model, lambda: take_step(model, batch)

        return build_one

    return make


@needs_solo
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name, small", CASES)
def test_a_step_waits_only_where_theirs_does(
    name: str,
    small: int,
    processes: int,
    make: Callable[..., Build],
    monkeypatch: pytest.MonkeyPatch,
    accelerator: Accelerator,
) -> None:
    if processes == 2:
        pretend_two_processes(monkeypatch)
    options = {"per_sample": name != "barlow_twins", "small_crops": bool(small)}
    compare_waits(make(name, small, **options), accelerator, SOLO[name])


@needs_solo
@every_mutation
def test_a_mutation_is_noticed(
    mutation: str,
    make: Callable[..., Build],
    monkeypatch: pytest.MonkeyPatch,
    accelerator: Accelerator,
) -> None:
    *change, message = MUTATIONS[mutation]
    mutate(monkeypatch, *change)
    with pytest.raises(AssertionError, match=message):
        compare_waits(make("simclr"), accelerator, SOLO["simclr"])
