"""lightly-train's steps on a pretended accelerator: mixed views add no wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from mutations import mutate
from pretended import Accelerator, pretend
from pretended_known import LIGHTLY_TRAIN
from pretended_processes import pretend_two_processes
from pretended_steps import MUTATIONS, Build, compare_waits, every_mutation, move_all
from torch import Tensor, nn
from train_methods import build, draw_batch, method_helpers

import mixmask
from mixmask._devices import move
from mixmask.integrations.lightly_train import patch

pytestmark = pytest.mark.filterwarnings("ignore")
dist = pytest.importorskip("lightly.utils.dist")
eye_rank = dist.eye_rank
STEPS = [("simclr", 2), ("dino", 2), ("dino", 4)]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with pretend() as accelerator:
        yield accelerator


def _build(name: str, views: int = 2, **options: bool) -> Build:
    mixing = mixmask.MixMask(4, ratio=(0.3, 0.7), per_sample=options.pop("per_sample", False))

    def make(mixes: bool, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
        undo = patch(mixing, **options) if mixes else lambda: None
        try:
            module = build(method_helpers.get_method_cls(name)).to(device)
        finally:
            undo()
        batch = move_all(draw_batch(0, views), device)
        return module, lambda: module.training_step_impl(batch, 0).loss

    return make


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name, views", STEPS)
def test_a_step_waits_only_where_theirs_does(
    name: str,
    views: int,
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
    accelerator: Accelerator,
) -> None:
    if processes == 2:
        pretend_two_processes(monkeypatch)
        # Theirs fills a mask of the host at places of the device.
        monkeypatch.setattr(dist, "eye_rank", lambda n, device: move(eye_rank(n), device))
    steps = _build(name, views, symmetric=True, per_sample=True)
    compare_waits(steps, accelerator, LIGHTLY_TRAIN.get(name, ()))


OWN = {
    "center on the host": (
        "_note", "flatten().clone()", "flatten().cpu()",
        "center must be on the device of target, cuda:0, got cpu",
    ),
    "temperature of the device": (
        "_DINO._towards", 'torch.as_tensor(call["teacher_temp"])',
        'call["center"].new_tensor(call["teacher_temp"])',
        r"waits with mixed views .*'_local_scalar_dense', 'lightly_train\.py:_towards'",
    ),
}  # fmt: skip


@every_mutation
def test_a_mutation_is_noticed(
    mutation: str, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    *change, message = MUTATIONS[mutation]
    mutate(monkeypatch, *change)
    with pytest.raises(AssertionError, match=message):
        compare_waits(_build("dino"), accelerator)


@pytest.mark.parametrize("mutation", OWN)
def test_a_mutation_of_dino_is_noticed(
    mutation: str, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    *change, message = OWN[mutation]
    mutate(monkeypatch, *change)
    with pytest.raises((AssertionError, ValueError), match=message):
        compare_waits(_build("dino"), accelerator)
