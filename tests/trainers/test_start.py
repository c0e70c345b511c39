"""A run's life: started, failed, killed, and what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from started import TINY, equal, start, weights
from tiny_runs import assert_same, tiny_config

from mixmask.runs.folder import FORMAT, load_checkpoint, read_config
from mixmask.trainers import pretrain
from mixmask.trainers.files import read_options_file
from mixmask.trainers.methods import build_method, make_config
from mixmask.trainers.methods.moco import MoCo


def test_a_run_says_in_full_what_it_was(whole: Path, noise: Path) -> None:
    config = read_config(whole)
    assert (config["format"], config["processes"]) == (FORMAT, 1)
    assert config["data"] == str(noise.resolve())
    assert config["fingerprint"]["train"] == 24
    assert config["fingerprint"]["classes"] == ["cat", "dog"]
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "curves.png", "last.pt", "metrics.csv", "previous.pt", "views.png",
    }  # fmt: skip


def test_what_a_monitor_measures_is_kept_as_numbers(noise: Path, tmp_path: Path) -> None:
    def measure(*_: object) -> dict[str, Any]:
        return {"knn": np.float32(0.25)}

    options = TINY | {"epochs": 1, "data": str(noise)}
    first = start(tmp_path / "run", monitor=lambda *_: measure, **options)
    with pytest.warns(UserWarning, match="2 epochs instead of 1"):
        again = start(None, resume=first.folder, epochs=2, monitor=lambda *_: measure)
    assert [row["knn"] for row in again.rows if "knn" in row] == [0.25] * 3
    with pytest.raises(TypeError, match=r"monitor must return numbers by their names, got .*many"):
        start(tmp_path / "text", monitor=lambda *_: lambda *_: {"knn": "many"}, **options)


def test_a_run_folder_inside_of_the_data_is_refused(
    noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(noise)
    for out in (noise / "run", None):
        with pytest.raises(ValueError, match=r"lies inside of the data, .*; choose an --out elsew"):
            start(out, data=".", **TINY)
    assert not (noise / "run").exists()


@pytest.mark.filterwarnings("ignore:.*no supported trackers are currently installed")
def test_a_start_that_fails_leaves_no_folder(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    fixed = TINY | {"arch": "vit_tiny_patch16_224", "image_size": 20}
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 cannot take images of 20 pixels"):
        start(out, data=str(noise), **fixed)
    assert not out.exists()

    def no_key(*_: object, **__: object) -> None:
        raise RuntimeError("api_key not configured")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", no_key)
        patch.setattr("importlib.util.find_spec", lambda _: True)
        with pytest.raises(
            ValueError, match=r"--tracker tensorboard could not be started \(api_key"
        ):
            start(out, data=str(noise), **TINY, tracker="tensorboard")
    assert not out.exists()

    encode = MoCo.encode
    with monkeypatch.context() as patch:
        patch.setattr(MoCo, "encode", lambda self, x: encode(self, x) * float("nan"))
        out.mkdir()  # An empty one, or what lay there before, stays.
        with pytest.raises(FloatingPointError, match=r"nan in epoch 1; lower --lr$"):
            start(out, data=str(noise), **TINY)
    assert out.is_dir()
    assert not list(out.iterdir())


def test_messages_name_a_checkpoint_only_where_there_is_one(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, steps = MoCo.encode, [0]

    def late(self: MoCo, x: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        return encode(self, x) * (float("nan") if steps[0] > 6 else 1.0)

    monkeypatch.setattr(MoCo, "encode", late)
    message = r"epoch 2; .*last\.pt holds the last good step: lower --lr, or use --precision fp32$"
    with pytest.raises(FloatingPointError, match=message):
        start(tmp_path / "run", data=str(noise), **TINY, precision="bf16")


def test_checkpoints_of_epochs_are_kept_and_the_best(noise: Path, tmp_path: Path) -> None:
    accuracies = iter([0.1, 0.2, 0.9, 0.5, 0.4])
    options = TINY | {"epochs": 4, "measure_every": 1}
    result = pretrain(
        data=str(noise),
        out=tmp_path / "run",
        progress=False,
        monitor=lambda *_: lambda *_: {"knn": next(accuracies)},
        keep=2,
        **options,
    )
    kept = {path.name for path in result.folder.glob("*.pt")}
    assert kept == {"last.pt", "previous.pt", "epoch-0003.pt", "epoch-0004.pt", "best.pt"}
    steps = {
        name: torch.load(result.folder / f"{name}.pt", weights_only=True)["step"]
        for name in ("best", "epoch-0003", "epoch-0004", "last")
    }
    assert steps == {"best": 6, "epoch-0003": 9, "epoch-0004": 12, "last": 12}
    for name in kept - {"best.pt"}:
        (result.folder / name).unlink()
    (result.folder / "last.pt").write_bytes(b"no checkpoint")
    with pytest.warns(UserWarning, match=r"last\.pt .*best\.pt is used instead"):
        assert load_checkpoint(result.folder)[1]["step"] == 6


def test_one_run_at_a_time_in_a_process(noise: Path, tmp_path: Path) -> None:
    errors: list[str] = []

    def measure(*_: object) -> dict[str, float]:
        with pytest.raises(RuntimeError, match="another run is open in this process") as error:
            start(tmp_path / "second", data=noise, **TINY)
        errors.append(str(error.value))
        return {"knn": 0.5}

    once = {"epochs": 1, "measure_every": 0}
    pretrain(
        data=noise, out=tmp_path / "first", progress=False, monitor=lambda *_: measure,
        **TINY | once,
    )  # fmt: skip
    assert len(errors) == 2  # Before the first epoch and after the last.
    assert not (tmp_path / "second").exists()
    start(tmp_path / "second", data=noise, **TINY | once)


def test_options_come_from_a_file_and_the_caller_overrules_them(
    noise: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("yaml", reason="accelerate brings it")
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {noise}\nimage-size: 16\nlr: 1e-3\nratio: [0.25, 0.75]\n")
    assert read_options_file(file) == {
        "data": str(noise), "image_size": 16, "lr": 0.001, "ratio": [0.25, 0.75],
    }  # fmt: skip
    again = start(tmp_path / "again", config=whole / "config.json", seed=0)
    assert equal(again.folder, whole)
    # A run's own, for other images and another method.
    old = read_config(whole) | {"measure_every": 0, "recipe": "cifar100"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    beside = {"data": "clothing64", "method": "simclr"}
    taken = read_options_file(tmp_path / "old.json", beside)
    config = make_config(**taken | beside)
    assert (config.recipe, config.measure_every, config.lr) == ("clothing64", 0, old["lr"])
    assert not {"stream", "channels", "mlp"} & taken.keys()
    file.write_text('data: "2e5"\nlr: "1e-3"\n')  # Text stays text where an option takes it.
    assert read_options_file(file) == {"data": "2e5", "lr": 0.001}
    file.write_text(f"data: {noise}\nlr: 1e-3\n")
    other = start(tmp_path / "other", config=file, **TINY | {"epochs": 1})
    assert (other.config.lr, other.config.epochs) == (0.001, 1)
    for text, message in (
        ("- 1\n", "expected names and values, got list"),
        ("a: [", "cannot be used .while parsing"),
        ("1: 2", "holds 1, which names no option"),
        ("colour: red", "'colour' is not an option; leave it out"),
        ("epochs: many", "--epochs must be a whole number, got 'many'"),
    ):
        file.write_text(text)
        with pytest.raises((ValueError, TypeError), match=message):
            start(tmp_path / "bad", config=file)
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be used"):
        start(tmp_path / "bad", config=tmp_path / "nowhere.json")


def test_images_are_held_out_for_accuracies(noise: Path, tmp_path: Path) -> None:
    from mixmask.evaluation import load_task
    from mixmask.evaluation.monitor import accuracy_monitor

    result = start(
        tmp_path / "run", data=str(noise), monitor=accuracy_monitor, holdout=0.25, **TINY
    )
    assert {"knn", "linear"} <= result.rows[-1].keys()
    task = load_task(result.folder)
    assert (len(task.train.images), len(task.test.images)) == (18, 6)
    with pytest.raises(ValueError, match=r"--holdout 0.1: the data has a test split already"):
        start(tmp_path / "bad", data="clothing64", holdout=0.1)


@pytest.mark.parametrize("method", ["moco-v2", "byol", "simclr"])
def test_a_backbone_starts_from_a_checkpoint_and_so_does_its_follower(
    method: str, whole: Path
) -> None:
    model = build_method(tiny_config(method, init=str(whole)))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, weights(whole)[f"backbone.{name}"]), name
    for name, follower in model.named_children():
        if name in ("key_backbone", "target_backbone"):
            assert_same(follower, model.backbone)
    with pytest.raises(ValueError, match="does not fit resnet18"):
        build_method(tiny_config(method, init=str(whole), arch="resnet18"))


def test_a_queue_beyond_the_data_is_warned_about_with_a_better_size(
    noise: Path, tmp_path: Path
) -> None:
    message = "--queue-size 64 is more than the 24 training images.*--queue-size 8 suits them"
    with pytest.warns(UserWarning, match=message):
        start(tmp_path / "run", data=str(noise), **TINY | {"queue_size": 64, "epochs": 1})
    # No queue suits a batch of more than all images, which is refused by itself.
    more: dict[str, Any] = {"queue_size": 32, "batch_size": 32}
    with pytest.raises(ValueError, match="--batch-size 32 is more than the 24 images"):
        start(tmp_path / "other", data=str(noise), **TINY | more)


def test_a_notebook_gets_a_typed_result_that_shows_itself_in_a_line(whole: Path) -> None:
    result = start(None, resume=whole)
    assert repr(result) == f"Pretrained(folder={whole!r})"
    assert result.backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 128)
    assert not result.backbone.training
    assert [row["epoch"] for row in result.rows] == [1, 2]
