"""Parts that methods share: heads, momentum, the queue, split batch norm."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    *inner, last = widths
    layers: list[nn.Module] = []
    for before, after in pairwise(inner):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    # A norm at the end subtracts the mean, so that a bias before it would do nothing.
    layers.append(nn.Linear(inner[-1], last, bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(last, affine=False))
    return nn.Sequential(*layers)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are taken over parts of the batch, as on several devices.

    With shuffled keys this hides from a query which images share statistics with its key
    (He et al., "MoCo", section 3.3). Running statistics are the mean over the parts.
    """

    def __init__(self, norm: nn.BatchNorm2d, splits: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.load_state_dict(norm.state_dict())
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
        # Interleaved parts become channels, so that one call serves all: sample i goes to part
        # i mod splits.
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        mean = self.running_mean.repeat(self.splits)  # (splits * C,)
        var = self.running_var.repeat(self.splits)
        weight, bias = (
            parameter.repeat(self.splits) if self.affine else None  # (splits * C,)
            for parameter in (self.weight, self.bias)
        )
        # Without a momentum, statistics are means over all batches, as in torch.
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        out = F.batch_norm(
            x.reshape(n // self.splits, self.splits * c, h, w),  # (N / splits, splits * C, H, W)
            mean,
            var,
            weight,
            bias,
            training=True,
            momentum=share,
            eps=self.eps,
        )
        # (splits * C,) -> (C,)
        self.running_mean.copy_(mean.view(self.splits, c).mean(dim=0))
        self.running_var.copy_(var.view(self.splits, c).mean(dim=0))
        return out.view(n, c, h, w)  # (N / splits, splits * C, H, W) -> (N, C, H, W)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Replace every `BatchNorm2d` inside a module, in place, by one that splits the batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            split = SplitBatchNorm2d(child, splits)
            # timm's norm layers carry their activation; what follows must not lose it.
            after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            setattr(module, name, nn.Sequential(split, *after) if after else split)
        else:
            split_batch_norm(child, splits)


@torch.no_grad()
def update_momentum(online: nn.Module, target: nn.Module, momentum: float) -> None:
    """Move the target's parameters towards the online ones: t <- m t + (1 - m) o."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


class Queue(nn.Module):
    """The keys of past batches, unit vectors (K, dim), oldest overwritten first.

    At the start they are random directions.

    K may be any number: a batch that reaches the end continues at the start, and of a batch
    larger than the queue the last K keys are kept.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by a batch (N, dim)."""
        size = len(self.keys)
        keys = keys[-size:]  # (min(N, K), dim)
        # Modulo K: a batch that reaches the end goes on at the start.
        steps = torch.arange(len(keys), device=keys.device)  # (min(N, K),)
        places = (self.position + steps) % size
        self.keys.index_copy_(0, places, keys.to(self.keys.dtype))
        self.position.add_(len(keys)).remainder_(size)
