"""Criteria that remember in buffers, and a step on a fresh copy for every term."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mixmask import MixedBatch

N, C, K = 6, 4, 12
PARTNER = torch.tensor([2, 0, 1, 5, 3, 3])
MIXED = MixedBatch(torch.empty(N, 1, 1, 1), torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8, 0.9]), PARTNER)
SHARED = MixedBatch(torch.empty(N, 1, 1, 1), torch.tensor(0.3), PARTNER.flip(0))


def measure_distance(z: Tensor, target: Tensor) -> Tensor:
    return ((z - target) ** 2).sum(dim=1)


class Bank(nn.Module):
    """Enqueue into a ring, in place, then contrast with it, as it lies there."""

    bank: Tensor
    pointer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.randn(K, C))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        places = (self.pointer + torch.arange(len(z))) % len(self.bank)
        self.bank[places] = target.detach() + 0.1 * z.detach()
        self.pointer += len(z)
        return (z @ self.bank.T).logsumexp(dim=1) - (z * target).sum(dim=1)


class Center(nn.Module):
    """Rebind a running mean after every use; with a temperature to learn."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.randn(C))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        loss = ((z - target + self.center) ** 2).sum(dim=1) * self.temperature
        self.center = 0.5 * self.center + 0.5 * target.detach().mean(dim=0)
        return loss


class DataCenter(Center):
    """As lightly's DINOLoss does it."""

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        loss = ((z - target + self.center) ** 2).sum(dim=1) * self.temperature
        self.center.data = 0.5 * self.center + 0.5 * (z + target).detach().mean(dim=0)
        return loss


class Late(nn.Module):
    """A bank of no size until the first batch has come."""

    bank: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", None)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        bank = torch.zeros(1, C) if self.bank is None else self.bank
        self.bank = torch.cat([bank, target.detach()])
        return ((z @ bank.T) ** 2).mean(dim=1) + measure_distance(z, target)


class Lazy(nn.Module):
    """A buffer that is not even registered before the first call."""

    bank: Tensor

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        if "bank" not in dict(self.named_buffers()):
            self.register_buffer("bank", torch.zeros(1, C))
        loss = ((z @ self.bank.T) ** 2).mean(dim=1) + measure_distance(z, target)
        self.bank = torch.cat([self.bank, target.detach()])
        return loss


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Bank(), nn.ModuleDict({"deep": Center()})])

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros(len(z))
        for part in (self.parts[0], self.parts[1]["deep"]):  # type: ignore[index]
            total = total + part(z, target)
        return total


class Tied(nn.Module):
    """Two modules around one buffer: what one writes, the other reads."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.reader = Bank(), Bank()
        self.reader.bank = self.writer.bank

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.writer(z, target)
        return loss + (z @ self.reader.bank.T).tanh().sum(dim=1)


class Normalising(nn.Module):
    """Running statistics, which batch norm writes to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return measure_distance(self.predictor(z), target)


STATEFUL: dict[str, type[nn.Module]] = {
    module.__name__: module
    for module in (Bank, Center, DataCenter, Late, Lazy, Nested, Tied, Normalising)
}
stateful = pytest.mark.parametrize("kind", STATEFUL.values(), ids=STATEFUL)


def draw_rows(count: int) -> tuple[Tensor, ...]:
    return torch.randn(count, N, C).unbind()


def draw_leaves(count: int) -> tuple[Tensor, ...]:
    return tuple(rows.clone().requires_grad_() for rows in draw_rows(count))


def copy_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """All buffers by name, also those that are None and those that are shared."""
    return {
        f"{prefix}.{name}": None if buffer is None else buffer.detach().clone()
        for prefix, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
    }


def are_equal(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> bool:
    return ours.keys() == theirs.keys() and all(
        b is None if a is None else b is not None and torch.equal(a, b)
        for a, b in zip(ours.values(), (theirs[name] for name in ours), strict=True)
    )


def step_slowly(
    snapshot: nn.Module,
    z: Tensor,
    target: Tensor,
    views: list[tuple[Tensor, MixedBatch]],
    *,
    switch: bool = True,
) -> Tensor:
    """Every term on a copy of its own of the state before the step."""

    def term(z: Tensor, target: Tensor) -> Tensor:
        fresh = copy.deepcopy(snapshot)
        # The copy stands for the snapshot, whose parameters the step is about.
        return torch.func.functional_call(fresh, dict(snapshot.named_parameters()), (z, target))  # type: ignore[no-any-return]

    total = term(z, target).mean()
    for z_mixed, mixed in views:
        total = total + (mixed.lam * term(z_mixed, target)).mean()
        if switch:
            total = total + ((1 - mixed.lam) * term(z_mixed, target[mixed.partner])).mean()
    return total
