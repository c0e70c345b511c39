"""Photographs, the folder of a run on them, and what `mixmask evaluate` leaves there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import cli
from mixmask.backbones import build_backbone

CLASSES = ("cat", "dog", "owl")


def write_photographs(folder: Path) -> Path:
    """Make a folder of training and validation images of three classes."""
    _write_split(folder / "train", (16, 14, 12), 0)
    _write_split(folder / "val", (6, 6, 4), 1)
    return folder


def _write_split(folder: Path, counts: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for channel, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(150, size=(20, 20, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{name}{i}.png")


def write_run(folder: Path, data: Path, arch: str, image_size: int, epoch: int = 3) -> Path:
    """Write the folder of a run of three epochs."""
    folder.mkdir(exist_ok=True)
    weights = {f"backbone.{key}": v for key, v in build_backbone(arch).state_dict().items()}
    rows = [{"epoch": number, "step": 2 * number} for number in range(epoch + 1)]
    content = {"model": weights, "optimizer": {}, "step": 2 * epoch, "rows": rows, "meter": {}}
    torch.save(content, folder / "last.pt")
    config = {"arch": arch, "small_stem": False, "data": str(data), "image_size": image_size}
    (folder / "config.json").write_text(json.dumps({**config, "epochs": 3}))
    return folder


def results(folder: Path, name: str, rest: str = "photographs_16px") -> dict[str, Any]:
    name = f"{name}_{rest}"
    with Image.open(folder / f"evaluate-{name}.png") as image:
        assert image.format == "PNG"
    assert not list(folder.glob("*tmp*"))
    read: dict[str, Any] = json.loads((folder / f"evaluate-{name}.json").read_text())
    return read


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["evaluate", *arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]
