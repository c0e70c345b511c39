"""MoCo v1 and v2 (He et al., "MoCo"; Chen et al., "MoCo v2") with mixed views."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask._distributed import gather_rows, of_first, rank, world_size
from mixmask.backbones import build_backbone
from mixmask.losses import InfoNCE
from mixmask.trainers.config import RunConfig, check_over_zero, check_range, option
from mixmask.trainers.parts import (
    Mixture,
    Queue,
    Term,
    build_head,
    build_mixtures,
    mixed_terms,
    split_batch_norm,
    update_momentum,
)

# What MoCo v1 did otherwise, on any data.
V1 = {"mlp": False, "temperature": 0.07, "schedule": "step", "hue": 0.4, "blur": 0.0}
_CIFAR = {
    "lr": 0.06, "queue_size": 4096, "temperature": 0.1, "encoder_momentum": 0.99, "bn_splits": 8,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "clothing64": {"queue_size": 512, "temperature": 0.1, "encoder_momentum": 0.996},
    # Un-Mix's recipe (Shen et al.), on which the paper's CIFAR-100 rows build.
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": _CIFAR,
    "stl10": _CIFAR,
    "imagenette": {**_CIFAR, "lr": 0.12},
}


@dataclass(frozen=True)
class MoCoConfig(RunConfig):
    """MoCo's own options; the defaults are MoCo v2's on ImageNet, 200 epochs."""

    dim: int = option(128, "size of the embedding")
    mlp: bool = option(True, "projection head with a hidden layer (v2), not a linear one (v1)")
    queue_size: int = option(65_536, "keys in the queue")
    temperature: float = option(0.2, "temperature of the contrastive loss")
    encoder_momentum: float = option(0.999, "momentum of the key encoder, or of the teacher")
    symmetric: bool = option(False, "each view is a query and a key, as in Un-Mix's demonstration")
    bn_splits: int = option(
        1, "parts of a batch with batch-norm statistics of their own; keys are then shuffled"
    )

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        super().__post_init__()
        for name in ("dim", "queue_size", "bn_splits"):
            check_range(name, getattr(self, name), 1)
        check_range("encoder_momentum", self.encoder_momentum, 0, 1)
        check_over_zero("temperature", self.temperature)
        part = self.batch_size // self.accumulate
        if part % self.bn_splits or part // self.bn_splits < 2:
            raise ValueError(
                "--bn-splits must divide --batch-size (of one part, with --accumulate) into parts "
                f"of at least 2, got {self.bn_splits} and {part}; use for instance 1"
            )


class MoCo(nn.Module):
    """A query encoder, its slowly following copy for the keys, and a queue of past keys.

    A step iterates over `terms`, calls backward on each, steps the optimiser, and calls
    `after_step`.

    Args:
        config: The run's options.
    """

    def __init__(self, config: MoCoConfig) -> None:
        """Build both encoders with the same weights, and a queue of random directions."""
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.arch, small_stem=config.small_stem)
        if config.bn_splits > 1:
            split_batch_norm(self.backbone, config.bn_splits)
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.head = build_head(features, config.dim, mlp=config.mlp)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.queue = Queue(config.queue_size, config.dim)
        self.mixtures: list[Mixture] = build_mixtures(config)
        self.new_keys: list[Tensor] = []

    def encode(self, images: Tensor) -> Tensor:
        """Embed views (N, 3, S, S) by the query encoder: unit vectors (N, dim)."""
        return F.normalize(self.head(self.backbone(images)).float(), dim=1)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Embed views (N, 3, S, S) by the key encoder: unit vectors (N, dim).

        Where batch norm sees a part of the step's images, keys are shuffled over parts and
        processes, so that a key shares its statistics with other images than its query does.
        """
        apart = world_size() > 1 and not self.config.sync_bn
        everyone = gather_rows(images, checked=False) if apart else images
        order = torch.arange(len(everyone))
        if apart or self.config.bn_splits > 1:
            order = torch.randperm(len(everyone), generator=generator)
        order = order.to(images.device, non_blocking=True)
        order = of_first(order) if apart else order
        first = rank() * len(images) if apart else 0
        mine = slice(first, first + len(images))
        shuffled = everyone[order[mine]].contiguous(memory_format=torch.channels_last)
        keys = self.key_head(self.key_backbone(shuffled)).float()
        keys = gather_rows(keys, checked=False) if apart else keys
        return F.normalize(keys[order.argsort()[mine]], dim=1)

    def terms(
        self,
        x1: Tensor,
        x2: Tensor,
        generator: torch.Generator,
        *,
        extra: Sequence[Tensor] = (),
        mix: bool = True,
    ) -> Iterator[Term]:
        """Yield the clean term, then one for each mixed view.

        Each is computed when asked for: call backward on one before asking for the next, and
        only one forward pass is alive at a time. All terms see the same queue.

        Args:
            x1: (N, 3, S, S) views for the queries; these are mixed.
            x2: (N, 3, S, S) views for the keys.
            generator: A CPU generator for masks, partners and the shuffling of keys.
            extra: Further views of the same images, which are mixed too.
            mix: Whether this step has mixed views.
        """
        config = self.config
        info_nce = InfoNCE(self.queue.keys, config.temperature)
        k2 = self.encode_keys(x2, generator)
        pairs, keys = [(x1, k2)], k2
        if config.symmetric:
            k1 = self.encode_keys(x1, generator)
            pairs, keys = [(x1, k2), (x2, k1)], torch.cat([k1, k2])
        mixtures = self.mixtures if mix else []
        for x, k in [] if mixtures and config.replace_clean else pairs:
            q = self.encode(x)
            yield Term(info_nce(q, k), pair=(q, k))
        for number, (x, k) in enumerate(pairs):
            views = [x] if number else [x, *extra]
            yield from mixed_terms(config, mixtures, views, self.encode, info_nce, k, generator)
        self.new_keys.append(keys)

    def after_step(self, done: float) -> None:
        """Let the key encoder follow and put the keys into the queue, once a step."""
        del done
        assert self.new_keys, "after_step belongs behind a finished terms()"
        update_momentum(self.backbone, self.key_backbone, self.config.encoder_momentum)
        update_momentum(self.head, self.key_head, self.config.encoder_momentum)
        self.queue.enqueue(gather_rows(torch.cat(self.new_keys), checked=False))
        self.new_keys = []
