"""SimCLR (Chen et al., "SimCLR") with mixed views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from mixmask.losses import NTXent
from mixmask.runs.options import Options, option
from mixmask.trainers.config import IMAGENET_PARTS, SMALL_IMAGES, LargeBatchConfig, default, presets
from mixmask.trainers.mixtures import Method, Term, Views
from mixmask.trainers.parts import build_head

PRESETS: dict[str, Options] = {
    "clothing64": {"optimizer": "sgd", "lr": 0.06},
    # Rate and temperature: SimCLR, appendix B.9.
    **presets(SMALL_IMAGES, lr=1.0, temperature=0.5, weight_decay=1e-4, jitter=0.4, hue=0.1),
    # The rate is .3 for 256 images (SimCLR, section 2.2).
    **presets(IMAGENET_PARTS, lr=0.3, weight_decay=1e-6),
}


@dataclass(frozen=True)
class SimCLRConfig(LargeBatchConfig):
    """SimCLR's own options; the defaults are those of its paper on ImageNet, 100 epochs."""

    min_scale: float = default("min_scale", 0.08)
    jitter: float = default("jitter", 0.8)
    hue: float = default("hue", 0.2)
    dim: int = option(128, "size of the embedding", low=1)
    temperature: float = option(0.1, "temperature of the contrastive loss", positive=True)
    one_directional: bool = option(
        False, "contrast the mixed view with the other view's targets only, as i-Mix does"
    )


class SimCLR(Method):
    """One encoder and a head, both views of all other images as negatives."""

    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.head = build_head(self.features, config.dim, mlp=True)

    def encode(self, images: Tensor) -> Tensor:
        """Embed views (N, 3, S, S): (N, dim), of any length."""
        z: Tensor = self.head(self.backbone(images)).float()
        return z

    def terms(
        self, x1: Tensor, x2: Tensor, generator: Generator, *, extra: Views = (), mix: bool = True
    ) -> Iterator[Term]:
        """Yield the clean term, then one per mixed view; see `Method.terms`."""
        config = self.config
        nt_xent = NTXent(config.temperature, gather_distributed=True)
        if self.has_clean_terms(mix):
            # One pass of both views, so that batch norm sees all 2N images.
            z1, z2 = self.encode(torch.cat([x1, x2])).chunk(2)  # (2N, dim) -> (N, dim) each
            yield Term(nt_xent(z1, z2), pair=(z1, z2))
        else:
            with torch.no_grad():
                z2 = self.encode(x2)  # (N, dim)
        if config.one_directional:  # For the mixed views alone.
            nt_xent = NTXent(config.temperature, one_directional=True, gather_distributed=True)
        if mix:
            yield from self.mixed_terms([x1, *extra], nt_xent, z2, generator)
