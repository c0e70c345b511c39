"""Mixed views of a step and their λ-weighted loss terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mixmask.losses import Criterion, lambda_weighted_loss
from mixmask.mixing import MixedBatch, MixMask, cutmix_batch, erase_batch, mixup_batch
from mixmask.trainers.config import RunConfig

Mixture = Callable[[Tensor, torch.Generator], MixedBatch]
Views = Sequence[Tensor]


class Term(NamedTuple):
    """One summand of a step's loss."""

    loss: Tensor  # () scalar.
    lam: Tensor | None = None  # () float32, the mean λ of the mixed view; None for a clean term.
    # Two views' embeddings, (N, dim), of which the first tells how a run fares.
    pair: tuple[Tensor, Tensor] | None = None


def build_mixtures(config: RunConfig) -> list[Mixture]:
    """Return the mixtures of a step, in order; none for `--mix none`.

    "both" pairs Un-Mix by reversal with MixMask by a random permutation without fixed points, so
    that an image meets two different partners.
    """
    mask = MixMask(
        config.grid_size,
        config.ratio,
        config.pattern,
        per_sample=config.per_sample,
        partner="random" if config.mix == "both" else "reverse",
        roll=config.roll,
    )
    mixer = _Mixer(config, mask)
    mixtures: dict[str, list[Mixture]] = {
        "none": [],
        "mixmask": [mixer.mixmask],
        "unmix": [mixer.unmix],
        "both": [mixer.unmix, mixer.mixmask],
        "erase": [mixer.erase],
        "mixup": [mixer.mixup],
        "cutmix": [mixer.cutmix],
    }
    return mixtures[config.mix]


@dataclass(frozen=True)
class _Mixer:
    """The ways to mix a batch of views (N, 3, S, S), each a `Mixture`."""

    config: RunConfig
    mask: MixMask

    def mixmask(self, images: Tensor, generator: torch.Generator) -> MixedBatch:
        mixed: MixedBatch = self.mask(images, generator=generator)
        return mixed

    def mixup(self, images: Tensor, generator: torch.Generator) -> MixedBatch:
        return mixup_batch(images, alpha=self.config.alpha, generator=generator)

    def cutmix(self, images: Tensor, generator: torch.Generator) -> MixedBatch:
        return cutmix_batch(images, alpha=self.config.alpha, generator=generator)

    def unmix(self, images: Tensor, generator: torch.Generator) -> MixedBatch:
        """Blend whole images or paste boxes, at random per step (Un-Mix)."""
        globally = torch.rand((), generator=generator) < self.config.global_share
        return (self.mixup if globally else self.cutmix)(images, generator)

    def erase(self, images: Tensor, generator: torch.Generator) -> MixedBatch:
        """Fill the masked-out part with noise, in some steps per colour channel (MSCN)."""
        masks = self.mask.masks_for(images, generator=generator)  # (g, g) or (N, g, g)
        if torch.rand((), generator=generator) < self.config.channel_share:
            n, c = len(images) if self.config.per_sample else 1, images.shape[1]
            by_channel = self.mask.masks(n * c, generator=generator)  # (n * c, g, g)
            masks = rearrange(by_channel, "(n c) h w -> n c h w", n=n)
        return erase_batch(images, masks, generator=generator)


def mixed_terms(
    config: RunConfig,
    mixtures: Sequence[Mixture],
    images: Views,
    encode: Callable[[Tensor], Tensor],
    criterion: Criterion,
    target: Tensor,
    generator: torch.Generator,
) -> Iterator[Term]:
    """Mix views in each way, embed them, and yield their λ-weighted losses (MixMask, eq. 4).

    Args:
        config: The run's options.
        mixtures: What `build_mixtures` returned.
        images: Clean views of the same images, each (N, 3, S, S).
        encode: The online branch, up to what the criterion takes.
        criterion: (z, target) -> () or (N,).
        target: (N, C) targets of the clean images' other view, without a gradient: theirs is of
            a forward pass that is over.
        generator: A CPU generator for masks and partners.
    """
    for mix in mixtures:
        for view in images:
            mixed = mix(resize_views(view, config.mixed_size), generator)  # images: (N, 3, s, s)
            z = encode(mixed.images)  # (N, C)
            loss = lambda_weighted_loss(criterion, z, target.detach(), mixed, switch=config.switch)
            # Without clean queries, the mixed ones tell whether a run collapses.
            pair = (z, target.detach()) if config.replace_clean else None
            yield Term(loss, mixed.lam.mean(), pair)


def resize_views(images: Tensor, size: int) -> Tensor:
    """Resize views (N, 3, S, S) to the size of the mixed ones, if it is another: (N, 3, s, s)."""
    if size in (0, images.shape[-1]):
        return images
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)
