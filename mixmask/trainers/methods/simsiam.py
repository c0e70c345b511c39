"""SimSiam (Chen and He, "SimSiam") with mixed views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from mixmask.losses import NegativeCosine
from mixmask.runs.options import Options, option
from mixmask.trainers.config import IMAGENET_PARTS, SMALL_IMAGES, RunConfig, default, presets
from mixmask.trainers.mixtures import Method, Term, Views
from mixmask.trainers.parts import build_mlp

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


class SimSiam(Method):
    """One encoder and a predictor; the other view's projection is taken as a constant."""

    config: SimSiamConfig

    def __init__(self, config: SimSiamConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        dim = config.dim
        self.projector = build_mlp(self.features, dim, dim, dim, last_norm=True)
        self.predictor = build_mlp(dim, config.hidden, dim)
        self.constant_lr = (self.predictor,)  # Section 4.2.

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
        if self.has_clean_terms(mix):
            z1, z2 = self.project(x1), self.project(x2)  # (N, dim) each
            p1, p2 = self.predictor(z1), self.predictor(z2)  # (N, dim) each
            # Eq. 4: the distance takes its target as a constant.
            yield Term((distance(p1, z2) + distance(p2, z1)) / 2, pair=(z1, z2))
        else:
            with torch.no_grad():
                z2 = self.project(x2)  # (N, dim)
        if mix:
            yield from self.mixed_terms([x1, *extra], distance, z2, generator)
