"""lightly-train's methods, built small for the tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightly_train = pytest.importorskip(
    "lightly_train",
    reason="lightly-train is not installed; pip install lightly-train==0.18.0 for these tests",
)
method_helpers = pytest.importorskip("lightly_train._methods.method_helpers")
EmbeddingModel = pytest.importorskip("lightly_train._models.embedding_model").EmbeddingModel
dino = pytest.importorskip("lightly_train._methods.dino.dino")
simclr = pytest.importorskip("lightly_train._methods.simclr.simclr")
DINO, SimCLR = dino.DINO, simclr.SimCLR


N = 6


class Tiny(nn.Module):
    """A model as they take any of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=4)
        self.norm = nn.BatchNorm2d(8)

    def get_model(self) -> nn.Module:
        return self

    def feature_dim(self) -> int:
        return 8

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.norm(self.conv(x)).relu()}

    def forward_pool(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled_features": x["features"].mean(dim=(2, 3), keepdim=True)}


def build(cls: Any) -> Any:
    torch.manual_seed(0)
    width: dict[str, Any] = {"hidden_dim": 16, "output_dim": 12}
    if issubclass(cls, SimCLR):
        given, optimizer = simclr.SimCLRArgs(**width), simclr.SimCLRSGDArgs()
    else:
        given, optimizer = dino.DINOArgs(**width, bottleneck_dim=8), dino.DINOAdamWArgs()
        given.teacher_temp, given.warmup_teacher_temp = 0.07, 0.04
        given.momentum_start, given.warmup_teacher_temp_steps = 0.9, 4
        given.norm_last_layer = False
    method = cls(
        method_args=given,
        optimizer_args=optimizer,
        embedding_model=EmbeddingModel(Tiny()),
        global_batch_size=N,
        num_input_channels=3,
    ).double()
    method._trainer = SimpleNamespace(
        global_step=2, estimated_stepping_batches=8, max_epochs=2, current_epoch=0
    )
    return method


def draw_batch(step: int, views: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    sizes = [32, 32, *[24] * (views - 2)]
    make: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return {"views": [torch.rand(N, 3, size, size, **make) for size in sizes]}
