"""MoCo v1 and v2 (He et al., "MoCo"; Chen et al., "MoCo v2") with mixed views."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.losses import InfoNCE, lambda_weighted_loss
from mixmask.trainers.config import MoCoConfig
from mixmask.trainers.parts import (
    Mixture,
    Queue,
    build_backbone,
    build_head,
    build_mixtures,
    split_batch_norm,
    update_momentum,
)


class Term(NamedTuple):
    """One summand of a step's loss, with the mean λ of its mixed view, () float32 or None."""

    loss: Tensor
    lam: Tensor | None = None


class MoCo(nn.Module):
    """A query encoder, its slowly following copy for the keys, and a queue of past keys.

    A step iterates over `terms`, calls backward on each, steps the optimiser, and calls
    `after_step`.

    Args:
        config: The run's options.
        gather: Joins the keys of all processes, (N, dim) -> (N * processes, dim).
    """

    def __init__(
        self, config: MoCoConfig, gather: Callable[[Tensor], Tensor] = lambda keys: keys
    ) -> None:
        """Build both encoders with the same weights, and a queue of random directions."""
        super().__init__()
        self.config = config
        self.gather = gather
        self.backbone = build_backbone(config.arch, small_stem=config.small_stem)
        if config.bn_splits > 1:
            split_batch_norm(self.backbone, config.bn_splits)
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.head = build_head(features, config.dim, mlp=config.mlp)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.queue = Queue(config.queue_size, config.dim)
        self.mixtures: list[Mixture] = build_mixtures(config)
        self.new_keys: Tensor | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Embed views (N, 3, S, S) by the query encoder: unit vectors (N, dim)."""
        return F.normalize(self.head(self.backbone(images)).float(), dim=1)

    @torch.no_grad()
    def encode_keys(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Embed views (N, 3, S, S) by the key encoder: unit vectors (N, dim)."""
        order = torch.arange(len(images))
        if self.config.bn_splits > 1:  # A key shares its statistics with other images' keys.
            order = torch.randperm(len(images), generator=generator)
        order = order.to(images.device, non_blocking=True)
        keys = self.key_head(self.key_backbone(images[order])).float()
        return F.normalize(keys[order.argsort()], dim=1)

    def terms(self, x_q: Tensor, x_k: Tensor, generator: torch.Generator) -> Iterator[Term]:
        """Yield the clean term, then one for each mixed view.

        Each is computed when asked for: call backward on one before asking for the next, and
        only one forward pass is alive at a time. All terms see the same queue.

        Args:
            x_q: (N, 3, S, S) views for the queries; these are mixed.
            x_k: (N, 3, S, S) views for the keys.
            generator: A CPU generator for masks, partners and the shuffling of keys.
        """
        config = self.config
        k = self.encode_keys(x_k, generator)
        info_nce = InfoNCE(self.queue.keys, config.temperature)
        yield Term(info_nce(self.encode(x_q), k))
        for mix in self.mixtures:
            mixed = mix(x_q, generator)
            z = self.encode(mixed.images)
            loss = lambda_weighted_loss(info_nce, z, k, mixed, switch=config.switch)
            yield Term(loss, mixed.lam.mean())
        self.new_keys = k

    def after_step(self) -> None:
        """Let the key encoder follow and put the keys into the queue, once a step."""
        assert self.new_keys is not None, "after_step belongs behind a finished terms()"
        update_momentum(self.backbone, self.key_backbone, self.config.encoder_momentum)
        update_momentum(self.head, self.key_head, self.config.encoder_momentum)
        self.queue.enqueue(self.gather(self.new_keys))
        self.new_keys = None
