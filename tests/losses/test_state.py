"""State in buffers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from buffered import (
    MIXED,
    PARTNER,
    SHARED,
    Bank,
    Center,
    DataCenter,
    Late,
    N,
    Nested,
    Tied,
    are_equal,
    copy_buffers,
    draw_leaves,
    draw_rows,
    stateful,
    step_slowly,
)
from torch import Tensor, nn

from mixmask import LambdaWeightedLoss, lambda_weighted_loss


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("views", [1, 3])
@stateful
def test_a_step_is_that_of_equation_4_and_moves_the_state_once(
    kind: type[nn.Module], views: int, switch: bool
) -> None:
    whole = LambdaWeightedLoss(kind(), switch=switch)
    criterion = whole.criterion
    assert isinstance(criterion, nn.Module)
    for _ in range(3):
        before, once = copy.deepcopy(criterion), copy.deepcopy(criterion)
        z, target, *z_mixed = draw_leaves(2 + views)
        records = [MIXED, SHARED, MIXED][:views]
        pairs = list(zip(z_mixed, records, strict=True))
        loss = whole(z, target, z_mixed, records)
        slow = step_slowly(before, z, target, pairs, switch=switch)
        torch.testing.assert_close(loss, slow, rtol=1e-6, atol=1e-6)
        once(z, target)
        assert are_equal(copy_buffers(criterion), copy_buffers(once))

        inputs = [z, target, *z_mixed]
        torch.testing.assert_close(
            torch.autograd.grad(loss, [*inputs, *criterion.parameters()]),
            torch.autograd.grad(slow, [*inputs, *before.parameters()]),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("kind", [Bank, Center, DataCenter, Late, Tied])
def test_three_plain_calls_see_each_others_state(kind: type[nn.Module]) -> None:
    """The trap that LambdaWeightedLoss is there for."""
    criterion = kind()
    before, once = copy.deepcopy(criterion), copy.deepcopy(criterion)
    z, target, z_mixed = draw_rows(3)
    naive = criterion(z, target).mean() + lambda_weighted_loss(criterion, z_mixed, target, MIXED)
    once(z, target)
    assert not are_equal(copy_buffers(criterion), copy_buffers(once))
    slow = step_slowly(before, z, target, [(z_mixed, MIXED)])
    assert (naive - slow).detach().abs() > 1e-3


def test_three_plain_calls_may_have_no_gradient_at_all() -> None:
    """The second call writes into what autograd kept of the first; ours keeps copies."""
    criterion = Bank()
    z, target, z_mixed = draw_leaves(3)
    naive = criterion(z, target).mean() + lambda_weighted_loss(criterion, z_mixed, target, MIXED)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(naive)
    torch.autograd.backward(LambdaWeightedLoss(Bank())(z, target, z_mixed, MIXED))


@stateful
def test_the_mixed_loss_leaves_the_state_alone(kind: type[nn.Module]) -> None:
    whole = LambdaWeightedLoss(kind())
    criterion = whole.criterion
    assert isinstance(criterion, nn.Module)
    z, target, z_mixed = draw_rows(3)
    other = copy.deepcopy(whole)
    before = copy_buffers(criterion)
    tensors = list(criterion.buffers())
    mixed_terms = whole.mixed_loss([z_mixed, z], target, [MIXED, SHARED])
    assert are_equal(copy_buffers(criterion), before)
    assert all(map(torch.Tensor.is_set_to, criterion.buffers(), tensors))
    total = mixed_terms + whole(z, target)
    torch.testing.assert_close(total, other(z, target, [z_mixed, z], [MIXED, SHARED]))
    assert isinstance(other.criterion, nn.Module)
    assert are_equal(copy_buffers(criterion), copy_buffers(other.criterion))


def test_tied_buffers_stay_tied() -> None:
    criterion = Tied()
    z, target, z_mixed = draw_rows(3)
    LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    assert criterion.writer.bank is criterion.reader.bank


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_in_a_mixed_term_leaves_the_state_alone(call: int) -> None:
    class Failing(Bank):
        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            loss = super().forward(z, target)
            if bool((target[0] == fatal).all()):
                raise RuntimeError("out of memory")
            return loss

    criterion = Failing()
    z, target, z_mixed = draw_rows(3)
    fatal = target[0] if call == 1 else target[PARTNER][0]
    before, tensors = copy_buffers(criterion), list(criterion.buffers())
    with pytest.raises(RuntimeError, match="out of memory"):
        LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    assert are_equal(copy_buffers(criterion), before)
    assert [id(buffer) for buffer in criterion.buffers()] == [id(buffer) for buffer in tensors]


def test_sizes_are_checked_before_the_state_moves() -> None:
    criterion = Bank()
    whole = LambdaWeightedLoss(criterion)
    z, target, z_mixed = draw_rows(3)
    before = copy_buffers(criterion)
    for arguments in (
        (z[:3], target, z_mixed, MIXED),
        (z, target, z_mixed[:3], MIXED),
        (z, target, [z_mixed, z_mixed[:3]], [MIXED, MIXED]),
    ):
        with pytest.raises(ValueError, match=rf"one row for each of the {N} mixed images"):
            whole(*arguments)
    assert are_equal(copy_buffers(criterion), before)


def test_a_learned_temperature_gets_the_gradient_of_all_terms() -> None:
    criterion = Center()
    before = copy.deepcopy(criterion)
    z, target, z_mixed = draw_rows(3)
    torch.autograd.backward(LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED))
    torch.autograd.backward(step_slowly(before, z, target, [(z_mixed, MIXED)]))
    torch.testing.assert_close(criterion.temperature.grad, before.temperature.grad)
    assert list(LambdaWeightedLoss(criterion).parameters()) == [criterion.temperature]


def test_the_state_is_saved_with_the_module() -> None:
    ours, other = LambdaWeightedLoss(Nested()), LambdaWeightedLoss(Nested())
    z, target, z_mixed = draw_rows(3)
    ours(z, target, z_mixed, MIXED)
    state = ours.state_dict()
    assert set(state) == {
        "criterion.parts.0.bank",
        "criterion.parts.0.pointer",
        "criterion.parts.1.deep.center",
        "criterion.parts.1.deep.temperature",
    }
    other.load_state_dict(state)
    assert torch.equal(ours(z, target, z_mixed, MIXED), other(z, target, z_mixed, MIXED))


@stateful
@pytest.mark.parametrize(
    "copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_copies_have_a_state_of_their_own(
    kind: type[nn.Module], copied: Callable[[Any], Any]
) -> None:
    ours = LambdaWeightedLoss(kind(), switch=False)
    z, target, z_mixed = draw_rows(3)
    ours(z, target, z_mixed, MIXED)
    other = copied(ours)
    expected = copy_buffers(other)
    first = ours(z, target, z_mixed, MIXED)
    assert are_equal(copy_buffers(other), expected)
    assert torch.equal(first, other(z, target, z_mixed, MIXED))


@pytest.mark.parametrize("kind", [Nested, Tied])
def test_a_step_with_state_compiles_in_one_graph(kind: type[nn.Module]) -> None:
    ours = LambdaWeightedLoss(kind())
    other = copy.deepcopy(ours)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        z, target, z_mixed = draw_leaves(3)
        expected, loss = ours(z, target, z_mixed, MIXED), compiled(z, target, z_mixed, MIXED)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (z, target, z_mixed)),
            torch.autograd.grad(expected, (z, target, z_mixed)),
        )
        for ours_now, other_now in zip(ours.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(ours_now, other_now)


def test_a_criterion_that_shares_may_hold_state_too() -> None:
    class Sharing(Bank):
        def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
            assert other is not None
            loss: Tensor = lam * self(z, target) + (1 - lam) * self(z, other)
            return loss

    criterion = Sharing()
    once = copy.deepcopy(criterion)
    z, target, z_mixed = draw_rows(3)
    LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    once(z, target)
    assert are_equal(copy_buffers(criterion), copy_buffers(once))
