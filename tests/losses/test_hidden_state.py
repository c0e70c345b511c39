"""State outside of buffers, and what is no state."""

from __future__ import annotations

import copy
import functools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from buffered import (
    MIXED,
    PARTNER,
    SHARED,
    Bank,
    C,
    Center,
    K,
    draw_leaves,
    draw_rows,
    measure_distance,
)
from hidden import (
    REMOTE,
    Helper,
    Plain,
    Wrapped,
    add_one,
    count,
    enqueue,
    hidden,
    make_classwide,
    prepare,
    reset_module,
)
from torch import Tensor, nn

from mixmask import LambdaWeightedLoss, lambda_weighted_loss
from mixmask.losses import DINO, BarlowTwins, InfoNCE, MatchedBarlowTwins, NTXent, VICReg


@hidden
@pytest.mark.parametrize("switch", [True, False])
def test_state_outside_of_buffers_is_lent_as_buffers_are(
    make: Callable[[], Any], switch: bool
) -> None:
    """The whole step, and the call after it, against instances that each were called once."""
    z, target, z_mixed = draw_leaves(3)
    other = target[PARTNER].detach()
    expected = (MIXED.lam * make()(z_mixed, target)).mean()
    if switch:
        expected = expected + ((1 - MIXED.lam) * make()(z_mixed, other)).mean()
    once = make()
    mixed_term, expected = expected, expected + once(z, target).mean()
    after = once(z, target).mean()

    whole = LambdaWeightedLoss(make(), switch=switch)
    for _ in range(2):
        torch.testing.assert_close(whole.mixed_loss(z_mixed, target, MIXED), mixed_term)
    loss = whole(z, target, z_mixed, MIXED)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(whole(z, target), after)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (z, z_mixed)), torch.autograd.grad(expected, (z, z_mixed))
    )
    # It is state at all: a second call gives another loss.
    assert not torch.isclose(make()(z, target).mean(), after)


@hidden
def test_state_of_what_a_module_holds_is_lent(make: Callable[[], Any]) -> None:
    z, target, z_mixed = draw_rows(3)
    once = make()
    once(z, target)
    after = once(z, target).mean()
    whole = LambdaWeightedLoss(Wrapped(make()))
    whole(z, target, z_mixed, MIXED)
    whole.mixed_loss(z_mixed, target, MIXED)
    torch.testing.assert_close(whole(z, target), after)


@hidden
def test_an_error_in_a_mixed_term_undoes_what_was_done(make: Callable[[], Any]) -> None:
    z, target, z_mixed = draw_rows(3)
    expected = make()(z, target).mean()
    whole = LambdaWeightedLoss(make())
    with pytest.raises(ValueError, match="one row for each"):
        whole(z, target, [z_mixed, z_mixed[:3]], [MIXED, MIXED])
    torch.testing.assert_close(whole(z, target), expected)


def test_state_that_begins_later_is_lent_then() -> None:
    module = Plain(lambda m: enqueue(m) if m.active else None, queue=[], active=False)
    whole = LambdaWeightedLoss(module)
    z, target, z_mixed = draw_rows(3)
    whole(z, target, z_mixed, MIXED)
    module.active = True  # type: ignore[assignment]
    for steps in range(1, 4):
        whole(z, target, z_mixed, MIXED)
        assert len(module.queue) == steps  # type: ignore[arg-type]


def test_what_is_shared_by_attributes_stays_shared() -> None:
    shared = torch.zeros(3)
    module = Plain(lambda m: add_one(m.one), one=shared, others=[shared])
    once = copy.deepcopy(module)
    _, target, z_mixed = draw_rows(3)
    expected = (MIXED.lam * once(z_mixed, target)).mean()
    ours = LambdaWeightedLoss(module, switch=False).mixed_loss(z_mixed, target, MIXED)
    torch.testing.assert_close(ours, expected)
    assert module.one is module.others[0]  # type: ignore[index]
    assert not shared.any()


def test_what_lies_deep_is_lent_where_it_also_lies_near() -> None:
    helper = Helper()
    module = Plain(lambda m: enqueue(m.near), deep={"a": {"b": helper}}, near=helper)
    z, target, z_mixed = draw_rows(3)
    LambdaWeightedLoss(module)(z, target, z_mixed, MIXED)
    assert len(helper.queue) == 1


def test_gradients_reach_what_a_criterion_holds_but_does_not_own() -> None:
    """A parameter, a leaf and a computed tensor, all in a closure."""
    weight, scale = nn.Parameter(torch.ones(C)), torch.ones((), requires_grad=True)
    computed = weight * 2

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        return measure_distance(z * computed * weight, target) * scale

    z, target, z_mixed = draw_rows(3)
    leaves = (weight, scale)
    ours = torch.autograd.grad(
        LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED), leaves, retain_graph=True
    )
    plain = criterion(z, target).mean() + lambda_weighted_loss(criterion, z_mixed, target, MIXED)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, leaves))


def test_without_a_mixed_view_state_is_nobodys_business() -> None:
    module = Plain(lambda m: m.queue.append(1), queue=[])
    z, target = draw_rows(2)
    LambdaWeightedLoss(module)(z, target)
    assert module.queue == [1]


@pytest.mark.parametrize(
    "make, ignore, read",
    [
        (prepare(Plain, count, calls=0), ("calls",), lambda m: m.calls),
        (prepare(Plain, lambda m: _count_helper(m), helper=Helper()), ["helper.count"], None),
        (prepare(Plain, lambda m: _count_helper(m), helper=Helper()), ["count"], None),
        (prepare(Plain, lambda m: _count_helper(m), helper=Helper()), ["helper"], None),
        (prepare(Plain, enqueue, queue=deque()), ("queue",), lambda m: len(m.queue)),
        (prepare(Plain, lambda m: setattr(m, "late", getattr(m, "late", 0) + 1)), ("late",), None),
    ],
)
def test_what_is_to_be_ignored_is_used_as_it_is(
    make: Callable[[], Any], ignore: Any, read: Callable[[Any], int] | None
) -> None:
    module = make()
    z, target, z_mixed = draw_rows(3)
    LambdaWeightedLoss(module, ignore=ignore)(z, target, z_mixed, MIXED)
    read = read or (lambda m: getattr(m, "late", None) or m.helper.count)
    assert read(module) == 3


@pytest.mark.parametrize(
    "make, read",
    [(make_classwide, type), (reset_module, lambda _: REMOTE)],
    ids=["class", "imported module"],
)
def test_attributes_of_classes_and_of_imported_modules_are_used_as_they_are(
    make: Callable[[], Any], read: Callable[[Any], Any]
) -> None:
    criterion = make()
    z, target, z_mixed = draw_rows(3)
    bank = read(criterion).bank
    LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    assert read(criterion).calls == 3
    assert read(criterion).bank is bank
    torch.testing.assert_close(bank[: len(z)], 2 * target + target[PARTNER])


def _count_helper(module: Any) -> None:
    module.helper.count += 1


def test_ignoring_one_name_ignores_no_other() -> None:
    def change(module: Any) -> None:
        module.calls += 1
        module.recalls += 1

    module = Plain(change, calls=0, recalls=0)
    z, target, z_mixed = draw_rows(3)
    LambdaWeightedLoss(module, ignore=("calls",))(z, target, z_mixed, MIXED)
    assert [vars(module)[name] for name in ("calls", "recalls")] == [3, 1]


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.generator = torch.Generator().manual_seed(0)
        self.options = {"sizes": [1, 2], "name": "a"}
        self.weights = torch.full((3,), torch.nan)
        self.missing = float("nan")

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        noise = torch.rand(z.shape, generator=self.generator)
        return measure_distance(self.dropout(z + noise), target)


class Drawing:
    def __init__(self) -> None:
        self.rng = random.Random(0)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        return measure_distance(z, target) * (1 + self.rng.random())


STATELESS: dict[str, Callable[[], Any]] = {
    "function": lambda: measure_distance,
    "lambda": lambda: lambda z, target: measure_distance(z, target),
    "partial": lambda: functools.partial(measure_distance),
    "torch's function": lambda: functools.partial(F.huber_loss, delta=0.5),
    "torch's module": nn.SmoothL1Loss,
    "closure around a layer": lambda: _predicting(nn.Linear(C, C)),
    "dropout, generator, NaN": Dropping,
    "random.Random": Drawing,
    "InfoNCE": lambda: InfoNCE(torch.randn(K, C)),
    "InfoNCE in batch": InfoNCE,
    "NTXent": NTXent,
    "DINO": lambda: DINO(torch.zeros(C)),
    "BarlowTwins": BarlowTwins,
    "MatchedBarlowTwins": MatchedBarlowTwins,
    "VICReg": VICReg,
}


def _predicting(layer: nn.Module) -> Callable[..., Tensor]:
    return lambda z, target: measure_distance(layer(z), target)


@pytest.mark.parametrize("make", STATELESS.values(), ids=STATELESS)
def test_criteria_without_state_raise_no_alarm(make: Callable[[], Any]) -> None:
    whole = LambdaWeightedLoss(make())
    for _ in range(3):
        z, target, z_mixed = draw_leaves(3)
        torch.autograd.backward(whole(z, target, z_mixed, SHARED))
        assert z_mixed.grad is not None


def _count_copies(
    whole: LambdaWeightedLoss, inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Count the tensors and storages that a step copies."""
    copies = 0

    def count(clone: Callable[..., Any], *args: Any) -> Any:
        nonlocal copies
        copies += 1
        return clone(*args)

    with monkeypatch.context() as patch:
        for kind in (Tensor, torch.UntypedStorage):
            method = functools.partialmethod(functools.partial(count, kind.clone))
            patch.setattr(kind, "clone", method)
        whole(*inputs)
    return copies


@pytest.mark.parametrize(
    "name", ["function", "partial", "torch's module", "InfoNCE", "InfoNCE in batch", "DINO"]
)
def test_a_criterion_without_state_is_not_copied(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that the criterion was given is not its state: it is read, not written."""
    z, target, z_mixed = draw_rows(3)
    inputs = z, target, z_mixed, SHARED
    assert _count_copies(LambdaWeightedLoss(STATELESS[name]()), inputs, monkeypatch) == 0
    # Bank and pointer, once for each of the two mixed terms.
    assert _count_copies(LambdaWeightedLoss(Bank()), inputs, monkeypatch) == 4


def test_parameters_may_be_trained_between_calls_but_not_within() -> None:
    criterion = Center()
    whole = LambdaWeightedLoss(criterion)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    z, target, z_mixed = draw_rows(3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(whole(z, target, z_mixed, MIXED))
        optimizer.step()

    class Training(Center):
        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                self.temperature.add_(1)
            return super().forward(z, target)

    training = Training()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    with pytest.raises(ValueError, match=r"'temperature' changed during a call.* once per step"):
        LambdaWeightedLoss(training)(z, target, z_mixed, MIXED)
    # Refused before anything has moved.
    assert all(torch.equal(before[name], value) for name, value in training.state_dict().items())


@pytest.mark.parametrize("rebinds", [True, False])
def test_what_is_trained_must_not_be_written_through_data_either(rebinds: bool) -> None:
    class Queue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queue = nn.Parameter(torch.tensor([[1.0] * C, [torch.nan] * C]))

        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            if active:
                new = target[:1].detach()
                if rebinds:
                    self.queue.data = torch.cat([self.queue.data, new])
                else:
                    self.queue.data[:1] = new
            return measure_distance(z, target) * self.queue[0].sum()

    active = False
    z, target, z_mixed = draw_rows(3)
    LambdaWeightedLoss(Queue())(z, target, z_mixed, MIXED)
    active, criterion = True, Queue()
    before, place = criterion.queue.detach().clone(), criterion.queue.data_ptr()
    with pytest.raises(ValueError, match=r"'queue' changed during a call"):
        LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    torch.testing.assert_close(criterion.queue.detach(), before, equal_nan=True)
    assert criterion.queue.data_ptr() == place
