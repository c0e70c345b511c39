"""Whole runs: the files they leave, exact resumption, interruption, damage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same, interrupt_at, read_rows, run, tiny_config, tiny_images
from torch import Tensor

from mixmask.trainers.methods import build_method, make_config
from mixmask.trainers.methods.moco import MoCo

TINY: dict[str, Any] = {"epochs": 3, "batch_size": 8, "queue_size": 29, "dim": 16, "image_size": 16}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return tiny_images(24)


@pytest.mark.parametrize("step", [3, 4])
def test_interrupted_and_resumed_ends_in_the_same_weights(
    step: int, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**TINY, mix="both")
    whole = run(config, images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(step, MoCo, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, images, tmp_path / "parts")
    torch.manual_seed(12345)  # What another process would have drawn must not matter.
    assert_same(run(config, images, tmp_path / "parts", resume=True), whole)
    rows = read_rows(tmp_path / "parts")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    losses = [
        [float(row["loss"]) for row in read_rows(tmp_path / name)] for name in ("parts", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_seconds_of_the_epochs_add_up_to_no_more_than_the_run(
    images: Tensor, tmp_path: Path
) -> None:
    began = time.perf_counter()
    run(make_config(**TINY), images, tmp_path)
    whole = time.perf_counter() - began
    assert 0 < sum(float(row["seconds"]) for row in read_rows(tmp_path)) <= whole


def test_every_epoch_notes_what_a_tracker_shows(images: Tensor, tmp_path: Path) -> None:
    run(make_config(**TINY, lr=0.02), images, tmp_path)
    for row in read_rows(tmp_path):
        number = {name: float(value) for name, value in row.items()}
        assert number["loss"] == pytest.approx(number["loss_clean"] + number["loss_mixed"])
        assert 0 < number["lam"] < 1
        assert 0 < number["lr"] <= 0.02
        assert 0.1 < number["memory_gib"] < 100  # Torch alone takes more than that.
        assert number["images_per_s"] > 0
        assert 0 <= number["wait"] < 1
        assert 0 <= number["alignment"] <= 4
        assert number["uniformity"] < 0 < number["spread"]


def test_seed_decides_everything(images: Tensor, tmp_path: Path) -> None:
    config = make_config(**(TINY | {"epochs": 1}))
    first = run(config, images, tmp_path / "a")
    torch.manual_seed(99)
    assert_same(run(config, images, tmp_path / "b"), first)
    other = run(make_config(**(TINY | {"epochs": 1, "seed": 1})), images, tmp_path / "c")
    assert not torch.equal(other.head[0].weight, first.head[0].weight)


@pytest.mark.parametrize("method", ["moco-v2", "byol"])
def test_compiled_backbones_train_like_plain_ones(
    method: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 1, "measure_every": 0}
    images = images[:8]  # One step: rounding grows from step to step.
    plain = run(tiny_config(method, **options), images, tmp_path / "plain")
    asked: list[tuple[torch.nn.Module, Any]] = []
    compile_ = torch.nn.Module.compile

    def noting(module: torch.nn.Module, **given: Any) -> None:
        asked.append((module, given["mode"]))
        compile_(module, backend="aot_eager")  # Generating code takes a minute.

    monkeypatch.setattr(torch.nn.Module, "compile", noting)
    config = tiny_config(method, **options, compile=True, compile_mode="reduce-overhead")
    compiled = run(config, images, tmp_path / "compiled")
    follower = compiled.key_backbone if method == "moco-v2" else compiled.target_backbone
    assert asked == [(compiled.backbone, "reduce-overhead"), (follower, "reduce-overhead")]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    images: Tensor, tmp_path: Path
) -> None:
    config = make_config(**TINY)
    whole = run(config, images, tmp_path)
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="last.pt is damaged"):
        assert_same(run(config, images, tmp_path, resume=True), whole)


@pytest.mark.filterwarnings("ignore:.*is used instead")
def test_nothing_whole_to_resume(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        run(make_config(**TINY), images, tmp_path, resume=True)
    (tmp_path / "last.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        run(make_config(**TINY), images, tmp_path, resume=True)


def test_batch_larger_than_the_data(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size 25 is more than the 24 images"):
        run(make_config(**(TINY | {"batch_size": 25})), images, tmp_path)


def test_processes_that_are_not_joined_are_refused(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate has joined 1;"):
        run(make_config(**TINY), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loss_that_is_not_finite_stops_the_run(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = MoCo.encode
    monkeypatch.setattr(MoCo, "encode", lambda self, x: encode(self, x) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"the loss became nan in epoch 1.*lower --lr"):
        run(make_config(**TINY), images, tmp_path)


@pytest.mark.parametrize("mix", ["none", "mixmask", "unmix", "both", "erase"])
@pytest.mark.parametrize("method", ["moco-v1", "moco-v2"])
def test_every_mixture_trains(mix: str, method: str, images: Tensor, tmp_path: Path) -> None:
    config = make_config(**(TINY | {"epochs": 1}), mix=mix, method=method)
    model: Any = build_method(config)
    before = model.head.state_dict()
    model = run(config, images, tmp_path)
    (row,) = read_rows(tmp_path)
    assert (float(row["loss_mixed"]) > 0) == (mix != "none")
    assert 0 < float(row["lam"]) <= 1
    assert any(not torch.equal(a, before[name]) for name, a in model.head.state_dict().items())


def test_bf16_trains(images: Tensor, tmp_path: Path) -> None:
    run(make_config(**(TINY | {"epochs": 1}), precision="bf16"), images, tmp_path)
    assert torch.isfinite(torch.tensor(float(read_rows(tmp_path)[0]["loss"])))


def test_monitor_measures_before_between_and_after(images: Tensor, tmp_path: Path) -> None:
    asked: list[bool] = []

    def monitor(backbone: torch.nn.Module, thorough: bool) -> dict[str, float]:
        asked.append(thorough)
        backbone.eval()
        return {"knn": 0.25}

    run(make_config(**TINY, measure_every=2), images, tmp_path, monitor=monitor)
    assert asked == [True, False, True]
    assert [row["knn"] for row in read_rows(tmp_path)] == ["0.25", "", "0.25", "0.25"]
