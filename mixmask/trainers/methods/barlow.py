"""Barlow Twins (Zbontar et al., "Barlow Twins") with mixed views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from mixmask import losses
from mixmask.runs.options import Options, option
from mixmask.trainers.config import IMAGENET_PARTS, SMALL_IMAGES, LargeBatchConfig, default, presets
from mixmask.trainers.mixtures import Method, Term, Views
from mixmask.trainers.parts import build_mlp

PRESETS: dict[str, Options] = {
    "clothing64": {"optimizer": "sgd", "lr": 0.03, "dim": 128, "scale": 0.1},
    **presets(SMALL_IMAGES, optimizer="sgd", lr=0.06, dim=2048),
    **presets(IMAGENET_PARTS, lr=0.2, weight_decay=1e-6, dim=2048),
}


@dataclass(frozen=True)
class BarlowTwinsConfig(LargeBatchConfig):
    """Barlow Twins' own options; the defaults are those of its code on ImageNet, 1000 epochs."""

    batch_size: int = default("batch_size", 2048)
    lr: float = default("lr", 1.6)
    warmup: float = default("warmup", 0.01)
    epochs: int = default("epochs", 1000)

    dim: int = option(8192, "size of the embedding", low=1)
    redundancy_weight: float = option(0.0051, "weight of the off-diagonal correlations", low=0)
    scale: float = option(1.0, "factor of the loss", low=0)

    def __post_init__(self) -> None:
        """Check all options; see `RunConfig`."""
        super().__post_init__()
        if self.per_sample and self.mix in ("mixmask", "both", "erase"):
            raise ValueError(
                "--per-sample is not supported by barlow-twins, whose loss is of a whole batch; "
                "leave it out"
            )


class BarlowTwins(Method):
    """One encoder whose features correlate across views, and not with each other."""

    config: BarlowTwinsConfig

    def __init__(self, config: BarlowTwinsConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.projector = build_mlp(self.features, config.dim, config.dim, config.dim)
        self.barlow_twins = losses.BarlowTwins(
            config.redundancy_weight, gather_distributed=True, sync_statistics=True
        )

    def encode(self, images: Tensor) -> Tensor:
        """Project views (N, 3, S, S): (N, dim)."""
        z: Tensor = self.projector(self.backbone(images)).float()
        return z

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the scaled loss of two views' projections, ()."""
        return self.config.scale * self.barlow_twins(z, target)

    def terms(
        self, x1: Tensor, x2: Tensor, generator: Generator, *, extra: Views = (), mix: bool = True
    ) -> Iterator[Term]:
        """Yield the clean term, then one per mixed view; see `Method.terms`."""
        if self.has_clean_terms(mix):
            z1, z2 = self.encode(x1), self.encode(x2)  # (N, dim) each
            yield Term(self.loss(z1, z2), pair=(z1, z2))
        else:
            with torch.no_grad():
                z2 = self.encode(x2)  # (N, dim)
        if mix:
            yield from self.mixed_terms([x1, *extra], self.loss, z2, generator)
