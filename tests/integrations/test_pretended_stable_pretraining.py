"""stable-pretraining's steps on a pretended accelerator: mixed views add no wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from mutations import mutate
from pretended import Accelerator, pretend
from pretended_known import STABLE_PRETRAINING
from pretended_processes import pretend_two_processes
from pretended_steps import MUTATIONS, Build, compare_waits, every_mutation, move_all
from stable_methods import METHODS, build, draw_views, run_step
from torch import Tensor, nn

import mixmask

pytestmark = pytest.mark.filterwarnings("ignore")
wrap = pytest.importorskip("mixmask.integrations.stable_pretraining").wrap
pytest.importorskip("loguru").logger.disable("stable_pretraining")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with pretend() as accelerator:
        yield accelerator


def _build(name: str, **options: bool) -> Build:
    mixing = mixmask.MixMask(4, ratio=(0.3, 0.7), per_sample=options.pop("per_sample", False))

    def make(mixes: bool, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
        module = build(name)
        module = (wrap(module, mixing, **options) if mixes else module).to(device)
        views = move_all(draw_views(0), device)
        return module, lambda: run_step(name, module, views)["loss"]

    return make


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_only_where_theirs_does(
    name: str, processes: int, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    if processes == 2:
        pretend_two_processes(monkeypatch)
    options = {"symmetric": "MoCo" not in name, "per_sample": "arlow" not in name}
    compare_waits(_build(name, **options), accelerator, STABLE_PRETRAINING.get(name, ()))


@every_mutation
def test_a_mutation_is_noticed(
    mutation: str, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    *change, message = MUTATIONS[mutation]
    mutate(monkeypatch, *change)
    with pytest.raises(AssertionError, match=message):
        compare_waits(_build("SimCLR"), accelerator)


def test_a_queue_that_is_read_once_more_is_noticed(
    monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    mutate(monkeypatch, "_Step.criterion", "InfoNCE(queue,", "InfoNCE(module.queue.get(),")
    with pytest.raises(AssertionError, match=r"queues\.py.*get"):
        compare_waits(_build("MoCov2"), accelerator, STABLE_PRETRAINING["MoCov2"])
