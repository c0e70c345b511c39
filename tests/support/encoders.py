"""Encoders for tests of checkpoints: weights that no other test drew, photographs, runs."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.data.sets import load_data
from mixmask.data.views import normalize
from mixmask.trainers.loop import train_method
from mixmask.trainers.methods import make_config


@cache
def photographs() -> tuple[Tensor, Tensor]:
    """Return every 24th photograph of clothing64, (N, 3, 32, 32) uint8, and its label."""
    train = load_data("clothing64", 32).train
    assert train.labels is not None
    images = nn.functional.avg_pool2d(train.images[::24].float(), 2).byte()
    return images, train.labels[::24]


@torch.no_grad()
def used(model: Any) -> Any:
    """Let a model's norms see photographs, and move its weights from their symmetric start."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    model(normalize(photographs()[0][:6]))
    return model.eval()


def torchvision_resnet(
    arch: str = "resnet18", *, small_stem: bool = False, padding: int = 1
) -> Any:
    """Return a used ResNet of torchvision without its classifier, in evaluation mode."""
    return copy.deepcopy(_torchvision_resnet(arch, small_stem, padding))


@cache
def _torchvision_resnet(arch: str, small_stem: bool, padding: int) -> Any:
    model = torchvision.models.get_model(arch)
    model.fc = nn.Identity()
    if small_stem:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
        model.maxpool = nn.Identity()
    return used(model)


def timm_backbone(arch: str = "resnet18", *, small_stem: bool = False) -> nn.Module:
    """Return a used backbone of ours, in evaluation mode."""
    return copy.deepcopy(_timm_backbone(arch, small_stem))


@cache
def _timm_backbone(arch: str, small_stem: bool) -> nn.Module:
    backbone: nn.Module = used(build_backbone(arch, small_stem=small_stem))
    return backbone


@torch.no_grad()
def features(model: nn.Module, count: int = 3) -> Tensor:
    """Return a model's features (count, D) of photographs, in evaluation mode."""
    assert not model.training
    output: Tensor = model(normalize(photographs()[0][:count]))
    return output.flatten(1)


def assert_same_features(ours: nn.Module, original: nn.Module) -> None:
    """Hold two models to the same features, to the last bit, and to features that differ."""
    found = features(ours)
    assert found.std(dim=0).max() > 0
    assert torch.equal(found, features(original))


def pretrained(out: Path, **options: Any) -> Any:
    """Pretrain for two steps into a run folder, and return the backbone, to be evaluated."""
    tiny = {"epochs": 1, "batch_size": 8, "image_size": 32, "queue_size": 16, "dim": 16}
    config = make_config(**(tiny | options))
    model, _ = train_method(config, photographs()[0][:16], out, progress=False)
    assert (out / "config.json").exists()
    # Trained channels last; in another order the same sums round otherwise.
    return model.backbone.eval().to(memory_format=torch.contiguous_format)
