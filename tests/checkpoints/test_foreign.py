"""Checkpoints as lightly's, solo-learn's and MoCo's users have them, against their own models."""

from __future__ import annotations

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install '.[lightly]' for these tests"
)

import pytorch_lightning as pl
from encoders import (
    assert_same_features,
    features,
    photographs,
    pretrained,
    torchvision_resnet,
    used,
)
from lightly.models import ResNetGenerator
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from mixmask.checkpoints.load import Loaded, load_backbone
from mixmask.data.views import normalize
from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy

pytestmark = [
    # A step in a process of its own needs neither workers nor logs.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Loop(pl.LightningModule):
    """What is common to the loops below: a loss that moves whatever is trained."""

    backbone: nn.Module
    projection_head: nn.Module

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


def fit(loop: Loop, path: Path) -> None:
    """Train for a step and save as Lightning does, all that a resumed run needs."""
    trainer = build_trainer(path)
    loop.train()
    trainer.fit(loop, DataLoader(list(normalize(photographs()[0][:4])), batch_size=4))  # type: ignore[arg-type]
    trainer.save_checkpoint(path)
    loop.eval()


def save(loop: Loop, path: Path) -> None:
    """Save an untrained loop as Lightning does."""
    trainer = build_trainer(path)
    trainer.strategy.connect(loop)
    trainer.save_checkpoint(path)
    loop.eval()


def build_trainer(path: Path) -> Any:
    return pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path.parent,
    )  # fmt: skip


def children(model: nn.Module) -> nn.Sequential:
    return nn.Sequential(*list(model.children())[:-1])


def assert_reads(path: Path, original: nn.Module, **options: Any) -> Loaded:
    loaded = load_backbone(path, **options)
    assert_same_features(loaded.backbone, original)
    return loaded


@pytest.mark.parametrize("form, small_stem", [("children", True), ("names", False)])
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


def test_lightlys_own_resnet_has_no_activation_behind_its_first_norm(tmp_path: Path) -> None:
    """In a row, that is: its children have none there. Norms that split keep theirs by parts."""
    resnet = ResNetGenerator("resnet-18", num_splits=2)
    backbone = used(nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1)))
    loop = LightlyMoCo(backbone)
    fit(loop, tmp_path / "last.ckpt")
    loaded = assert_reads(tmp_path / "last.ckpt", loop.backbone)
    assert (loaded.arch, loaded.small_stem) == ("resnet18", True)


def test_lightlys_own_resnet_by_its_names(tmp_path: Path) -> None:
    whole = used(ResNetGenerator("resnet-18"))
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    whole.linear = nn.Identity()
    loaded = load_backbone(tmp_path / "whole.pt")
    torch.testing.assert_close(features(loaded.backbone), features(whole))  # It pools 4x4 pixels.
    assert loaded.left == ("linear.weight", "linear.bias")


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
        OmegaConf.create({"lr": 0.1, "deep": {"sizes": [1, "two", True], "x": "${lr}"}}),
    ],
    ids=["namespace", "omegaconf", "omegaconf alone"],
)
def test_hyperparameters_need_not_be_understood(hparams: Any, tmp_path: Path) -> None:
    loop = SoloLayout(torchvision_resnet())
    loop.save_hyperparameters(hparams)
    save(loop, tmp_path / "last.ckpt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "last.ckpt")
    assert_reads(tmp_path / "last.ckpt", loop.backbone)


def test_accuracies_are_the_same_whoever_wrote_the_checkpoint(tmp_path: Path) -> None:
    pretrained(tmp_path / "run", arch="resnet18")
    state = load_backbone(tmp_path / "run").backbone.state_dict()
    models = [torchvision_resnet() for _ in range(2)]
    for model in models:
        model.load_state_dict(state)
    save(LightlyMoCo(children(models[0])), tmp_path / "lightly.ckpt")
    save(SoloLayout(models[1]), tmp_path / "solo.ckpt")
    measured = [accuracies(tmp_path / name) for name in ("run", "lightly.ckpt", "solo.ckpt")]
    assert [layout for layout, *_ in measured] == ["mixmask", "lightning", "solo-learn"]
    assert len({tuple(values) for _, *values in measured}) == 1
    knn, linear = measured[0][1:]
    assert 0 < knn < 1
    assert 0 < linear < 1


def accuracies(path: Path) -> tuple[str, float, float]:
    loaded, (images, labels) = load_backbone(path), photographs()
    x = extract_features(loaded.backbone, images)
    split = x[::2], labels[::2], x[1::2], labels[1::2]
    return loaded.layout, knn_accuracy(*split), linear_accuracy(*split, penalties=(0.01,))


# The real solo-learn.


@pytest.mark.skipif(
    find_spec("solo") is None,
    reason="solo-learn is not installed: it comes from its repository on GitHub",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dataset", ["cifar10", "custom"])
@pytest.mark.parametrize("method", ["mocov2plus", "simclr", "byol", "swav"])
def test_solo_learns_own_checkpoints(method: str, dataset: str, tmp_path: Path) -> None:
    import lightning.pytorch as theirs
    from solo.methods import METHODS

    cfg = OmegaConf.create(
        {
            "name": "run",
            "method": method,
            "backbone": {"name": "resnet18"},
            "method_kwargs": {
                "proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16,
                "temperature": 0.2, "queue_size": 32, "num_prototypes": 12,
                "epoch_queue_starts": 1,
            },
            "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": True},
            "data": {
                "dataset": dataset, "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0,
            },
            "optimizer": {
                "name": "sgd", "batch_size": 4, "lr": 0.01, "classifier_lr": 0.1,
                "weight_decay": 0.0,
            },
            "scheduler": {"name": "none"},
            "knn_eval": {"enabled": False, "k": 2},
            "max_epochs": 1,
        }
    )  # fmt: skip
    OmegaConf.set_struct(cfg, False)
    model = METHODS[method](cfg)
    images = normalize(photographs()[0][:4])
    rows: Any = [(i, [x, x.flip(-1)], i) for i, x in enumerate(images)]
    batches: DataLoader[Any] = DataLoader(rows, batch_size=4)
    trainer = theirs.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, batches)
    trainer.save_checkpoint(tmp_path / "solo.ckpt")
    loaded = assert_reads(tmp_path / "solo.ckpt", model.eval().backbone)
    assert (loaded.layout, loaded.small_stem) == ("solo-learn", dataset == "cifar10")
