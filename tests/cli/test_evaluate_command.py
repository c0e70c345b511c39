"""`mixmask evaluate` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import cli
from mixmask.backbones import build_backbone
from mixmask.evaluation import (
    KNN,
    FineTuning,
    Linear,
    LinearSGD,
    Protocol,
    evaluate,
    load_task,
)

CLASSES = ("cat", "dog", "owl")


def write_photographs(folder: Path, counts: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for channel, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(150, size=(20, 20, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{name}{i}.png")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    write_photographs(tmp_path / "photographs" / "train", (16, 14, 12), 0)
    write_photographs(tmp_path / "photographs" / "val", (6, 6, 4), 1)
    return tmp_path / "photographs"


@pytest.fixture
def run(tmp_path: Path, photographs: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    weights = {f"backbone.{key}": v for key, v in build_backbone("narrow").state_dict().items()}
    content = {"model": weights, "optimizer": {}, "step": 1, "rows": [], "meter": {}}
    torch.save(content, folder / "last.pt")
    config = {"arch": "narrow", "small_stem": False, "data": str(photographs), "image_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def results(folder: Path, name: str) -> dict[str, Any]:
    with Image.open(folder / f"evaluate-{name}.png") as image:
        assert image.format == "PNG"
    assert not list(folder.glob("*tmp*"))
    read: dict[str, Any] = json.loads((folder / f"evaluate-{name}.json").read_text())
    return read


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["evaluate", *arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_knn_leaves_results_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "knn", str(run), "--k", "100", "--temperature", "0.2"]) == 0
    found = results(run, "knn")
    assert (found["k"], found["temperature"]) == (42, 0.2)
    assert (found["n_train"], found["n_test"], found["image_size"]) == (42, 16, 16)
    assert np.sum(found["confusion"], axis=1).tolist() == [6, 6, 4]
    assert found["top1"] == pytest.approx(np.trace(found["confusion"]) / 16)
    assert "top5" not in found
    assert found["mean_class"] == pytest.approx(np.mean(list(found["per_class"].values())))
    assert set(found["versions"]) == {"python", "torch", "timm", "mixmask"}
    printed = capsys.readouterr().out
    assert f"top-1 {found['top1']:>16.1%}".split() == printed.splitlines()[1].split()[:2]
    assert len(printed.splitlines()) <= 6


def test_linear_of_a_checkpoint_file_into_another_folder(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "here"
    assert cli.main(["evaluate", "linear", str(run / "last.pt"), "--out", str(out)]) == 0
    assert results(out, "linear")["penalty"] > 0
    assert not list(run.glob("evaluate*"))


def test_linear_by_sgd(run: Path) -> None:
    options = ["--protocol", "sgd", "--epochs", "2", "--batch-size", "8", "--lr", "1"]
    assert cli.main(["evaluate", "linear", str(run), *options]) == 0
    found = results(run, "linear-sgd")
    assert (found["epochs"], found["batch_size"], found["lr"]) == (2, 8, 1.0)


def test_finetune_on_a_balanced_part(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--percent", "50", "--epochs", "2", "--seed", "5"]
    assert cli.main(["evaluate", "finetune", str(run), *options]) == 0
    found = results(run, "finetune-50")
    assert (found["n_train"], found["seed"], found["subset"]) == (21, 5, "50 %")
    assert found["batch_size"] == 16
    printed = capsys.readouterr().out
    assert "21 images (50 %, seed 5)" in printed
    assert f"{found['frozen_top1']:.1%}" in printed


def test_finetune_on_a_list(run: Path, tmp_path: Path) -> None:
    names = tmp_path / "part.txt"
    names.write_text("cat3.png\ndog/dog1.png\n\nowl0.png\nowl2.png\n")
    options = ["--subset-list", str(names), "--epochs", "1"]
    assert cli.main(["evaluate", "finetune", str(run), *options]) == 0
    assert results(run, "finetune-list")["n_train"] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["knn", "--k", "0"], "--k must be at least 1, got 0"),
        (["knn", "--temperature", "0"], "--temperature must be positive"),
        (["knn", "--threads", "0"], "--threads must be at least 1"),
        (["knn", "--image-size", "0"], "--image-size must be at least 1"),
        (["knn", "--device", "cuda:99"], "--device cuda:99 is not available"),
        (["knn", "--data", "nowhere"], "--data must be a folder or one of"),
        (["linear", "--epochs", "3"], "--epochs belongs to --protocol sgd"),
        (["linear", "--seed", "-1"], "--seed must be at least 0"),
        (["linear", "--protocol", "sgd", "--epochs", "0"], "--epochs must be at least 1"),
        (["finetune", "--percent", "0"], "--percent must be above 0"),
        (["finetune", "--percent", "95"], "are 13 of each class, but class owl has 12"),
        (["finetune", "--lr", "0"], "--lr must be positive"),
        (["finetune", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["finetune", "--percent", "9", "--subset-list", "x"], "exclude each other"),
        (["finetune", "--subset-list", "no.txt"], "no.txt"),
        (["finetune", "--data", "clothing64", "--subset-list", "x"], "needs a folder of images"),
    ],
)
def test_bad_options_leave_nothing(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([arguments[0], str(run), *arguments[1:]], capsys)
    assert not list(run.glob("evaluate*"))


def test_data_that_cannot_measure(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["knn", str(run), "--data", str(photographs / "train")], capsys)
    assert "has no test split; pass a folder with train and test" in line
    flat = tmp_path / "flat"
    for split in ("train", "test"):
        (flat / split).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (i, i, i)).save(flat / split / f"{i}.png")
    line = refused(["knn", str(run), "--data", str(flat)], capsys)
    assert "has no labels; pass a folder" in line


def test_places_that_cannot_be_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not found" in refused(["knn", str(run / "other.pt")], capsys)
    taken = str(run / "config.json")
    assert "which is a file" in refused(["knn", str(run), "--out", taken], capsys)


def test_a_checkpoint_that_does_not_record_its_data_needs_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = (run / "last.pt").rename(tmp_path / "alone.pt")
    assert "do not record their data; name the data" in refused(["knn", str(alone)], capsys)


def test_list_with_an_unknown_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part.txt").write_text("cow1.png\n")
    names = str(tmp_path / "part.txt")
    line = refused(["finetune", str(run), "--subset-list", names], capsys)
    assert "1 of 1 names of the subset list are not in the training split, first cow1.png" in line


CHANGES_WITH_THE_CLOCK = {"seconds", "date"}


@pytest.mark.parametrize(
    "protocol, words",
    [
        (KNN(k=5), ["knn", "--k", "5"]),
        (Linear(seed=2), ["linear", "--seed", "2"]),
        (
            LinearSGD(epochs=1, batch_size=8, lr=1.0),
            ["linear", "--protocol", "sgd", "--epochs", "1", "--batch-size", "8", "--lr", "1"],
        ),
        (FineTuning(percent=50, epochs=1), ["finetune", "--percent", "50", "--epochs", "1"]),
    ],
)
def test_python_measures_what_the_command_measures(
    protocol: Protocol, words: list[str], run: Path
) -> None:
    result = evaluate(load_task(run), protocol)
    assert cli.main(["evaluate", words[0], str(run), "--device", "cpu", *words[1:]]) == 0
    written = results(run, protocol.name)
    ours = json.loads(json.dumps(result.to_json()))
    assert ours.keys() == written.keys()
    for name in ours.keys() - CHANGES_WITH_THE_CLOCK:
        assert ours[name] == written[name], name


def test_every_option_of_a_protocol_is_in_its_results(run: Path) -> None:
    written = evaluate(load_task(run), FineTuning(percent=50, epochs=1, head_lr=0.1)).to_json()
    assert {name: written[name] for name in ("percent", "epochs", "batch_size", "head_lr")} == {
        "percent": 50, "epochs": 1, "batch_size": 16, "head_lr": 0.1,
    }  # fmt: skip
