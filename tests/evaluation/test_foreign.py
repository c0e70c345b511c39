"""Checkpoints as lightly's, solo-learn's and MoCo's users have them, against their own models."""

from __future__ import annotations

import argparse
import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install 'mixmask[lightly]' for these tests"
)

import pytorch_lightning as pl
from encoders import features, photographs, torchvision_resnet, used
from lightly.models import ResNetGenerator
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy
from mixmask.evaluation.checkpoints import Loaded, load_backbone
from mixmask.views import normalize

pytestmark = [
    # A step in a process of its own needs neither workers nor logs.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Loop(pl.LightningModule):  # type: ignore[misc]
    """What is common to the loops below: a loss that moves whatever is trained."""

    backbone: nn.Module

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        del batch_idx
        loss: Tensor = self.head_of(self.backbone(batch).flatten(1)).square().mean()
        return loss

    def head_of(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection_head(x)
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


class LightlyMoCo(Loop):
    """MoCo as in lightly's examples: the children of a ResNet in a row, and slow copies."""

    def __init__(self, backbone: nn.Module, **hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(512, 512, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)


class SoloLayout(Loop):
    """solo-learn's MoCo v2+ by its names: modules, buffers, and groups of the optimiser."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(512, 10)
        self.projector = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 16))
        self.momentum_backbone = copy.deepcopy(self.backbone)
        self.momentum_projector = copy.deepcopy(self.projector)
        self.register_buffer("queue", torch.randn(2, 16, 32))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def head_of(self, x: Tensor) -> Tensor:
        return torch.cat([self.projector(x), self.classifier(x.detach())], dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        names = ("backbone", "classifier", "projector")
        return torch.optim.SGD(
            [{"name": name, "params": getattr(self, name).parameters()} for name in names], lr=0.01
        )


def fit(loop: Loop, path: Path, steps: int = 1) -> None:
    """Train for a step and save as Lightning does, all that a resumed run needs."""
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path.parent,
    )  # fmt: skip
    loop.train()
    trainer.fit(loop, DataLoader(list(normalize(photographs()[0][:8])), batch_size=8))  # type: ignore[arg-type]
    trainer.save_checkpoint(path)
    loop.eval()


def children(model: nn.Module) -> nn.Sequential:
    return nn.Sequential(*list(model.children())[:-1])


def assert_reads(path: Path, original: nn.Module, **options: Any) -> Loaded:
    loaded = load_backbone(path, **options)
    ours = features(loaded.backbone)
    assert ours.std(dim=0).max() > 0
    assert torch.equal(ours, features(original))
    return loaded


@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("form", ["children", "names"])
def test_lightly_checkpoints_give_the_features_of_their_model(
    form: str, small_stem: bool, tmp_path: Path
) -> None:
    model = torchvision_resnet(small_stem=small_stem)
    loop = LightlyMoCo(children(model) if form == "children" else model, lr=0.1, name="moco")
    fit(loop, tmp_path / "last.ckpt")
    loaded = assert_reads(tmp_path / "last.ckpt", loop.backbone)
    assert (loaded.layout, loaded.arch, loaded.small_stem) == ("lightning", "resnet18", small_stem)
    assert len(loaded.taken) == 120
    assert {key.split(".")[0] for key in loaded.left} == {
        "projection_head", "backbone_momentum", "projection_head_momentum",
    }  # fmt: skip


@pytest.mark.parametrize("splits", [0, 2])
def test_lightlys_own_resnet_has_no_activation_behind_its_first_norm(
    splits: int, tmp_path: Path
) -> None:
    resnet = ResNetGenerator("resnet-18", num_splits=splits)
    backbone = used(nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1)))
    loop = LightlyMoCo(backbone)
    fit(loop, tmp_path / "last.ckpt")
    loaded = assert_reads(tmp_path / "last.ckpt", loop.backbone)
    assert (loaded.arch, loaded.small_stem) == ("resnet18", True)
    whole = used(ResNetGenerator("resnet-18"))
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    whole.linear = nn.Identity()
    loaded = load_backbone(tmp_path / "whole.pt")
    torch.testing.assert_close(features(loaded.backbone), features(whole))


@pytest.mark.parametrize("padding", [None, 2])
def test_solo_learns_layout_gives_the_features_of_its_model(
    padding: int | None, tmp_path: Path
) -> None:
    """Its stem for CIFAR pads by 2, which no key tells."""
    model = torchvision_resnet(small_stem=padding is not None, padding=padding or 3)
    loop = SoloLayout(model)
    fit(loop, tmp_path / "solo.ckpt")
    loaded = assert_reads(tmp_path / "solo.ckpt", loop.backbone)
    assert (loaded.layout, loaded.small_stem) == ("solo-learn", padding is not None)
    assert {key.split(".")[0] for key in loaded.left} == {
        "classifier", "projector", "momentum_backbone", "momentum_projector", "queue", "queue_ptr",
    }  # fmt: skip


@pytest.mark.parametrize(
    "hparams",
    [
        {"options": argparse.Namespace(lr=0.1, root=Path("data"))},
        {"options": OmegaConf.create({"lr": 0.1, "sizes": [1, 2], "name": "moco", "x": None})},
    ],
    ids=["namespace", "omegaconf"],
)
def test_hyperparameters_need_not_be_understood(hparams: Any, tmp_path: Path) -> None:
    loop = LightlyMoCo(torchvision_resnet(), **hparams)
    fit(loop, tmp_path / "last.ckpt")
    assert_reads(tmp_path / "last.ckpt", loop.backbone)
