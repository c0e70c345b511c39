"""Which images `mixmask evaluate` shows to a network: their size, normalisation, channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import refused, results, write_run

from mixmask import cli
from mixmask.backbones import build_backbone
from mixmask.data.sets import ImageData
from mixmask.data.views import MEAN, STD, normalize
from mixmask.evaluation import (
    FineTuning,
    LinearSGD,
    Protocol,
    evaluate,
    extract_features,
    load_task,
)
from mixmask.evaluation.monitor import accuracy_monitor


@pytest.mark.parametrize(("arch", "size", "stored"), [("test_vit", 160, 183), ("narrow", 14, 16)])
def test_networks_see_the_centre_at_the_size_of_the_run(
    arch: str, size: int, stored: int, photographs: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", photographs, arch, size)
    assert cli.main(["evaluate", "knn", str(run), "--device", "cpu"]) == 0
    found = results(run, "knn", f"photographs_{size}px")
    assert found["image_size"] == size
    task = load_task(run)
    edge = (stored - size) // 2
    for split, features in zip((task.train, task.test), task.features(), strict=True):
        assert isinstance(split.images, torch.Tensor)
        assert split.images.shape[2:] == (stored, stored)
        centre = normalize(split.images[:, :, edge : edge + size, edge : edge + size])
        torch.testing.assert_close(features, task.backbones[0](centre).detach())
    monitor = accuracy_monitor(ImageData(task.train, task.test, task.classes), size)
    assert monitor is not None
    assert monitor(task.backbones[0], False) == {"knn": pytest.approx(found["top1"])}


def test_images_are_normalised_as_the_checkpoint_says(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "knn", str(run), "--device", "cpu"]
    assert cli.main(words) == 0
    assert (results(run, "knn")["mean"], results(run, "knn")["std"]) == (list(MEAN), list(STD))

    # solo-learn's networks for small images saw those of CIFAR.
    state = build_backbone("resnet18", small_stem=True).state_dict()
    weights = {f"backbone.{key}": value for key, value in state.items()}
    weights["classifier.weight"] = torch.zeros(3, 512)
    torch.save({"state_dict": weights}, tmp_path / "solo.ckpt")
    task = load_task(tmp_path / "solo.ckpt", data=str(photographs), image_size=16)
    assert task.sources[0].mean == (0.4914, 0.4822, 0.4465)
    images = task.test.images[:2]
    mean, std = (torch.tensor(each)[:, None, None] for each in task.sources[0].normalization)
    expected = task.backbones[0]((images[:, :, 1:17, 1:17] / 255 - mean) / std)
    torch.testing.assert_close(task.extract(images), expected.detach())

    given = ["--mean", "0.5", "--std", "0.25", "0.5", "0.5"]
    assert "holds another evaluation" in refused([*words[1:], *given], capsys)
    assert cli.main([*words, *given, "--force"]) == 0
    found = results(run, "knn")
    assert (found["mean"], found["std"]) == ([0.5] * 3, [0.25, 0.5, 0.5])
    for more, message in (
        (given[:2], "belong together"),
        (["--mean", "0.5", "--std", "1", "1"], "--std takes a positive number for each of 3 ch"),
        (["--mean", "0.5", "--std", "0"], "--std takes a positive number"),
        (["--mean", "nan", "--std", "1"], "--mean takes a number for each of 3 channels"),
    ):
        assert message in refused([*words[1:], *more], capsys)


@pytest.mark.parametrize("protocol", [LinearSGD(epochs=1), FineTuning(epochs=1)])
def test_classifiers_are_trained_on_images_normalised_alike(
    protocol: Protocol, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    task = load_task(run, mean=[100.0], std=[1.0])
    forward = type(task.backbones[0]).forward

    def noting(self: Any, x: torch.Tensor) -> Any:
        seen.append(x.mean().item())
        return forward(self, x)

    monkeypatch.setattr(type(task.backbones[0]), "forward", noting)
    evaluate(task, protocol)
    assert len(seen) >= 2
    assert max(seen) < -98


def test_images_of_other_channels_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build_backbone("narrow", in_chans=4).state_dict()
    torch.save({f"backbone.{key}": value for key, value in state.items()}, tmp_path / "x.pth")
    words = ["knn", str(tmp_path / "x.pth"), "--data", "clothing64"]
    line = refused(words, capsys)
    assert "x.pth takes images of 4 channels, those of clothing64 have 3; name others" in line


@pytest.mark.parametrize("command", ["map", "neighbours", "embed"])
def test_other_commands_take_networks_of_fixed_size(
    command: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "vit", photographs, "test_vit", 160)
    out = tmp_path / ("x.npy" if command == "embed" else "x.png")
    words = [command, str(run), "--out", str(out)]
    assert cli.main([*words, "--image-size", "96"]) == 2
    assert "test_vit takes images of 160 px only" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert out.exists()


def test_each_of_several_runs_sees_images_at_its_own_size(
    photographs: Path, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / str(size), photographs, "narrow", size) for size in (14, 28)]
    task = load_task(*runs)
    assert [source.image_size for source in task.sources] == [14, 28]
    for number, run in enumerate(runs):
        images = task.test.images[:3]
        assert images.shape[2:] == (32, 32)
        alone = extract_features(task.backbones[number], images, size=(14, 28)[number])
        torch.testing.assert_close(task.extract(images, number), alone)
        assert load_task(run).extract(images).shape == alone.shape
    assert [source.image_size for source in load_task(*runs, image_size=20).sources] == [20, 20]
