"""Runs small enough for tests: options, photographs, interruption, what a step mixed."""

from __future__ import annotations

import copy
import csv
import dataclasses
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mixmask import MixedBatch
from mixmask.data.sets import Images, StoredImages, load_data
from mixmask.trainers.loop import train_method
from mixmask.trainers.methods import METHODS, build_method, make_config
from mixmask.trainers.mixtures import Mixture

# Each method takes those that it has.
TINY: dict[str, Any] = {
    "batch_size": 8,
    "image_size": 32,
    "dim": 16,
    "hidden": 24,
    "queue_size": 29,
    "prototypes": 12,
}


def on_disk(folder: Path) -> StoredImages:
    """Return a folder's images as a run streams them."""
    found = load_data(str(folder), 16, stream="always").train.images
    assert isinstance(found, StoredImages)
    return found


def tiny_config(method: str, **options: Any) -> Any:
    """Build a small configuration of any method; clothing64's presets fill the rest."""
    known = {field.name for field in dataclasses.fields(METHODS[method].config)}
    tiny = {name: value for name, value in TINY.items() if name in known}
    return make_config(method=method, **(tiny | options))


def build_tiny(method: str, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Build a method, always with the same weights, and two views of eight unlike images.

    Its running statistics are those of the views, so that in eval mode, too, embeddings differ.
    """
    torch.manual_seed(0)
    model = build_method(tiny_config(method, **options))
    x1, x2 = F.interpolate(torch.randn(16, 3, 4, 4), 32, mode="bicubic").chunk(2)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        list(twin.terms(x1, x2, torch.Generator()))
    model.load_state_dict(twin.state_dict())
    return model, x1, x2


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def _photographs() -> Tensor:
    images = load_data("clothing64", 32).train.images
    assert isinstance(images, Tensor)
    return images


def tiny_images(count: int) -> Tensor:
    """Return photographs, (count, 3, 64, 64) uint8."""
    images = _photographs()
    return images[:: len(images) // count][:count].clone()


def note_mixes(model: Any) -> list[MixedBatch]:
    """Let a method's mixtures leave what they drew in the list returned."""
    noted: list[MixedBatch] = []

    def noting(mixture: Mixture) -> Mixture:
        def draw(images: Tensor, generator: torch.Generator) -> MixedBatch:
            noted.append(mixture(images, generator))
            return noted[-1]

        return draw

    model.mixtures = [noting(mixture) for mixture in model.mixtures]
    return noted


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def run(config: Any, images: Images, out: Path, **options: Any) -> Any:
    return train_method(config, images, out, progress=False, **options)[0]


def interrupt_at(step: int, method: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGINT in the middle of a step, as a terminal does on Ctrl-C."""
    after_step, steps = method.after_step, [0]

    def interrupted(self: Any, done: float) -> None:
        steps[0] += 1
        if steps[0] == step:
            os.kill(os.getpid(), signal.SIGINT)
        after_step(self, done)

    monkeypatch.setattr(method, "after_step", interrupted)


def assert_same(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    theirs = reference.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
