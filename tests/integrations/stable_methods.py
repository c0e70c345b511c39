"""stable-pretraining's methods, built small for the tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

spt = pytest.importorskip(
    "stable_pretraining",
    reason="stable-pretraining is not installed; pip install '.[stable-pretraining]' for these",
)
forward = pytest.importorskip("stable_pretraining.forward")


N = 6


def build_tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _head(*widths: int) -> nn.Module:
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*layers, nn.BatchNorm1d(widths[-1]))


def _teacher(part: nn.Module) -> Any:
    return spt.TeacherStudentWrapper(part, base_ema_coefficient=0.9, final_ema_coefficient=0.9)


def build_module(function: Callable[..., Any], **parts: Any) -> Any:
    return spt.Module(forward=function, backbone=build_tiny(), projector=_head(8, 8, 4), **parts)


METHODS: dict[str, Callable[[], Any]] = {
    "SimCLR": lambda: spt.SimCLR(build_tiny(), (8, 8, 4), temperature=0.3),
    "BYOL": lambda: spt.BYOL(build_tiny(), (8, 4), (8, 4), ema_decay_start=0.9),
    "SimSiam": lambda: spt.methods.SimSiam(build_tiny(), 8, 4),
    "MoCov2": lambda: spt.methods.MoCov2(build_tiny(), (8, 4), queue_length=15, temperature=0.3),
    "MoCov2, no queue": lambda: spt.methods.MoCov2(build_tiny(), (8, 4), queue_length=0),
    "MoCov2, no teacher": lambda: spt.methods.MoCov2(
        build_tiny(), (8, 4), queue_length=15, ema_decay_start=0.0, ema_decay_end=0.0
    ),
    "BarlowTwins": lambda: spt.BarlowTwins(build_tiny(), (8, 8, 4)),
    "VICReg": lambda: spt.VICReg(build_tiny(), (8, 8, 4), 10.0, 5.0, 2.0),
    "forward.simclr": lambda: build_module(
        forward.simclr, simclr_loss=spt.losses.NTXEntLoss(temperature=0.3)
    ),
    "forward.barlow_twins": lambda: build_module(
        forward.barlow_twins, barlow_loss=spt.losses.BarlowTwinsLoss()
    ),
    "forward.vicreg": lambda: build_module(
        forward.vicreg, vicreg_loss=spt.losses.VICRegLoss(10.0, 5.0, 2.0)
    ),
    "forward.byol": lambda: spt.Module(
        forward=forward.byol,
        backbone=_teacher(build_tiny()),
        projector=_teacher(_head(8, 4)),
        predictor=_head(4, 4),
        byol_loss=spt.losses.BYOLLoss(),
    ),
    "both at once": lambda: build_module(
        embed_both_at_once, simclr_loss=spt.losses.NTXEntLoss(temperature=0.3)
    ),
    "own class": lambda: Own(build_tiny(), (8, 8, 4), temperature=0.3),
}


def embed_both_at_once(self: Any, batch: Any, stage: str) -> dict[str, Tensor]:
    """A forward of a user's own, that passes both views at once."""
    del stage
    if "image" in batch:
        return {"embedding": self.backbone(batch["image"])}
    embedding = self.backbone(torch.cat([view["image"] for view in batch["views"]]))
    loss = self.simclr_loss(*self.projector(embedding).chunk(2))
    return {"loss": loss, "embedding": embedding}


class Own(spt.SimCLR):  # type: ignore[misc, name-defined]
    """As their benchmarks do it: a Lightning forward around that of the method."""

    def forward(self, batch: Any, stage: str) -> dict[str, Tensor]:
        del stage
        if "image" in batch:
            return {**batch, "embedding": super().forward(batch["image"]).embedding}
        out = super().forward(*(view["image"] for view in batch["views"]))
        labels = torch.cat([view["label"] for view in batch["views"]])
        return {"loss": out.loss, "embedding": out.embedding.detach(), "label": labels}


def build(name: str) -> Any:
    torch.manual_seed(0)
    module = METHODS[name]()
    module.log = module.log_dict = lambda *_, **__: None
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if ".teacher." in key and "no teacher" not in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return module.double().train()


def draw_views(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.rand(N, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]


def takes_batches(name: str) -> bool:
    return name[0] in "fbo"


def run_step(name: str, module: Any, views: list[Tensor]) -> Any:
    if not takes_batches(name):
        return module(*views)
    labels = torch.arange(N)
    return module({"views": [{"image": x, "label": labels} for x in views]}, stage="fit")


def student_of(part: Any) -> Any:
    return getattr(part, "student", part)
