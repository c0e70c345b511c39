"""State that modules, proxies, slots and closures hold in unusual places."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from buffered import (
    MIXED,
    PARTNER,
    SHARED,
    C,
    K,
    draw_rows,
    measure_distance,
)
from hidden import (
    Memory,
    Plain,
    count,
)
from torch import Tensor, nn

from mixmask import LambdaWeightedLoss, lambda_weighted_loss


@pytest.mark.parametrize("hide", ["dict", "setattr"])
@pytest.mark.parametrize(
    "kept", [nn.Linear(C, C), nn.Parameter(torch.ones(C)), Memory()], ids=["layer", "weight", "own"]
)
def test_what_a_module_keeps_out_of_its_children_stays_there(kept: Any, hide: str) -> None:
    class Teaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(C, C)
            if hide == "dict":
                self.__dict__["teacher"] = kept
            else:
                object.__setattr__(self, "teacher", kept)

        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            return measure_distance(self.student(z), target)

    criterion = Teaching()
    whole = LambdaWeightedLoss(criterion)
    names, held = list(whole.state_dict()), dict(vars(criterion))
    z, target, z_mixed = draw_rows(3)
    whole(z, target, z_mixed, MIXED)
    assert list(whole.state_dict()) == names
    assert list(vars(criterion)) == list(held)
    assert all(vars(criterion)[name] is value for name, value in held.items())


def test_a_frozen_teacher_inside_the_criterion_is_lent() -> None:
    class Distilling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(C, C).requires_grad_(False)

        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            for parameter in self.teacher.parameters():
                parameter.data.mul_(0.9).add_(target.mean())
            return measure_distance(z, self.teacher(target))

    criterion = Distilling()
    own, other, once = (copy.deepcopy(criterion) for _ in range(3))
    z, target, z_mixed = draw_rows(3)
    loss = LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    mixed = MIXED.lam * own(z_mixed, target) + (1 - MIXED.lam) * other(z_mixed, target[PARTNER])
    torch.testing.assert_close(loss, once(z, target).mean() + mixed.mean())
    assert all(map(torch.equal, criterion.parameters(), once.parameters()))
    assert all(isinstance(p, nn.Parameter) for p in criterion.parameters())


def test_a_trainer_that_is_held_through_a_weak_proxy_is_lent() -> None:
    """As Lightning's trainer is by its parts."""
    module = Plain(count, calls=0)
    proxy = weakref.proxy(module)
    whole = LambdaWeightedLoss(lambda z, target: proxy(z, target))
    z, target, z_mixed = draw_rows(3)
    whole(z, target, z_mixed, MIXED)
    assert module.calls == 1


def test_a_property_may_cover_a_slot() -> None:
    class Slotted:
        __slots__ = ("bank",)

    class Covered(Slotted):
        calls = 0

        @property
        def bank(self) -> int:
            return len(vars(self))

        def __call__(self, z: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return measure_distance(z, target) * (self.bank + self.calls)

    criterion = Covered()
    z, target, z_mixed = draw_rows(3)
    LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    assert criterion.calls == 1


def test_views_that_a_closure_and_a_global_share_stay_shared() -> None:
    """Two functions enclose the same bank, of which a third holds a view."""
    bank = torch.zeros(K, C)
    rows = [bank[:2]]

    def write(target: Tensor) -> None:
        bank.add_(target.mean())

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        write(target)
        return measure_distance(z, target) * (bank.sum() + rows[0].sum()).exp()

    def once(z: Tensor, target: Tensor) -> Tensor:
        filled = target.mean() * (bank.numel() + rows[0].numel())
        return measure_distance(z, target) * filled.exp()

    _, target, z_mixed = draw_rows(3)
    ours = LambdaWeightedLoss(criterion).mixed_loss(z_mixed, target, MIXED)
    torch.testing.assert_close(ours, lambda_weighted_loss(once, z_mixed, target, MIXED))
    assert not bank.any()


def test_two_tensors_without_memory_share_none() -> None:
    """Both grow during the call, each on its own."""

    def grow(module: Any) -> None:
        for bank in (module.one, module.other):
            bank.resize_(bank.numel() + 2).fill_(float(bank is module.one))

    module = Plain(grow, one=torch.empty(0), other=torch.empty(0))
    once = copy.deepcopy(module)
    _, target, z_mixed = draw_rows(3)
    expected = (SHARED.lam * once(z_mixed, target)).mean()
    ours = LambdaWeightedLoss(module, switch=False).mixed_loss(z_mixed, target, SHARED)
    torch.testing.assert_close(ours, expected)
    assert module.one.numel() == module.other.numel() == 0  # type: ignore[operator]
