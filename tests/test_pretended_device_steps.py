"""Views and whole steps of every method on a pretended accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from pretended import DEVICE, Accelerator, PretendedTensor, pretend
from pretended_known import ASKING, METER
from pretended_processes import pretend_two_processes
from tiny_runs import run, seeded, tiny_config, tiny_images
from torch import Tensor

from mixmask.data.views import RandomView
from mixmask.trainers import loop
from mixmask.trainers.config import MIXTURES, RunConfig
from mixmask.trainers.meter import Meter
from mixmask.trainers.methods import METHODS, build_method
from mixmask.trainers.run import Run, build_optimizer, random_view

# Options that take another way through a step, and a method that has them.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "per sample": ("moco-v2", {"per_sample": True, "grid_size": 4, "ratio": (0.25, 0.75)}),
    "discrete": ("moco-v2", {"pattern": "discrete"}),
    "rolled": ("moco-v2", {"roll": True}),
    "without switch": ("moco-v2", {"switch": False}),
    "smaller mixed views": ("moco-v2", {"mixed_size": 24}),
    "extra crops": ("moco-v2", {"extra_crops": 1}),
    "mixed views alone": ("moco-v2", {"replace_clean": True}),
    "accumulated": ("moco-v2", {"accumulate": 2}),
    "symmetric": ("moco-v2", {"symmetric": True}),
    "split norms": ("moco-v2", {"bn_splits": 2}),
    "one direction": ("simclr", {"one_directional": True}),
    "training prototypes": ("swav", {"frozen": 0.0}),
    "channels": ("moco-v2", {"mix": "erase", "channel_share": 1.0, "per_sample": True}),
    "lars": ("simsiam", {"optimizer": "lars"}),
    "adamw": ("byol", {"optimizer": "adamw"}),
}
# Their losses take rows from all processes.
COUNTING = ("simclr", "barlow-twins", "swav")
VIEWS: dict[str, dict[str, Any]] = {
    "everything": {"blur": 0.5},
    "crops": {"crop": False, "blur": 1.0},
    "nothing": {"jitter": 0.0, "hue": 0.0, "grey": 0.0},
}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with pretend() as accelerator:
        yield accelerator


def _on_host(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, PretendedTensor)
    return tensor.held


@pytest.mark.parametrize("name", VIEWS)
def test_views_never_wait_and_are_those_of_the_cpu(name: str, accelerator: Accelerator) -> None:
    images, view = tiny_images(8), RandomView(64, **VIEWS[name])
    expected = view(images, generator=seeded())
    moved = images.to(DEVICE)
    with accelerator.watched():
        found = view(moved, generator=seeded())
    torch.testing.assert_close(_on_host(found), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_many_views_with_a_large_blur(accelerator: Accelerator) -> None:
    images, view = (
        torch.zeros(800, 3, 16, 16, dtype=torch.uint8).to(DEVICE),
        RandomView(16, blur=1.0),
    )
    view.kernel = 23  # That of views of 224 pixels.
    with accelerator.watched():
        view(images)


class Steps:
    """A run's steps on one device, as the loop takes them."""

    def __init__(self, method: str, device: torch.device, **options: Any) -> None:
        self.config = tiny_config(method, blur=0.5, warmup=0.0, **options)
        torch.manual_seed(0)
        self.model: Any = build_method(self.config).to(memory_format=torch.channels_last)
        self.model.to(device)
        self.optimizer = build_optimizer(self.model, self.config)
        self.images = tiny_images(8).to(device)
        self.view, self.meter = random_view(self.config, self.images), Meter()

    def __call__(self) -> None:
        count, parts = 2 + self.config.extra_crops, self.config.accumulate
        generator = seeded()
        views = self.view(self.images.repeat(count, 1, 1, 1), generator=generator).chunk(count)
        for x1, x2, *extra in zip(*(view.chunk(parts) for view in views), strict=True):
            for term in self.model.terms(x1, x2, generator, extra=extra):
                (term.loss / parts).backward()
                self.meter.add(term, 1 / parts)
                if term.pair:
                    self.meter.look(term.pair)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step(0.5)


def _watch(steps: Steps, accelerator: Accelerator, *known: Any) -> None:
    steps()  # The optimiser makes its state.
    with accelerator.watched(*known):
        steps()


@pytest.mark.parametrize("mix", MIXTURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits(method: str, mix: str, accelerator: Accelerator) -> None:
    _watch(Steps(method, DEVICE, mix=mix), accelerator)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_with_an_option_never_waits(name: str, accelerator: Accelerator) -> None:
    method, options = OPTIONS[name]
    _watch(Steps(method, DEVICE, **{"mix": "both", **options}), accelerator)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_end_in_the_weights_of_the_cpu(method: str) -> None:
    ours, theirs = Steps(method, DEVICE, mix="both"), Steps(method, torch.device("cpu"), mix="both")
    for steps in (ours, theirs):
        steps()
        steps()
    found = ours.model.state_dict()
    for name, expected in theirs.model.state_dict().items():
        torch.testing.assert_close(_on_host(found[name]), expected, rtol=1e-3, atol=1e-4)
    for name in ("clean", "mixed", "lam", "spread", "alignment", "uniformity"):
        sums = [float(getattr(steps.meter, name)) for steps in (ours, theirs)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_over_two_ranks(
    method: str, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    pretend_two_processes(monkeypatch)
    _watch(Steps(method, DEVICE, mix="both"), accelerator)


class Event:
    """Stand for a CUDA event that has come."""

    def record(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        return True


@pytest.mark.parametrize("processes", [1, 2])
def test_the_loop_never_waits_between_its_steps(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    if processes == 2:
        pretend_two_processes(monkeypatch)
        monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda _: 2))
    steps, rate, calls = 13, loop.learning_rate, [0]

    def watched(config: RunConfig, done: float) -> float:
        # The first steps make the optimiser's state, after the last one means are read.
        calls[0] += 1
        accelerator.steady = 2 <= calls[0] < steps
        return rate(config, done)

    monkeypatch.setattr(loop, "learning_rate", watched)
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda _: DEVICE))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(loop, "memory_gib", lambda _: 0.0)
    monkeypatch.setattr(Run, "save", lambda _, **__: None)
    config = tiny_config("moco-v2", mix="both", blur=0.5, epochs=1)
    with accelerator.watched(*METER, *(ASKING if processes == 2 else ())):
        accelerator.steady = False
        run(config, tiny_images(8 * steps * processes), tmp_path)
    assert calls[0] == steps
