"""Small runs started from Python, and what they left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mixmask.trainers import Pretrained, pretrain

TINY: dict[str, Any] = {
    "arch": "narrow", "image_size": 16, "epochs": 2, "batch_size": 8, "queue_size": 16, "dim": 8,
    "grid_size": 2, "measure_every": 0, "recipe": "imagenet",
}  # fmt: skip


def start(out: Path | None, **options: Any) -> Pretrained:
    return pretrain(out=out, progress=False, device="cpu", **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "last.pt", weights_only=True)
    found: dict[str, torch.Tensor] = content["model"]
    return found


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def write_noise(folder: Path, count: int = 24, *, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for number in range(count):
        place = folder / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{seed}-{number}.png")
    return folder
