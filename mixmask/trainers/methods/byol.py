"""BYOL (Grill et al., "BYOL") with mixed views."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.losses import negative_cosine
from mixmask.trainers.config import RunConfig, check_range, default, option
from mixmask.trainers.parts import (
    Mixture,
    Term,
    build_mixtures,
    build_mlp,
    mixed_terms,
    rising_momentum,
    update_momentum,
)

_CIFAR = {"optimizer": "sgd", "lr": 0.06, "hidden": 2048, "encoder_momentum": 0.99}
PRESETS: dict[str, dict[str, Any]] = {
    "clothing64": {
        "optimizer": "sgd", "batch_size": 32, "lr": 0.1, "hidden": 512, "dim": 128,
        "encoder_momentum": 0.9,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": _CIFAR,
    "stl10": _CIFAR,
    "imagenette": {"lr": 0.3, "weight_decay": 1e-6},
    "imagenet100": {"lr": 0.3},
}  # fmt: skip


@dataclass(frozen=True)
class BYOLConfig(RunConfig):
    """BYOL's own options; the defaults are those of its paper on ImageNet, 300 epochs."""

    optimizer: str = default("optimizer", "lars")
    batch_size: int = default("batch_size", 4096)
    lr: float = default("lr", 4.8)
    warmup: float = default("warmup", 0.033)
    weight_decay: float = default("weight_decay", 1e-6)
    epochs: int = default("epochs", 300)
    min_scale: float = default("min_scale", 0.08)
    dim: int = option(256, "size of the embedding")
    hidden: int = option(4096, "width of the hidden layers of projector and predictor")
    encoder_momentum: float = option(0.99, "momentum of the key encoder, or of the teacher")

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        super().__post_init__()
        for name in ("dim", "hidden"):
            check_range(name, getattr(self, name), 1)
        check_range("encoder_momentum", self.encoder_momentum, 0, 1)


def squared_distance(p: Tensor, target: Tensor) -> Tensor:
    """Return BYOL's loss of each prediction, (N,): 2 - 2 cos (eq. 2)."""
    return 2 + 2 * negative_cosine(p, target, reduction="none")


class BYOL(nn.Module):
    """An online branch with a predictor, and a target that follows it ever more slowly.

    Args:
        config: The run's options.
    """

    def __init__(self, config: BYOLConfig) -> None:
        """Build both branches with the same weights, and the predictor."""
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.arch, small_stem=config.small_stem)
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.projector = build_mlp(features, config.hidden, config.dim)
        self.predictor = build_mlp(config.dim, config.hidden, config.dim)
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.mixtures: list[Mixture] = build_mixtures(config)

    def encode(self, images: Tensor) -> Tensor:
        """Predict the target's projection of views (N, 3, S, S): (N, dim)."""
        p: Tensor = self.predictor(self.projector(self.backbone(images))).float()
        return p

    @torch.no_grad()
    def encode_targets(self, images: Tensor) -> Tensor:
        """Project views (N, 3, S, S) by the target branch: (N, dim)."""
        z: Tensor = self.target_projector(self.target_backbone(images)).float()
        return z

    def terms(
        self,
        x1: Tensor,
        x2: Tensor,
        generator: torch.Generator,
        *,
        extra: Sequence[Tensor] = (),
        mix: bool = True,
    ) -> Iterator[Term]:
        """Yield a clean term a direction, then one for each mixed view; see `MoCo.terms`.

        Args:
            x1: (N, 3, S, S) views; these are mixed.
            x2: (N, 3, S, S) the other views of the same images.
            generator: A CPU generator for masks and partners.
            extra: Further views, which are mixed too.
            mix: Whether this step has mixed views.
        """
        mixtures = self.mixtures if mix else []
        t2 = self.encode_targets(x2)
        if not (mixtures and self.config.replace_clean):
            t1 = self.encode_targets(x1)
            p1 = self.encode(x1)
            yield Term(squared_distance(p1, t2).mean(), pair=(p1, t2))
            yield Term(squared_distance(self.encode(x2), t1).mean())
        yield from mixed_terms(
            self.config, mixtures, [x1, *extra], self.encode, squared_distance, t2, generator
        )

    def after_step(self, done: float) -> None:
        """Let the target follow, with a momentum that rises to 1 along a cosine."""
        momentum = rising_momentum(self.config.encoder_momentum, done)
        update_momentum(self.backbone, self.target_backbone, momentum)
        update_momentum(self.projector, self.target_projector, momentum)
