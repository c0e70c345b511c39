"""SimCLR (Chen et al., "SimCLR") with mixed views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.losses import NTXent
from mixmask.trainers.config import RunConfig, check_over_zero, check_range, default, option
from mixmask.trainers.parts import (
    Mixture,
    Term,
    build_head,
    build_mixtures,
    mixed_terms,
)

_CIFAR = {"lr": 1.0, "temperature": 0.5, "weight_decay": 1e-4, "jitter": 0.4, "hue": 0.1}
PRESETS: dict[str, dict[str, Any]] = {
    "clothing64": {"optimizer": "sgd", "lr": 0.06},
    # Rate and temperature: SimCLR, appendix B.9.
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": _CIFAR,
    "stl10": _CIFAR,
    # The rate is .3 for 256 images (SimCLR, section 2.2).
    "imagenette": {"lr": 0.3, "weight_decay": 1e-6},
    "imagenet100": {"lr": 0.3},
}


@dataclass(frozen=True)
class SimCLRConfig(RunConfig):
    """SimCLR's own options; the defaults are those of its paper on ImageNet, 100 epochs."""

    optimizer: str = default("optimizer", "lars")
    batch_size: int = default("batch_size", 4096)
    lr: float = default("lr", 4.8)
    warmup: float = default("warmup", 0.1)
    weight_decay: float = default("weight_decay", 1e-6)
    epochs: int = default("epochs", 100)
    min_scale: float = default("min_scale", 0.08)
    jitter: float = default("jitter", 0.8)
    hue: float = default("hue", 0.2)
    dim: int = option(128, "size of the embedding")
    temperature: float = option(0.1, "temperature of the contrastive loss")
    one_directional: bool = option(
        False, "contrast the mixed view with the other one's targets alone, as i-Mix does"
    )

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        super().__post_init__()
        check_range("dim", self.dim, 1)
        check_over_zero("temperature", self.temperature)


class SimCLR(nn.Module):
    """One encoder and a head, both views of all other images as negatives.

    Args:
        config: The run's options.
    """

    def __init__(self, config: SimCLRConfig) -> None:
        """Build backbone and head."""
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.arch, small_stem=config.small_stem)
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.head = build_head(features, config.dim, mlp=True)
        self.mixtures: list[Mixture] = build_mixtures(config)

    def encode(self, images: Tensor) -> Tensor:
        """Embed views (N, 3, S, S): (N, dim), of any length."""
        z: Tensor = self.head(self.backbone(images)).float()
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
        """Yield the clean term, then one for each mixed view; see `MoCo.terms`.

        Args:
            x1: (N, 3, S, S) views; these are mixed.
            x2: (N, 3, S, S) the other views of the same images.
            generator: A CPU generator for masks and partners.
            extra: Further views, which are mixed too.
            mix: Whether this step has mixed views.
        """
        config = self.config
        nt_xent = NTXent(config.temperature, gather_distributed=True)
        mixtures = self.mixtures if mix else []
        if mixtures and config.replace_clean:
            with torch.no_grad():
                z2 = self.encode(x2)
        else:
            z1, z2 = self.encode(torch.cat([x1, x2])).chunk(2)
            yield Term(nt_xent(z1, z2), pair=(z1, z2))
        if config.one_directional:
            nt_xent = NTXent(config.temperature, one_directional=True, gather_distributed=True)
        yield from mixed_terms(config, mixtures, [x1, *extra], self.encode, nt_xent, z2, generator)

    def after_step(self, done: float) -> None:
        """Do nothing: there is neither teacher nor queue."""
