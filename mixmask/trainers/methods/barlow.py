"""Barlow Twins (Zbontar et al., "Barlow Twins") with mixed views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixmask import losses
from mixmask.backbones import build_backbone
from mixmask.trainers.config import RunConfig, check_range, default, option
from mixmask.trainers.parts import (
    Mixture,
    Term,
    build_mixtures,
    build_mlp,
    mixed_terms,
)

_CIFAR = {"optimizer": "sgd", "lr": 0.06, "dim": 2048}
PRESETS: dict[str, dict[str, Any]] = {
    "clothing64": {"optimizer": "sgd", "lr": 0.03, "dim": 128, "scale": 0.1},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": _CIFAR,
    "stl10": _CIFAR,
    "imagenette": {"lr": 0.2, "weight_decay": 1e-6, "dim": 2048},
    "imagenet100": {"lr": 0.2, "dim": 2048},
}


@dataclass(frozen=True)
class BarlowTwinsConfig(RunConfig):
    """Barlow Twins' own options; the defaults are those of its code on ImageNet, 1000 epochs."""

    optimizer: str = default("optimizer", "lars")
    batch_size: int = default("batch_size", 2048)
    lr: float = default("lr", 1.6)
    warmup: float = default("warmup", 0.01)
    weight_decay: float = default("weight_decay", 1e-6)
    epochs: int = default("epochs", 1000)
    dim: int = option(8192, "size of the embedding")
    redundancy_weight: float = option(0.0051, "weight of the off-diagonal correlations")
    scale: float = option(1.0, "factor of the loss")

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        super().__post_init__()
        check_range("dim", self.dim, 1)
        for name in ("redundancy_weight", "scale"):
            check_range(name, getattr(self, name), 0)
        if self.per_sample and self.mix in ("mixmask", "both", "erase"):
            raise ValueError(
                "--per-sample gives each image a λ of its own, but barlow-twins has no loss of one "
                "image; leave it out"
            )


class BarlowTwins(nn.Module):
    """One encoder whose features correlate across views, and not with each other.

    Args:
        config: The run's options.
    """

    def __init__(self, config: BarlowTwinsConfig) -> None:
        """Build backbone and projector."""
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.arch, small_stem=config.small_stem)
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.projector = build_mlp(features, config.dim, config.dim, config.dim)
        self.mixtures: list[Mixture] = build_mixtures(config)
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
        self,
        x1: Tensor,
        x2: Tensor,
        generator: torch.Generator,
        *,
        extra: Sequence[Tensor] = (),
        mix: bool = True,
    ) -> Iterator[Term]:
        """Yield the clean term, then one for each mixed view; see `MoCo.terms`.

        Args:
            x1: (N, 3, S, S) views; these are mixed.
            x2: (N, 3, S, S) the other views of the same images.
            generator: A CPU generator for masks and partners.
            extra: Further views, which are mixed too.
            mix: Whether this step has mixed views.
        """
        mixtures = self.mixtures if mix else []
        if mixtures and self.config.replace_clean:
            with torch.no_grad():
                z2 = self.encode(x2)
        else:
            z1, z2 = self.encode(x1), self.encode(x2)
            yield Term(self.loss(z1, z2), pair=(z1, z2))
        yield from mixed_terms(
            self.config, mixtures, [x1, *extra], self.encode, self.loss, z2, generator
        )

    def after_step(self, done: float) -> None:
        """Do nothing: there is neither teacher nor queue."""
