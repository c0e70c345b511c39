"""Rows, records and a criterion with state, for the tests of the λ-weighted loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixmask import MixedBatch
from mixmask.losses import InfoNCE

Criterion = Callable[[Tensor, Tensor], Tensor]
N, C = 7, 5


def squares(z: Tensor, target: Tensor) -> Tensor:
    return ((z - target) ** 2).flatten(1).sum(dim=1)


def as_record(partner: Tensor, lam: Tensor) -> MixedBatch:
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), lam, partner)


ROWS = torch.rand(4, C)
SHARED = as_record(torch.arange(3, -1, -1), torch.tensor(0.5))
EACH = as_record(torch.arange(3, -1, -1), torch.full((4,), 0.5))


class Bank(nn.Module):
    """A criterion whose buffer moves at every call."""

    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(6, 5))

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        loss = InfoNCE(self.keys.clone(), 0.5)(z, target)
        self.keys.copy_(torch.cat([target, self.keys])[:6].detach())
        return loss
