"""Parts that methods share: heads, momentum, the queue, split batch norm, mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixmask.losses import Criterion, lambda_weighted_loss
from mixmask.mixing import MixedBatch, MixMask, cutmix_batch, erase_batch, mixup_batch
from mixmask.trainers.config import RunConfig

Mixture = Callable[[Tensor, torch.Generator], MixedBatch]


class Term(NamedTuple):
    """One summand of a step's loss.

    Attributes:
        loss: () scalar.
        lam: () float32, the mean λ of the mixed view; None for a clean term.
        pair: Two views' embeddings, (N, dim), of which the first tells how a run fares.
    """

    loss: Tensor
    lam: Tensor | None = None
    pair: tuple[Tensor, Tensor] | None = None


def build_head(features: int, dim: int, *, mlp: bool) -> nn.Module:
    """Build MoCo's projection head: linear (v1), or with a hidden layer of the same width (v2)."""
    if not mlp:
        return nn.Linear(features, dim)
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))


def build_mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Build linear layers of the given widths, with batch norm and ReLU between them.

    Args:
        *widths: Features at the start, after each layer, and at the end.
        last_norm: End in a batch norm without weights (SimSiam's projector).
    """
    *wide, last = widths
    layers: list[nn.Module] = []
    for before, after in pairwise(wide):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    layers.append(nn.Linear(wide[-1], last, bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(last, affine=False))
    return nn.Sequential(*layers)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are taken over parts of the batch, as on several devices.

    With shuffled keys this hides from a query which images share statistics with its key
    (He et al., "MoCo", section 3.3). Running statistics are the mean over the parts.
    """

    def __init__(self, features: int, splits: int) -> None:
        """Store the number of parts."""
        super().__init__(features)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W); N must be a multiple of the parts while training."""
        if not self.training:
            return super().forward(x)
        n, c, h, w = x.shape
        if n % self.splits:
            raise ValueError(
                f"a batch of {n} cannot be split into {self.splits} parts for batch norm; "
                "use a multiple, or --bn-splits 1"
            )
        # Interleaved parts become channels: sample i goes to part i mod splits.
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        out = F.batch_norm(
            x.reshape(n // self.splits, self.splits * c, h, w),
            mean,
            var,
            self.weight.repeat(self.splits),
            self.bias.repeat(self.splits),
            training=True,
            momentum=self.momentum or 0.1,
            eps=self.eps,
        )
        self.running_mean.copy_(mean.view(self.splits, c).mean(dim=0))
        self.running_var.copy_(var.view(self.splits, c).mean(dim=0))
        return out.view(n, c, h, w)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Replace every `BatchNorm2d` inside a module, in place, by one that splits the batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            split = SplitBatchNorm2d(child.num_features, splits)
            split.load_state_dict(child.state_dict())
            # timm's norm layers carry their activation; what follows must not lose it.
            after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            setattr(module, name, nn.Sequential(split, *after) if after else split)
        else:
            split_batch_norm(child, splits)


@torch.no_grad()
def update_momentum(online: nn.Module, target: nn.Module, momentum: float) -> None:
    """Move the target's parameters towards the online ones: t <- m t + (1 - m) o."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


def compile_backbones(model: nn.Module, mode: str = "default") -> None:
    """Compile a method's backbones in place, that of the slowly following branch too."""
    for name, child in model.named_children():
        if name.endswith("backbone"):
            child.compile(mode=mode)


class Queue(nn.Module):
    """The keys of past batches, unit vectors (K, dim), oldest overwritten first.

    K may be any number: a batch that reaches the end goes on at the start, and of a batch
    larger than the queue the last K keys stay.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        """Fill the queue with random directions."""
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put in a batch of keys (N, dim)."""
        size = len(self.keys)
        keys = keys[-size:]
        places = (self.position + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, places, keys.to(self.keys.dtype))
        self.position.add_(len(keys)).remainder_(size)


def build_mixtures(config: RunConfig) -> list[Mixture]:
    """Return what makes the mixed views of a step, in order; empty for `--mix none`.

    "both" pairs Un-Mix by reversal with MixMask by a random ring, so that an image meets two
    different partners.
    """
    partner = "random" if config.mix == "both" else "reverse"
    mask = MixMask(
        config.grid_size,
        config.ratio,
        config.pattern,
        per_sample=config.per_sample,
        partner=partner,
        roll=config.roll,
    )

    def mixmask(images: Tensor, generator: torch.Generator) -> MixedBatch:
        mixed: MixedBatch = mask(images, generator=generator)
        return mixed

    def erase(images: Tensor, generator: torch.Generator) -> MixedBatch:
        masks = mask.masks_for(images, generator=generator)
        if torch.rand((), generator=generator) < config.channel_share:
            n, c = len(images) if config.per_sample else 1, images.shape[1]
            by_channel = mask.masks(n * c, generator=generator)
            masks = rearrange(by_channel, "(n c) h w -> n c h w", n=n)
        return erase_batch(images, masks, generator=generator)

    def blend(images: Tensor, generator: torch.Generator) -> MixedBatch:
        return mixup_batch(images, alpha=config.alpha, generator=generator)

    def paste(images: Tensor, generator: torch.Generator) -> MixedBatch:
        return cutmix_batch(images, alpha=config.alpha, generator=generator)

    def unmix(images: Tensor, generator: torch.Generator) -> MixedBatch:
        globally = torch.rand((), generator=generator) < config.global_share
        return (blend if globally else paste)(images, generator)

    mixtures: dict[str, list[Mixture]] = {
        "none": [],
        "mixmask": [mixmask],
        "unmix": [unmix],
        "both": [unmix, mixmask],
        "erase": [erase],
        "mixup": [blend],
        "cutmix": [paste],
    }
    return mixtures[config.mix]


def mixed_terms(
    config: RunConfig,
    mixtures: Sequence[Mixture],
    images: Sequence[Tensor],
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
            mixed = mix(_resized(view, config.mixed_size), generator)
            z = encode(mixed.images)
            loss = lambda_weighted_loss(criterion, z, target.detach(), mixed, switch=config.switch)
            # Without clean queries, the mixed ones tell whether a run collapses.
            pair = (z, target.detach()) if config.replace_clean else None
            yield Term(loss, mixed.lam.mean(), pair)


def _resized(images: Tensor, size: int) -> Tensor:
    """Bring views to the size of mixed ones, if they have one of their own."""
    if size in (0, images.shape[-1]):
        return images
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Sort what is trained into groups for the optimiser.

    LARS and AdamW leave biases and norms without decay, and LARS without adaptation (SimCLR,
    BYOL). What a method lists as `constant_lr` keeps its learning rate (SimSiam's predictor).
    """
    constant = {id(p) for part in getattr(model, "constant_lr", ()) for p in part.parameters()}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 and config.optimizer != "sgd"
            groups.setdefault((plain, id(parameter) in constant), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if plain else config.weight_decay,
            "constant_lr": is_constant,
        }
        for (plain, is_constant), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Build SGD, LARS (You et al.; timm's) or AdamW over the model's groups."""
    groups = parameter_groups(model, config)
    # One pass over the weights, a third of the time of the default on a CPU.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=fused)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    from timm.optim.lars import Lars

    lars: torch.optim.Optimizer = Lars(groups, lr=config.lr, momentum=config.sgd_momentum)
    return lars


def rising_momentum(start: float, done: float) -> float:
    """Return BYOL's momentum of the target, from `start` to 1 along a cosine.

    Example:
        >>> rising_momentum(0.99, 0.0), rising_momentum(0.99, 1.0)
        (0.99, 1.0)
    """
    return 1 - (1 - start) * (math.cos(math.pi * done) + 1) / 2
