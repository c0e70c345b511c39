"""Whether a step waits for the device: on a GPU, and without one on tensors that have no values."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run, seeded, tiny_config, tiny_images

from mixmask.trainers import loop
from mixmask.trainers.config import MIXTURES, RunConfig
from mixmask.trainers.loop import train_method
from mixmask.trainers.meter import Meter
from mixmask.trainers.methods import METHODS, build_method
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.run import build_optimizer, random_view

# Mixing does not know who asked for it.
CASES = [(method, "both") for method in METHODS] + [("moco-v2", mix) for mix in MIXTURES]
STEPS = 10


class _OnTheHost(torch.Generator):
    def __new__(cls, *_: object) -> _OnTheHost:
        return super().__new__(cls)


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let meta tensors pass where torch asks for a real device, though no value is needed."""
    monkeypatch.setattr(torch, "Generator", _OnTheHost)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("method, mix", CASES)
def test_a_step_needs_no_value_on_the_host(method: str, mix: str) -> None:
    config = tiny_config(method, mix=mix, blur=0.5, warmup=0.0)
    model = build_method(config).to("meta")
    optimizer, meter = build_optimizer(model, config), Meter()
    images = torch.empty(8, 3, 64, 64, dtype=torch.uint8, device="meta")
    view = random_view(config, images)
    for _ in range(2):
        x1, x2 = view(images.repeat(2, 1, 1, 1)).chunk(2)
        for term in model.terms(x1, x2, seeded()):
            term.loss.backward()
            meter.add(term)
            if term.pair:
                meter.look(term.pair)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.5)


def test_reading_a_value_without_one_fails() -> None:
    """So the test above can fail."""
    meter = Meter(clean=torch.zeros((), device="meta"), steps=1)
    with pytest.raises(RuntimeError, match="meta"):
        meter.state()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_never_wait_for_the_gpu(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device found")
    rate, calls = loop.learning_rate, [0]

    def watched(config: RunConfig, done: float) -> float:
        # The first steps set up libraries, the end of the epoch reads the means.
        calls[0] += 1
        watch = 2 <= calls[0] < 2 + STEPS
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        return rate(config, done)

    monkeypatch.setattr(loop, "learning_rate", watched)
    config: Any = tiny_config(method, mix="both", blur=0.5, epochs=1)
    try:
        run(config, tiny_images(8 * (STEPS + 3)), tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls[0] == STEPS + 3


class _Copied:
    """Stand for a CUDA event."""

    done = False

    def query(self) -> bool:
        return self.done


def test_the_progress_bar_shows_what_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(steps=2, views=2, clean=torch.tensor(4.0), mixed=torch.tensor(2.0))
    meter.lam = torch.tensor(1.0)
    meter.start(8)
    assert meter.summary().startswith("loss 3.000, λ 0.500, ")

    copied: Any = _Copied()
    send = Meter.send
    monkeypatch.setattr(Meter, "send", lambda meter: send(meter)._replace(copied=copied))
    meter.clean, meter.steps = torch.tensor(16.0), 3
    assert meter.summary().startswith("loss 3.000")  # Under way, and nobody waits.
    meter.clean, meter.steps, copied.done = torch.tensor(99.0), 4, True
    assert meter.summary().startswith("loss 6.000")  # As it was sent.


def test_the_progress_bar_says_how_long_the_whole_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, after_step = [0.0], MoCo.after_step

    def slow(self: MoCo, done: float) -> None:
        after_step(self, done)
        clock[0] += 3600

    monkeypatch.setattr(MoCo, "after_step", slow)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    config = tiny_config("moco-v2", epochs=10)  # Of two steps each.
    train_method(config, tiny_images(16), tmp_path)
    shown = capsys.readouterr().err.split("\r")
    (first, *_) = (text for text in shown if " 1/20 " in text)
    assert "[1:00:00, 19:00:00 left, " in first


def test_the_progress_bar_has_no_lambda_without_mixed_views() -> None:
    meter = Meter(steps=2, clean=torch.tensor(4.0))
    meter.start(8)
    assert meter.summary().startswith("loss 2.000, ")
    assert "λ" not in meter.summary()
