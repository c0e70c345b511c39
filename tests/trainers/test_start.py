"""A run's life: started, failed, killed, gone on with, longer, elsewhere, as a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_runs import assert_same, read_rows, tiny_config

from mixmask.runs.folder import FORMAT, load_checkpoint, read_config
from mixmask.trainers import Pretrained, pretrain
from mixmask.trainers.files import load_config, read_options_file
from mixmask.trainers.methods import build_method, make_config
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.run import Run

TINY: dict[str, Any] = {
    "arch": "narrow", "image_size": 16, "epochs": 2, "batch_size": 8, "queue_size": 16, "dim": 8,
    "measure_every": 0, "recipe": "imagenet",
}  # fmt: skip


def photographs(folder: Path, count: int = 24, *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for number in range(count):
        place = folder / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{seed}-{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


def start(out: Path | None, **options: Any) -> Pretrained:
    return pretrain(out=out, progress=False, device="cpu", **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "last.pt", weights_only=True)
    found: dict[str, torch.Tensor] = content["model"]
    return found


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that nobody disturbed."""
    return start(tmp_path_factory.mktemp("runs") / "whole", data=str(data), **TINY).folder


def test_a_run_says_in_full_what_it_was(whole: Path, data: Path) -> None:
    config = read_config(whole)
    assert (config["format"], config["processes"]) == (FORMAT, 1)
    assert config["data"] == str(data.resolve())
    assert config["fingerprint"]["train"] == 24
    assert config["fingerprint"]["classes"] == ["cat", "dog"]
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "curves.png", "last.pt", "metrics.csv", "previous.pt", "views.png",
    }  # fmt: skip


def test_what_a_monitor_measures_is_kept_as_numbers(data: Path, tmp_path: Path) -> None:
    def measure(*_: object) -> dict[str, Any]:
        return {"knn": np.float32(0.25)}

    options = TINY | {"epochs": 1, "data": str(data)}
    first = start(tmp_path / "run", monitor=lambda *_: measure, **options)
    with pytest.warns(UserWarning, match="2 epochs instead of 1"):
        again = start(None, resume=first.folder, epochs=2, monitor=lambda *_: measure)
    assert [row["knn"] for row in again.rows if "knn" in row] == [0.25] * 3
    with pytest.raises(TypeError, match=r"monitor must return numbers by their names, got .*many"):
        start(tmp_path / "text", monitor=lambda *_: lambda *_: {"knn": "many"}, **options)


def test_a_run_folder_inside_of_the_data_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    for out in (data / "run", None):
        with pytest.raises(ValueError, match=r"lies inside of the data, .*; choose an --out elsew"):
            start(out, data=".", **TINY)
    assert not (data / "run").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    out.mkdir()
    shutil.copy(whole / "config.json", out)
    (out / "last.pt.tmp").write_bytes(b"half")
    start(None, resume=out)
    assert equal(out, whole)


def test_a_start_killed_while_it_wrote_its_configuration_blocks_nothing(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json.tmp").write_text("{")
    start(tmp_path, data=str(data), **TINY)
    assert equal(tmp_path, whole)


@pytest.mark.filterwarnings("ignore:.*no supported trackers are currently installed")
def test_a_start_that_fails_leaves_no_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    fixed = TINY | {"arch": "vit_tiny_patch16_224", "image_size": 20}
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 cannot take images of 20 pixels"):
        start(out, data=str(data), **fixed)
    assert not out.exists()

    def no_key(*_: object, **__: object) -> None:
        raise RuntimeError("api_key not configured")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", no_key)
        patch.setattr("importlib.util.find_spec", lambda _: True)
        with pytest.raises(
            ValueError, match=r"--tracker tensorboard could not be started \(api_key"
        ):
            start(out, data=str(data), **TINY, tracker="tensorboard")
    assert not out.exists()

    encode = MoCo.encode
    with monkeypatch.context() as patch:
        patch.setattr(MoCo, "encode", lambda self, x: encode(self, x) * float("nan"))
        out.mkdir()  # An empty one, or what lay there before, stays.
        with pytest.raises(FloatingPointError, match=r"nan in epoch 1; lower --lr$"):
            start(out, data=str(data), **TINY)
    assert out.is_dir()
    assert not list(out.iterdir())


def test_messages_name_a_checkpoint_only_where_there_is_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, steps = MoCo.encode, [0]

    def late(self: MoCo, x: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        return encode(self, x) * (float("nan") if steps[0] > 6 else 1.0)

    monkeypatch.setattr(MoCo, "encode", late)
    message = r"epoch 2; .*last\.pt holds the last good step: lower --lr, or use --precision fp32$"
    with pytest.raises(FloatingPointError, match=message):
        start(tmp_path / "run", data=str(data), **TINY, precision="bf16")


def test_a_run_can_be_made_longer(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    shutil.copytree(whole, out)
    exact = "4 epochs instead of 2: weights, images, views and masks go on exactly"
    with pytest.warns(UserWarning, match=rf"{exact}.*\(learning rate 0.015 instead of 0\)"):
        start(None, resume=out, epochs=4)
    assert [row["epoch"] for row in read_rows(out)] == ["1", "2", "3", "4"]
    assert (load_config(out).epochs, load_config(whole).epochs) == (4, 2)
    with pytest.raises(ValueError, match=r"--epochs must be at least the 4 of .*, got 3"):
        start(None, resume=out, epochs=3)
    message = r"remove --lr, --mix \(only --epochs, --data, --out"
    with pytest.raises(ValueError, match=message):
        start(None, resume=out, lr=0.1, mix="none")


def test_a_copy_goes_on_exactly_and_its_original_stays(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, copy = tmp_path / "part", tmp_path / "copy"
    _break_after(4, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        start(part, data=str(data), **TINY, save_every=2)
    monkeypatch.undo()
    before = (part / "last.pt").read_bytes()
    assert torch.load(part / "last.pt", weights_only=True)["step"] == 4
    with pytest.warns(UserWarning, match="part stays as it is; .*copy goes on"):
        start(copy, resume=part)
    assert equal(copy, whole)
    assert (part / "last.pt").read_bytes() == before
    assert [row["epoch"] for row in read_rows(copy)] == ["1", "2"]
    start(None, resume=part)
    assert equal(part, whole)


def test_checkpoints_follow_the_clock(data: Path, whole: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    save = Run.save

    def noting(self: Run, **options: Any) -> None:
        save(self, **options)
        steps.append(self.step)

    for minutes, expected in ((1e-9, [1, 2, 3, 4, 5, 6]), (1e9, [3, 6])):
        steps.clear()
        out = tmp_path / str(minutes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "save", noting)
            start(out, data=str(data), **TINY, save_minutes=minutes)
        assert steps == expected
        assert equal(out, whole)
        assert load_config(out).save_minutes == minutes


def _break_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process' work in the middle of the next step, as a kill would."""
    terms, calls = MoCo.terms, [0]

    def broken(self: MoCo, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > steps:
            raise ZeroDivisionError
        return terms(self, *arguments, **options)

    monkeypatch.setattr(MoCo, "terms", broken)


def test_the_same_images_may_lie_elsewhere(whole: Path, data: Path, tmp_path: Path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(data, moved)
    shutil.copytree(whole, out)
    with pytest.warns(UserWarning, match=r"images are read from .*moved now: all else stays exact"):
        start(None, resume=out, data=str(moved))
    assert load_config(out).data == str(moved)
    other = photographs(tmp_path / "other", seed=1)
    fewer = photographs(tmp_path / "fewer", 12)
    for place, reason in (
        (other, "as many, but of other names"),
        (fewer, "12 training images ins"),
    ):
        with pytest.raises(ValueError, match=f"does not hold the images that .*run was.*{reason}"):
            start(None, resume=out, data=str(place))
    assert load_config(out).data == str(moved)


def test_a_run_whose_images_changed_is_told_by_every_command(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    from mixmask.evaluation import load_task

    changed, out = tmp_path / "changed", tmp_path / "run"
    shutil.copytree(data, changed)
    shutil.copytree(whole, out)
    text = (out / "config.json").read_text().replace(str(data.resolve()), str(changed))
    (out / "config.json").write_text(text)
    load_task(out, labelled=False)
    next(changed.rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="23 training images instead of 24; pass their location"):
        load_task(out, labelled=False)


def test_checkpoints_of_epochs_are_kept_and_the_best(data: Path, tmp_path: Path) -> None:
    accuracies = iter([0.1, 0.2, 0.9, 0.5, 0.4])
    options = TINY | {"epochs": 4, "measure_every": 1}
    result = pretrain(
        data=str(data),
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


def test_one_run_at_a_time_in_a_process(data: Path, tmp_path: Path) -> None:
    errors: list[str] = []

    def measure(*_: object) -> dict[str, float]:
        with pytest.raises(RuntimeError, match="another run is open in this process") as error:
            start(tmp_path / "second", data=data, **TINY)
        errors.append(str(error.value))
        return {"knn": 0.5}

    once = {"epochs": 1, "measure_every": 0}
    pretrain(
        data=data, out=tmp_path / "first", progress=False, monitor=lambda *_: measure,
        **TINY | once,
    )  # fmt: skip
    assert len(errors) == 2  # Before the first epoch and after the last.
    assert not (tmp_path / "second").exists()
    start(tmp_path / "second", data=data, **TINY | once)


def test_another_number_of_processes_takes_the_same_images_per_step(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    config = json.loads((out / "config.json").read_text())
    two = config | {"processes": 2, "batch_size": 4, "epochs": 3}
    (out / "config.json").write_text(json.dumps(two))
    with pytest.warns(UserWarning, match="1 process instead of 2: each step takes the same images"):
        result = start(None, resume=out)
    assert (result.config.batch_size, result.config.accumulate) == (8, 2)
    assert [row["step"] for row in result.rows] == [3, 6, 9]
    assert read_config(out)["processes"] == 1


def test_options_come_from_a_file_and_the_caller_overrules_them(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("yaml", reason="accelerate brings it")
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {data}\nimage-size: 16\nlr: 1e-3\nratio: [0.25, 0.75]\n")
    assert read_options_file(file) == {
        "data": str(data), "image_size": 16, "lr": 0.001, "ratio": [0.25, 0.75],
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
    file.write_text(f"data: {data}\nlr: 1e-3\n")
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


def test_images_are_held_out_for_accuracies(data: Path, tmp_path: Path) -> None:
    from mixmask.evaluation import load_task
    from mixmask.evaluation.monitor import accuracy_monitor

    result = start(tmp_path / "run", data=str(data), monitor=accuracy_monitor, holdout=0.25, **TINY)
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


def test_a_run_that_started_from_a_checkpoint_goes_on_without_it(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    origin, out = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(whole, origin)
    started = start(out, data=str(data), init=str(origin), **TINY | {"epochs": 1})
    assert started.config.init == str(origin)
    shutil.rmtree(origin)
    with pytest.warns(UserWarning, match="2 epochs instead of 1"):
        start(None, resume=out, epochs=2)
    assert load_config(out).init == str(origin)


def test_a_queue_beyond_the_data_is_warned_about_with_a_better_size(
    data: Path, tmp_path: Path
) -> None:
    message = "--queue-size 64 is more than the 24 training images.*--queue-size 8 suits them"
    with pytest.warns(UserWarning, match=message):
        start(tmp_path / "run", data=str(data), **TINY | {"queue_size": 64, "epochs": 1})
    # No queue suits a batch of more than all images, which is refused by itself.
    more: dict[str, Any] = {"queue_size": 32, "batch_size": 32}
    with pytest.raises(ValueError, match="--batch-size 32 is more than the 24 images"):
        start(tmp_path / "other", data=str(data), **TINY | more)


def test_a_notebook_gets_a_typed_result_that_shows_itself_in_a_line(whole: Path) -> None:
    result = start(None, resume=whole)
    assert repr(result) == f"Pretrained(folder={whole!r})"
    assert result.backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 128)
    assert not result.backbone.training
    assert [row["epoch"] for row in result.rows] == [1, 2]
