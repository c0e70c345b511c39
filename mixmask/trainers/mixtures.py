"""What a method is, the mixed views of a step, and their λ-weighted loss terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

from mixmask.losses import Criterion, lambda_weighted_loss
from mixmask.mixing import MixedBatch, MixMask, cutmix_batch, erase_batch, mixup_batch
from mixmask.trainers.config import RunConfig

Mixture = Callable[[Tensor, Generator], MixedBatch]
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

    def mixmask(self, images: Tensor, generator: Generator) -> MixedBatch:
        mixed: MixedBatch = self.mask(images, generator=generator)
        return mixed

    def mixup(self, images: Tensor, generator: Generator) -> MixedBatch:
        return mixup_batch(images, alpha=self.config.alpha, generator=generator)

    def cutmix(self, images: Tensor, generator: Generator) -> MixedBatch:
        return cutmix_batch(images, alpha=self.config.alpha, generator=generator)

    def unmix(self, images: Tensor, generator: Generator) -> MixedBatch:
        """Blend whole images or paste boxes, at random per step (Un-Mix)."""
        globally = torch.rand((), generator=generator) < self.config.global_share
        return (self.mixup if globally else self.cutmix)(images, generator)

    def erase(self, images: Tensor, generator: Generator) -> MixedBatch:
        """Fill the masked-out part with noise, in some steps per colour channel (MSCN)."""
        masks = self.mask.masks_for(images, generator=generator)  # (g, g) or (N, g, g)
        if torch.rand((), generator=generator) < self.config.channel_share:
            n, c = len(images) if self.config.per_sample else 1, images.shape[1]
            by_channel = self.mask.masks(n * c, generator=generator)  # (n * c, g, g)
            masks = rearrange(by_channel, "(n c) h w -> n c h w", n=n)
        return erase_batch(images, masks, generator=generator)


class Method(nn.Module):
    """A backbone, the mixtures of its views, and the two calls of a step.

    A step iterates over `terms`, calls backward on each, steps the optimiser, and calls
    `after_step`. A method is a subclass, which builds its heads and gives `encode` and `terms`.
    """

    config: RunConfig
    # Parts that keep their learning rate.
    constant_lr: Sequence[nn.Module] = ()

    def __init__(self, config: RunConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.features = int(backbone.num_features)  # type: ignore[arg-type]
        self.mixtures = build_mixtures(config)

    def encode(self, images: Tensor) -> Tensor:
        """Pass views (N, 3, S, S) through the online branch, up to what the criterion takes."""
        raise NotImplementedError

    def terms(
        self, x1: Tensor, x2: Tensor, generator: Generator, *, extra: Views = (), mix: bool = True
    ) -> Iterator[Term]:
        """Yield the terms of a step's loss: the clean ones, then one per mixed view.

        Each is computed when it is asked for: call backward on one before asking for the next,
        and only one forward pass is alive at a time. With `--replace-clean`, a step with mixed
        views has no clean terms.

        Args:
            x1: (N, 3, S, S) views; these are mixed.
            x2: (N, 3, S, S) other views of the same images: keys, or targets.
            generator: A CPU generator for masks, partners and the shuffling of keys.
            extra: Further views of the same images, (N, 3, S, S) each, which are mixed too.
            mix: Whether this step has mixed views.
        """
        raise NotImplementedError

    def mixed_terms(
        self, views: Views, criterion: Criterion, target: Tensor, generator: Generator
    ) -> Iterator[Term]:
        """Mix views in each way, embed them, and yield their λ-weighted losses (MixMask, eq. 4).

        Args:
            views: Clean views of the same images, each (N, 3, S, S).
            criterion: (z, target) -> () or (N,).
            target: (N, C) targets of the clean images' other view, without a gradient: theirs is
                of a forward pass that is over.
            generator: A CPU generator for masks and partners.
        """
        config, target = self.config, target.detach()
        for mixture in self.mixtures:
            for view in views:
                small = resize_views(view, config.mixed_size)  # (N, 3, s, s)
                mixed = mixture(small, generator)
                z = self.encode(mixed.images)  # (N, C)
                loss = lambda_weighted_loss(criterion, z, target, mixed, switch=config.switch)
                # Without clean queries, the mixed ones tell whether a run collapses.
                pair = (z, target) if config.replace_clean else None
                yield Term(loss, mixed.lam.mean(), pair)

    def has_clean_terms(self, mix: bool) -> bool:
        """Tell whether a step with or without mixed views has clean terms."""
        return not (mix and self.mixtures and self.config.replace_clean)

    def after_step(self, done: float) -> None:
        """Do what follows an optimiser step, when a share `done` of the run, 0 ... 1, is over.

        Nothing, where there is neither a teacher nor a queue.
        """


def resize_views(images: Tensor, size: int) -> Tensor:
    """Resize views (N, 3, S, S) to the size of the mixed ones, if it is another: (N, 3, s, s)."""
    if size in (0, images.shape[-1]):
        return images
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)
