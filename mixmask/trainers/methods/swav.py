"""SwAV (Caron et al., "SwAV"), with two crops, and mixed views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mixmask import losses
from mixmask.losses import sinkhorn
from mixmask.runs.options import Options, option, share
from mixmask.trainers.config import SMALL_IMAGES, LargeBatchConfig, presets
from mixmask.trainers.mixtures import Method, Term, Views
from mixmask.trainers.parts import build_mlp

PRESETS: dict[str, Options] = {
    "clothing64": {"optimizer": "sgd", "lr": 0.15, "hidden": 128, "prototypes": 32},
    **presets(SMALL_IMAGES, optimizer="sgd", lr=0.06, prototypes=100),
    "imagenette": {"lr": 0.3, "weight_decay": 1e-6, "prototypes": 300},
    "imagenet100": {"lr": 0.3, "prototypes": 1000},
}


@dataclass(frozen=True)
class SwAVConfig(LargeBatchConfig):
    """SwAV's own options; the defaults are those of its paper on ImageNet, 100 epochs."""

    dim: int = option(128, "size of the embedding", low=1)
    hidden: int = option(2048, "width of the projector's hidden layer", low=1)
    prototypes: int = option(3000, "number of prototypes", low=2)
    temperature: float = option(0.1, "temperature of the prediction", positive=True)
    epsilon: float = option(0.05, "weight of the codes' entropy", positive=True)
    frozen: float = share(0.01, "share of the run in which the prototypes are frozen")


class SwAV(Method):
    """One encoder and prototypes; each view predicts the other's code."""

    config: SwAVConfig
    awake: Tensor

    def __init__(self, config: SwAVConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.projector = build_mlp(self.features, config.hidden, config.dim)
        directions = F.normalize(torch.randn(config.prototypes, config.dim), dim=1)
        self.prototypes = nn.Parameter(directions)
        self.register_buffer("awake", torch.tensor(float(config.frozen == 0)))

    def encode(self, images: Tensor) -> Tensor:
        """Score views (N, 3, S, S) against the prototypes: cosines, (N, prototypes)."""
        z = F.normalize(self.projector(self.backbone(images)).float(), dim=1)  # (N, dim)
        prototypes = F.normalize(self.prototypes, dim=1)  # (prototypes, dim)
        # A product instead of a branch: while they rest, their gradient is 0 and the value stays.
        resting = prototypes.detach()
        return z @ (resting + self.awake * (prototypes - resting)).T  # (N, prototypes)

    def terms(
        self, x1: Tensor, x2: Tensor, generator: Generator, *, extra: Views = (), mix: bool = True
    ) -> Iterator[Term]:
        """Yield the clean term, then one per mixed view; see `Method.terms`."""
        config = self.config
        swav = losses.SwAV(config.temperature)
        if self.has_clean_terms(mix):
            s1, s2 = self.encode(x1), self.encode(x2)  # (N, prototypes) each
            # Swapped: each view predicts the other's code (eq. 1).
            codes1, codes2 = (
                sinkhorn(s, config.epsilon, gather_distributed=True) for s in (s1, s2)
            )
            yield Term((swav(s1, codes2) + swav(s2, codes1)) / 2, pair=(s1, s2))
        else:
            with torch.no_grad():
                codes2 = sinkhorn(self.encode(x2), config.epsilon, gather_distributed=True)
        if mix:
            yield from self.mixed_terms([x1, *extra], swav, codes2, generator)

    def after_step(self, done: float) -> None:
        """Train the prototypes once the first part of the run is over."""
        self.awake.fill_(done >= self.config.frozen)
