"""`mixmask detect` as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detection import write_coco, write_voc
from torch import nn

from mixmask import cli
from mixmask.checkpoints.export import export_backbone
from mixmask.checkpoints.load import load_backbone
from mixmask.data.views import MEAN, STD
from mixmask.detection import train
from mixmask.detection.config import DetectionConfig
from mixmask.detection.model import build_detector

TINY = ["--size", "64", "--epochs", "1", "--batch-size", "4", "--rois", "8", "--proposals", "20"]
FILES = {"config.json", "detections.png", "last.pt", "results.json"}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()  # What runs before have said.
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `pretrain`, of one step."""
    folder = tmp_path_factory.mktemp("pretrained")
    for i in range(8):
        pixels = np.random.default_rng(i).integers(256, size=(24, 24, 3), dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    words = ["--arch", "narrow", "--epochs", "1", "--batch-size", "8", "--image-size", "16"]
    words += ["--queue-size", "16", "--data", str(folder / "images"), "--out", str(folder / "run")]
    assert cli.main(["pretrain", *words]) == 0
    return folder / "run"


def test_detect_on_a_run_and_on_its_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_voc(tmp_path / "data")
    for number, given in enumerate((run, run / "last.pt")):
        out = tmp_path / f"out{number}"
        words = ["detect", str(given), "--data", str(data), *TINY, "--out", str(out)]
        assert cli.main(words) == 0
        assert {path.name for path in out.iterdir()} == FILES
        results = json.loads((out / "results.json").read_text())
        assert results["backbone"]["layout"] == "mixmask"
        assert results["backbone"]["pretraining"]["method"] == "moco-v2"
        assert results["config"]["arch"] == "narrow"
        assert {"torch", "torchmetrics", "pycocotools"} < set(results["versions"])
    printed = capsys.readouterr().out
    for word in ("5 images to train (trainval)", "2 to test (test)", "AP50", "blue", "red"):
        assert word in printed
    with Image.open(out / "detections.png") as image:
        assert image.width > 800


def test_random_mask_rcnn_with_a_default_folder_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_coco(tmp_path / "data", train=2, test=1)
    words = ["detect", "random", "--arch", "narrow", "--data", str(data), *TINY]
    words += ["--model", "mask-rcnn", "--neck", "fpn"]
    for _ in range(2):
        assert cli.main(words) == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["detect-data-random", "detect-data-random-2"]
    first, second = (tmp_path / "runs" / name for name in folders)
    texts = [(folder / "results.json").read_text() for folder in (first, second)]
    rows = [json.loads(text)["epochs"][0] for text in texts]
    assert rows[0]["loss"] == rows[1]["loss"]  # The seed decides all, the backbone included.
    assert "masks  " in capsys.readouterr().out
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**config, "epochs": 2}))
    assert cli.main(["detect", "--resume", str(second)]) == 0
    results = json.loads((second / "results.json").read_text())
    assert [row["epoch"] for row in results["epochs"]] == [1, 2]
    assert results["backbone"]["run"] == "random"
    assert "done in 0." in capsys.readouterr().out
    assert cli.main(["detect", "--resume", str(second)]) == 0
    done = "nothing was left to do; to train longer, start another run with --epochs above 2; see"
    assert done in capsys.readouterr().out
    line = refused(["detect", "--resume", str(second), "--lr", "1"], capsys)
    assert "--resume uses the run's own options; remove --lr" in line
    assert "uses the run's own options; remove RUN" in refused(
        ["detect", "random", "--resume", str(second)], capsys
    )
    line = refused([*words, "--out", str(second)], capsys)
    assert "exists and is not empty; continue it with --resume" in line


def test_an_epoch_has_a_line_of_its_own_beside_the_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # As in a terminal.
    data = write_voc(tmp_path / "data")
    words = ["detect", "random", "--arch", "narrow", "--data", str(data), *TINY]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"[\r\n]epoch 1: loss", capsys.readouterr().out)


def test_images_are_normalised_as_the_checkpoint_says_or_as_given(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector's own normalisation is what the configuration keeps, and a resumed run's."""
    seen: list[tuple[list[float], list[float]]] = []

    def spy(backbone: nn.Module, classes: int, config: DetectionConfig) -> nn.Module:
        detector: Any = build_detector(backbone, classes, config)
        seen.append((detector.transform.image_mean, detector.transform.image_std))
        return detector  # type: ignore[no-any-return]

    monkeypatch.setattr("mixmask.detection.train.build_detector", spy)
    monkeypatch.chdir(write_voc(tmp_path / "data").parent)
    file = tmp_path / "noted.safetensors"
    noted = load_backbone(run, mean=[0.25, 0.5, 0.75], std=[0.5, 0.25, 0.125])
    export_backbone(noted, "safetensors", file)
    given = ["--mean", "0.5", "--std", "0.25", "0.5", "1"]
    cases: list[tuple[list[str], list[float], list[float]]] = [
        ([str(run)], list(MEAN), list(STD)),
        ([str(file)], [0.25, 0.5, 0.75], [0.5, 0.25, 0.125]),
        ([str(file), *given], [0.5, 0.5, 0.5], [0.25, 0.5, 1.0]),
        (["random", "--arch", "narrow", *given], [0.5, 0.5, 0.5], [0.25, 0.5, 1.0]),
    ]
    for number, (words, mean, std) in enumerate(cases):
        out = tmp_path / f"out{number}"
        assert cli.main(["detect", *words, "--data", "data", *TINY, "--out", str(out)]) == 0
        config = json.loads((out / "config.json").read_text())
        assert (config["mean"], config["std"]) == (mean, std) == seen.pop()
    monkeypatch.chdir("/")  # The data were named by a relative path.
    (out / "config.json").write_text(json.dumps({**config, "epochs": 2}))
    assert cli.main(["detect", "--resume", str(out)]) == 0
    assert seen.pop() == (mean, std)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, whole, killed = write_voc(tmp_path / "data"), tmp_path / "whole", tmp_path / "killed"
    monkeypatch.chdir(run.parent)
    for out in (whole, killed):
        assert cli.main(["detect", run.name, "--data", str(data), *TINY, "--out", str(out)]) == 0
    for path in killed.iterdir():
        if path.name != "config.json":
            path.unlink()
    monkeypatch.chdir(tmp_path)
    (killed / "last.pt.tmp").write_bytes(b"half")
    assert cli.main(["detect", "--resume", str(killed)]) == 0
    first, second = (torch.load(out / "last.pt", weights_only=True) for out in (whole, killed))
    assert all(
        torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items()
    )
    assert second["source"]["run"] == str(run)

    # Killed between the two renames of its last save, with nothing left to train.
    (killed / "last.pt").rename(killed / "last.pt.tmp")
    (killed / "results.json").unlink()
    assert cli.main(["detect", "--resume", str(killed)]) == 0
    assert (killed / "last.pt").exists()
    assert json.loads((killed / "results.json").read_text())["epochs"]

    config = json.loads((killed / "config.json").read_text())
    (killed / "last.pt").unlink()
    (killed / "config.json").write_text(
        json.dumps({n: v for n, v in config.items() if n != "source"})
    )
    line = refused(["detect", "--resume", str(killed)], capsys)
    assert "does not say which backbone it started from; start it again with RUN" in line
    (killed / "config.json").write_text(json.dumps(config | {"source": 3}))
    assert "'source' must be of type str" in refused(["detect", "--resume", str(killed)], capsys)


def test_a_start_that_fails_leaves_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_voc(tmp_path / "data"), tmp_path / "out"
    monkeypatch.setattr(
        "mixmask.detection.train._train_step", lambda *_: {"loss_classifier": float("nan")}
    )
    words = ["detect", str(run), "--data", str(data), *TINY, "--out", str(out)]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.endswith("the loss became nan in epoch 1; lower --lr\n")
    assert not out.exists()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_workers_outlive_a_signal_to_all_and_their_death_is_told(
    name: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A terminal or a batch system sends a signal to the workers, too, which may get it first."""
    data, out, step = write_voc(tmp_path / "data"), tmp_path / "out", train._train_step

    def sending(*arguments: Any) -> dict[str, float]:
        if (out / "last.pt").exists():  # In the second epoch.
            for worker in active_children():
                assert worker.pid is not None
                os.kill(worker.pid, getattr(signal, name))
            time.sleep(1)  # Python may run torch's handler here.
            if name == "SIGTERM":
                signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(train, "_train_step", sending)
    words = ["detect", str(run), "--data", str(data), *TINY, "--epochs", "2", "--workers", "1"]
    code = cli.main([*words, "--batch-size", "2", "--measure-every", "0", "--out", str(out)])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    told = {
        "SIGKILL": (2, "mixmask: a process that decodes images died (DataLoader worker (pid"),
        "SIGTERM": (130, "mixmask: interrupted; continue"),
    }
    assert (code, line[: len(told[name][1])]) == told[name]
    assert line.endswith(f"continue with mixmask detect --resume {out}")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "detect needs RUN, or the word random, and --data"),
        (["random", "--arch", "narrow"], "detect needs RUN, or the word random, and --data"),
        (["random", "--data", "DATA"], "a random backbone needs --arch"),
        (["random", "--data", "DATA", "--arch", "resnet81"], "--arch resnet81 is not a timm"),
        (["random", "--data", "DATA", "--neck", "c5"], "argument --neck: invalid choice: 'c5'"),
        (["random", "--data", "nowhere", "--arch", "narrow"], "--data must be a folder or a zip"),
        (["random", "--data", "DATA", "--arch", "narrow", "--threads", "0"], "--threads must be"),
        (["random", "--data", "DATA", "--arch", "narrow", "--model", "mask-rcnn"],
         "--model mask-rcnn needs a segmentation of every object"),
        (["random", "--data", "DATA", "--arch", "narrow", "--mean", "0.5"],
         "--mean and --std belong together"),
        (["random", "--data", "DATA", "--arch", "narrow", "--mean", "1", "--std", "1", "2"],
         "--std takes a positive number for each of 3 channels, or one for all, got 1.0 2.0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_voc(tmp_path / "data"), tmp_path / "out"
    words = [str(data) if word == "DATA" else word for word in words]
    assert message in refused(["detect", *words, "--out", str(out)], capsys)
    assert not out.exists()


def test_missing_libraries_are_named_and_nothing_else_needs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert refused(["detect", "random", "--data", str(tmp_path)], capsys).endswith(
        "detection needs pycocotools, torchmetrics; run pip install '.[detection]' in the checkout "
        "of mixmask"
    )
    assert cli.main(["pretrain", "--help"]) == 0
    assert cli.main(["detect", "--help"]) == 0
    assert "--batch-norm" in capsys.readouterr().out
