"""MoCo v1 and v2 (He et al., "MoCo"; Chen et al., "MoCo v2") with mixed views."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mixmask._distributed import exchange_rows, gather_rows, world_size
from mixmask.losses import InfoNCE
from mixmask.runs.options import Options, option, share
from mixmask.trainers.config import SMALL_IMAGES, RunConfig, presets
from mixmask.trainers.mixtures import Method, Term, Views
from mixmask.trainers.parts import (
    Queue,
    build_head,
    split_batch_norm,
    update_momentum,
)

# What MoCo v1 did otherwise, on any data.
V1 = {"mlp": False, "temperature": 0.07, "schedule": "step", "hue": 0.4, "blur": 0.0}
_CIFAR = {
    "lr": 0.06, "queue_size": 4096, "temperature": 0.1, "encoder_momentum": 0.99, "bn_splits": 8,
}  # fmt: skip
PRESETS: dict[str, Options] = {
    "clothing64": {"queue_size": 512, "temperature": 0.1, "encoder_momentum": 0.996},
    # Un-Mix's recipe (Shen et al.), on which the paper's CIFAR-100 rows build.
    **presets(SMALL_IMAGES, **_CIFAR),
    "imagenette": {**_CIFAR, "lr": 0.12},
}


@dataclass(frozen=True)
class MoCoConfig(RunConfig):
    """MoCo's own options; the defaults are MoCo v2's on ImageNet, 200 epochs."""

    dim: int = option(128, "size of the embedding", low=1)
    mlp: bool = option(
        True, "projection head with a hidden layer (v2) instead of a linear one (v1)"
    )
    queue_size: int = option(65_536, "keys in the queue", low=1)
    temperature: float = option(0.2, "temperature of the contrastive loss", positive=True)
    encoder_momentum: float = share(0.999, "momentum of the key encoder or the teacher")
    symmetric: bool = option(False, "use each view as query and as key, as Un-Mix's demo does")
    bn_splits: int = option(
        1, "parts of a batch with batch-norm statistics of their own; shuffles the keys", low=1
    )

    def __post_init__(self) -> None:
        """Check all options; see `RunConfig`."""
        super().__post_init__()
        part = self.batch_size // self.accumulate
        if part % self.bn_splits or part // self.bn_splits < 2:
            raise ValueError(
                "--bn-splits must divide --batch-size (of one part, with --accumulate) into parts "
                f"of at least 2, got {self.bn_splits} and {part}; use for instance 1"
            )


class MoCo(Method):
    """A query encoder, a key encoder that follows it slowly, and a queue of past keys."""

    config: MoCoConfig

    def __init__(self, config: MoCoConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        if config.bn_splits > 1:
            split_batch_norm(self.backbone, config.bn_splits)
        self.head = build_head(self.features, config.dim, mlp=config.mlp)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.queue = Queue(config.queue_size, config.dim)
        self.new_keys: list[Tensor] = []

    def encode(self, images: Tensor) -> Tensor:
        """Embed views (N, 3, S, S) by the query encoder: unit vectors (N, dim)."""
        return F.normalize(self.head(self.backbone(images)).float(), dim=1)

    @property
    def _apart(self) -> bool:
        """Whether batch norm sees the images of this process only."""
        return world_size() > 1 and not self.config.sync_bn

    @torch.no_grad()
    def encode_keys(self, images: Tensor, generator: Generator) -> Tensor:
        """Embed views (N, 3, S, S) by the key encoder: unit vectors (N, dim).

        Where batch norm sees a part of the step's images, keys are shuffled over parts and
        processes, so that a key shares its statistics with other images than its query does
        (He et al., section 3.3).
        """
        if not (self._apart or self.config.bn_splits > 1):
            return F.normalize(self.key_head(self.key_backbone(images)).float(), dim=1)
        shuffled, order = self._batch_shuffle(images, generator)
        keys = self.key_head(self.key_backbone(shuffled)).float()
        return F.normalize(self._batch_unshuffle(keys, order), dim=1)

    def _batch_shuffle(self, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Shuffle a batch over all processes: this process's share (N, 3, S, S), and the order.

        MoCo gathers all images and keeps a share; here each process receives as many as it has.
        """
        order = torch.randperm(len(x), generator=generator)  # (N,)
        order = order.to(x.device, non_blocking=True)
        share = exchange_rows(x[order]) if self._apart else x[order]  # (N, 3, S, S)
        return share.contiguous(memory_format=torch.channels_last), order

    def _batch_unshuffle(self, keys: Tensor, order: Tensor) -> Tensor:
        """Return the keys (N, dim) of this process's own images."""
        own = exchange_rows(keys) if self._apart else keys  # (N, dim)
        return own[order.argsort()]

    def terms(
        self, x1: Tensor, x2: Tensor, generator: Generator, *, extra: Views = (), mix: bool = True
    ) -> Iterator[Term]:
        """Yield one clean term per query, then one per mixed view; see `Method.terms`.

        All terms see the same queue: keys enter it in `after_step`.
        """
        config = self.config
        info_nce = InfoNCE(self.queue.keys, config.temperature)
        k2 = self.encode_keys(x2, generator)  # (N, dim)
        pairs, keys = [(x1, k2)], k2
        if config.symmetric:
            k1 = self.encode_keys(x1, generator)
            pairs, keys = [(x1, k2), (x2, k1)], torch.cat([k1, k2])  # keys: (2N, dim)
        for x, k in pairs if self.has_clean_terms(mix) else []:
            q = self.encode(x)  # (N, dim)
            yield Term(info_nce(q, k), pair=(q, k))
        for number, (x, k) in enumerate(pairs if mix else []):
            # Further crops are mixed once, against the keys of x2.
            views = [x] if number else [x, *extra]
            yield from self.mixed_terms(views, info_nce, k, generator)
        self.new_keys.append(keys)

    def after_step(self, done: float) -> None:
        """Update the key encoder and enqueue the keys, once per step."""
        del done
        assert self.new_keys, "after_step needs all terms of the step first"
        update_momentum(self.backbone, self.key_backbone, self.config.encoder_momentum)
        update_momentum(self.head, self.key_head, self.config.encoder_momentum)
        # Every process enqueues the keys of all, so that queues stay alike: (W * N, dim).
        self.queue.enqueue(gather_rows(torch.cat(self.new_keys), checked=False))
        self.new_keys = []
