"""BYOL (Grill et al., "BYOL") with mixed views."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from mixmask.losses.cosine import squared_distance
from mixmask.runs.options import Options, option, share
from mixmask.runs.schedules import cosine_decay
from mixmask.trainers.config import IMAGENET_PARTS, SMALL_IMAGES, LargeBatchConfig, default, presets
from mixmask.trainers.mixtures import Method, Term, Views
from mixmask.trainers.parts import build_mlp, update_momentum

PRESETS: dict[str, Options] = {
    "clothing64": {
        "optimizer": "sgd", "batch_size": 32, "lr": 0.1, "hidden": 512, "dim": 128,
        "encoder_momentum": 0.9,
    },
    **presets(SMALL_IMAGES, optimizer="sgd", lr=0.06, hidden=2048, encoder_momentum=0.99),
    **presets(IMAGENET_PARTS, lr=0.3, weight_decay=1e-6),
}  # fmt: skip


@dataclass(frozen=True)
class BYOLConfig(LargeBatchConfig):
    """BYOL's own options; the defaults are those of its paper on ImageNet, 300 epochs."""

    warmup: float = default("warmup", 0.033)
    epochs: int = default("epochs", 300)
    min_scale: float = default("min_scale", 0.08)
    dim: int = option(256, "size of the embedding", low=1)
    hidden: int = option(4096, "width of the hidden layers of projector and predictor", low=1)
    encoder_momentum: float = share(0.99, "momentum of the key encoder or the teacher")


def rising_momentum(start: float, done: float) -> float:
    """Return the target's momentum, which rises from `start` to 1 along a cosine (section 3.2).

    Example:
        >>> rising_momentum(0.99, 0.0), rising_momentum(0.99, 1.0)
        (0.99, 1.0)
    """
    return 1 - (1 - start) * cosine_decay(done)


class BYOL(Method):
    """An online branch with a predictor, and a target that follows it ever more slowly."""

    config: BYOLConfig

    def __init__(self, config: BYOLConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.projector = build_mlp(self.features, config.hidden, config.dim)
        self.predictor = build_mlp(config.dim, config.hidden, config.dim)
        # The target starts at the online branch's weights and gets no gradient.
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

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
        self, x1: Tensor, x2: Tensor, generator: Generator, *, extra: Views = (), mix: bool = True
    ) -> Iterator[Term]:
        """Yield one clean term per direction, then one per mixed view; see `Method.terms`."""
        t2 = self.encode_targets(x2)  # (N, dim)
        if self.has_clean_terms(mix):
            # Both directions (section 3.1), one forward pass of the online branch after the other.
            t1 = self.encode_targets(x1)  # (N, dim)
            p1 = self.encode(x1)  # (N, dim)
            yield Term(squared_distance(p1, t2).mean(), pair=(p1, t2))
            yield Term(squared_distance(self.encode(x2), t1).mean())
        if mix:
            yield from self.mixed_terms([x1, *extra], squared_distance, t2, generator)

    def after_step(self, done: float) -> None:
        """Let the target follow, with a momentum that rises to 1 along a cosine."""
        momentum = rising_momentum(self.config.encoder_momentum, done)
        update_momentum(self.backbone, self.target_backbone, momentum)
        update_momentum(self.projector, self.target_projector, momentum)
