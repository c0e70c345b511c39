"""SimSiam (Chen and He, "SimSiam") with mixed views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from mixmask.losses import NegativeCosine
from mixmask.runs.options import Options, option
from mixmask.trainers.config import IMAGENET_PARTS, SMALL_IMAGES, RunConfig, default, presets
from mixmask.trainers.mixtures import Term, Views, build_mixtures, mixed_terms
from mixmask.trainers.parts import build_encoder, build_mlp

PRESETS: dict[str, Options] = {
    "clothing64": {"lr": 0.1, "dim": 256, "hidden": 64},
    # SimSiam, appendix D: lr .03 for 256 images.
    **presets(SMALL_IMAGES, lr=0.06),
    **presets(IMAGENET_PARTS, lr=0.05),
}


@dataclass(frozen=True)
class SimSiamConfig(RunConfig):
    """SimSiam's own options; the defaults are those of its paper on ImageNet, 100 epochs."""

    batch_size: int = default("batch_size", 512)
    lr: float = default("lr", 0.1)
    epochs: int = default("epochs", 100)
    dim: int = option(2048, "size of the embedding", low=1)
    hidden: int = option(512, "width of the predictor's hidden layer", low=1)


class SimSiam(nn.Module):
    """One encoder and a predictor; the other view's projection is taken as a constant."""

    def __init__(self, config: SimSiamConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, features = build_encoder(config)
        self.projector = build_mlp(features, config.dim, config.dim, config.dim, last_norm=True)
        self.predictor = build_mlp(config.dim, config.hidden, config.dim)
        self.mixtures = build_mixtures(config)

    @property
    def constant_lr(self) -> tuple[nn.Module, ...]:
        """The predictor keeps its learning rate (section 4.2)."""
        return (self.predictor,)

    def project(self, images: Tensor) -> Tensor:
        """Project views (N, 3, S, S): (N, dim)."""
        z: Tensor = self.projector(self.backbone(images))
        return z

    def encode(self, images: Tensor) -> Tensor:
        """Predict the other view's projection: (N, dim)."""
        p: Tensor = self.predictor(self.project(images)).float()
        return p

    def terms(
        self, x1: Tensor, x2: Tensor, generator: Generator, *, extra: Views = (), mix: bool = True
    ) -> Iterator[Term]:
        """Yield the clean term, then one per mixed view; see `Method.terms`."""
        distance = NegativeCosine()
        mixtures = self.mixtures if mix else []
        if mixtures and self.config.replace_clean:
            with torch.no_grad():
                z2 = self.project(x2)  # (N, dim)
        else:
            z1, z2 = self.project(x1), self.project(x2)  # (N, dim) each
            p1, p2 = self.predictor(z1), self.predictor(z2)  # (N, dim) each
            # Eq. 4: the distance takes its target as a constant.
            yield Term((distance(p1, z2) + distance(p2, z1)) / 2, pair=(z1, z2))
        yield from mixed_terms(
            self.config, mixtures, [x1, *extra], self.encode, distance, z2, generator
        )

    def after_step(self, done: float) -> None:
        """Do nothing: there is neither a teacher nor a queue."""
