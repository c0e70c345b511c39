from __future__ import annotations

import copy
import enum
import functools
import pickle
import random
import types
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask import LambdaWeightedLoss, MixedBatch, lambda_weighted_loss
from mixmask.losses import DINO, BarlowTwins, InfoNCE, MatchedBarlowTwins, NTXent, VICReg

N, C, K = 6, 4, 12
PARTNER = torch.tensor([2, 0, 1, 5, 3, 3])
MIXED = MixedBatch(torch.empty(N, 1, 1, 1), torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8, 0.9]), PARTNER)
SHARED = MixedBatch(torch.empty(N, 1, 1, 1), torch.tensor(0.3), PARTNER.flip(0))


def _loss(z: Tensor, target: Tensor) -> Tensor:
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
        return ((z @ bank.T) ** 2).mean(dim=1) + _loss(z, target)


class Lazy(nn.Module):
    """A buffer that is not even registered before the first call."""

    bank: Tensor

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        if "bank" not in dict(self.named_buffers()):
            self.register_buffer("bank", torch.zeros(1, C))
        loss = ((z @ self.bank.T) ** 2).mean(dim=1) + _loss(z, target)
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
        return _loss(self.predictor(z), target)


STATEFUL: dict[str, type[nn.Module]] = {
    module.__name__: module
    for module in (Bank, Center, DataCenter, Late, Lazy, Nested, Tied, Normalising)
}
stateful = pytest.mark.parametrize("kind", STATEFUL.values(), ids=STATEFUL)


def _rows(count: int) -> tuple[Tensor, ...]:
    return torch.randn(count, N, C).unbind()


def _leaves(count: int) -> tuple[Tensor, ...]:
    return tuple(rows.clone().requires_grad_() for rows in _rows(count))


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """All buffers by name, also those that are None and those that are shared."""
    return {
        f"{prefix}.{name}": None if buffer is None else buffer.detach().clone()
        for prefix, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
    }


def _equal(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> bool:
    return ours.keys() == theirs.keys() and all(
        b is None if a is None else b is not None and torch.equal(a, b)
        for a, b in zip(ours.values(), (theirs[name] for name in ours), strict=True)
    )


def _slowly(
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
        z, target, *z_mixed = _leaves(2 + views)
        records = [MIXED, SHARED, MIXED][:views]
        pairs = list(zip(z_mixed, records, strict=True))
        loss = whole(z, target, z_mixed, records)
        slow = _slowly(before, z, target, pairs, switch=switch)
        torch.testing.assert_close(loss, slow, rtol=1e-6, atol=1e-6)
        once(z, target)
        assert _equal(_buffers(criterion), _buffers(once))

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
    z, target, z_mixed = _rows(3)
    naive = criterion(z, target).mean() + lambda_weighted_loss(criterion, z_mixed, target, MIXED)
    once(z, target)
    assert not _equal(_buffers(criterion), _buffers(once))
    slow = _slowly(before, z, target, [(z_mixed, MIXED)])
    assert (naive - slow).detach().abs() > 1e-3


def test_three_plain_calls_may_have_no_gradient_at_all() -> None:
    """The second call writes into what autograd kept of the first; ours keeps copies."""
    criterion = Bank()
    z, target, z_mixed = _leaves(3)
    naive = criterion(z, target).mean() + lambda_weighted_loss(criterion, z_mixed, target, MIXED)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(naive)
    torch.autograd.backward(LambdaWeightedLoss(Bank())(z, target, z_mixed, MIXED))


@stateful
def test_the_mixed_loss_leaves_the_state_alone(kind: type[nn.Module]) -> None:
    whole = LambdaWeightedLoss(kind())
    criterion = whole.criterion
    assert isinstance(criterion, nn.Module)
    z, target, z_mixed = _rows(3)
    other = copy.deepcopy(whole)
    before = _buffers(criterion)
    tensors = list(criterion.buffers())
    mixed_terms = whole.mixed_loss([z_mixed, z], target, [MIXED, SHARED])
    assert _equal(_buffers(criterion), before)
    assert all(map(torch.Tensor.is_set_to, criterion.buffers(), tensors))
    total = mixed_terms + whole(z, target)
    torch.testing.assert_close(total, other(z, target, [z_mixed, z], [MIXED, SHARED]))
    assert isinstance(other.criterion, nn.Module)
    assert _equal(_buffers(criterion), _buffers(other.criterion))


def test_tied_buffers_stay_tied() -> None:
    criterion = Tied()
    z, target, z_mixed = _rows(3)
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
    z, target, z_mixed = _rows(3)
    fatal = target[0] if call == 1 else target[PARTNER][0]
    before, tensors = _buffers(criterion), list(criterion.buffers())
    with pytest.raises(RuntimeError, match="out of memory"):
        LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    assert _equal(_buffers(criterion), before)
    assert [id(buffer) for buffer in criterion.buffers()] == [id(buffer) for buffer in tensors]


def test_sizes_are_checked_before_the_state_moves() -> None:
    criterion = Bank()
    whole = LambdaWeightedLoss(criterion)
    z, target, z_mixed = _rows(3)
    before = _buffers(criterion)
    for arguments in (
        (z[:3], target, z_mixed, MIXED),
        (z, target, z_mixed[:3], MIXED),
        (z, target, [z_mixed, z_mixed[:3]], [MIXED, MIXED]),
    ):
        with pytest.raises(ValueError, match=rf"one row for each of the {N} mixed images"):
            whole(*arguments)
    assert _equal(_buffers(criterion), before)


def test_a_learned_temperature_gets_the_gradient_of_all_terms() -> None:
    criterion = Center()
    before = copy.deepcopy(criterion)
    z, target, z_mixed = _rows(3)
    torch.autograd.backward(LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED))
    torch.autograd.backward(_slowly(before, z, target, [(z_mixed, MIXED)]))
    torch.testing.assert_close(criterion.temperature.grad, before.temperature.grad)
    assert list(LambdaWeightedLoss(criterion).parameters()) == [criterion.temperature]


def test_the_state_is_saved_with_the_module() -> None:
    ours, other = LambdaWeightedLoss(Nested()), LambdaWeightedLoss(Nested())
    z, target, z_mixed = _rows(3)
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
    z, target, z_mixed = _rows(3)
    ours(z, target, z_mixed, MIXED)
    other = copied(ours)
    expected = _buffers(other)
    first = ours(z, target, z_mixed, MIXED)
    assert _equal(_buffers(other), expected)
    assert torch.equal(first, other(z, target, z_mixed, MIXED))


@pytest.mark.parametrize("kind", [Nested, Tied])
def test_a_step_with_state_compiles_in_one_graph(kind: type[nn.Module]) -> None:
    ours = LambdaWeightedLoss(kind())
    other = copy.deepcopy(ours)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        z, target, z_mixed = _leaves(3)
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
    z, target, z_mixed = _rows(3)
    LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    once(z, target)
    assert _equal(_buffers(criterion), _buffers(once))


# State outside of buffers.


def _measure(value: Any) -> Any:
    """One number that depends on everything a value holds."""
    if isinstance(value, Tensor):
        return value.detach().sum() + value.numel()
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, list | tuple | set | deque):
        return len(value) + sum(map(_measure, value))
    if isinstance(value, dict):
        return len(value) + sum(map(_measure, value.values()))
    if isinstance(value, np.ndarray):
        return float(value.sum())
    return _measure(vars(value)) if isinstance(value, Helper | Plain) else 0.0


class Plain(nn.Module):
    """A module whose attributes a function changes, and whose loss depends on them."""

    def __init__(self, change: Callable[[Any], Any], **attributes: Any) -> None:
        super().__init__()
        self.names = tuple(attributes)
        vars(self).update(attributes)
        self.change = change

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        self.change(self)
        held = {name: getattr(self, name, None) for name in (*self.names, "late")}
        loss: Tensor = _loss(z, target) * (1 + _measure(held) / 8)
        return loss


class Object:
    """The same without nn.Module."""

    def __init__(self, change: Callable[[Any], Any], **attributes: Any) -> None:
        vars(self).update(attributes)
        self.change = change

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        self.change(self)
        loss: Tensor = _loss(z, target) * (1 + _measure(vars(self)) / 8)
        return loss


@dataclass(frozen=True, slots=True)
class Frozen:
    bank: Tensor

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        self.bank.add_(1)
        loss: Tensor = _loss(z, target) * _measure(self.bank)
        return loss


class Private:
    __slots__ = ("__bank",)

    def __init__(self) -> None:
        self.__bank = torch.zeros(K, C)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        self.__bank = self.__bank + 1
        return _banked(self.__bank, z, target)


class Rows(NamedTuple):
    rows: Tensor


class Helper:
    def __init__(self) -> None:
        self.queue: list[Tensor] = []
        self.count = 0


class Memory(nn.Module):
    """A ring as pytorch-metric-learning keeps it: buffers, an int, a bool and indices of now."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(9, C))
        self.index, self.filled = 0, False

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        self.current = (self.index + torch.arange(len(z))) % len(self.bank)
        self.bank[self.current] = target.detach()
        before, self.index = self.index, (self.index + len(z)) % len(self.bank)
        self.filled = self.filled or self.index <= before
        bank = (self.bank if self.filled else self.bank[: self.index]).clone()
        return _loss(z, target) + (z @ bank.T).logsumexp(dim=1)


def _made(
    kind: Callable[..., Any], change: Callable[[Any], Any], **attributes: Any
) -> Callable[[], Any]:
    return lambda: kind(change, **copy.deepcopy(attributes))


def _counted_by_closure() -> Callable[..., Tensor]:
    count = 0

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return _loss(z, target) * count

    return criterion


def _around(make: Callable[[], Any]) -> Callable[[], Callable[..., Tensor]]:
    def build() -> Callable[..., Tensor]:
        module = make()
        return lambda z, target: module(z, target)

    return build


def _banked(bank: Tensor, z: Tensor, target: Tensor) -> Tensor:
    bank[: len(z)] += target.detach()
    loss: Tensor = _loss(z, target) * bank.sum().exp()
    return loss


def _with_default(z: Tensor, target: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(len(z))
    return _loss(z, target) * len(seen)


def _with_keyword(z: Tensor, target: Tensor, *, calls: list[int] = []) -> Tensor:  # noqa: B006
    calls.append(len(z))
    return _loss(z, target) * len(calls)


def _with_attribute() -> Callable[..., Tensor]:
    def criterion(z: Tensor, target: Tensor) -> Tensor:
        criterion.calls += 1  # type: ignore[attr-defined]
        return _loss(z, target) * criterion.calls  # type: ignore[attr-defined, no-any-return]

    criterion.calls = 0  # type: ignore[attr-defined]
    return criterion


GLOBAL_BANK, GLOBAL_COUNT, GLOBAL_MODULE = torch.zeros(K, C), 0, Memory()


def _with_globals(z: Tensor, target: Tensor) -> Tensor:
    global GLOBAL_COUNT
    GLOBAL_COUNT += 1
    loss: Tensor = GLOBAL_COUNT * _banked(GLOBAL_BANK, z, target) + GLOBAL_MODULE(z, target)
    return loss


def _reset_globals() -> Callable[..., Tensor]:
    global GLOBAL_BANK, GLOBAL_COUNT, GLOBAL_MODULE
    GLOBAL_BANK, GLOBAL_COUNT, GLOBAL_MODULE = torch.zeros(K, C), 0, Memory()
    return _with_globals


class _Method:
    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        return self.contrast(z, target)

    def contrast(self, z: Tensor, target: Tensor) -> Tensor:
        global GLOBAL_COUNT
        GLOBAL_COUNT += 1
        return GLOBAL_COUNT * _banked(GLOBAL_BANK, z, target)


class _Forward(nn.Module):
    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return self.loss + _Method.contrast(self, z, target)  # type: ignore[arg-type]

    @property
    def loss(self) -> Tensor:
        global GLOBAL_COUNT
        GLOBAL_COUNT += 1
        return torch.ones(N) * GLOBAL_COUNT


def _with_nested(z: Tensor, target: Tensor) -> Tensor:
    def contrast() -> Tensor:
        global GLOBAL_COUNT
        GLOBAL_COUNT += 1
        return GLOBAL_COUNT * _banked(GLOBAL_BANK, z, target)

    return contrast()


def _using_globals(make: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> Any:
        _reset_globals()
        return make()

    return build


class Mode(enum.Enum):
    """A class that refuses to be written to."""

    ON = "on"


def _with_class_attributes(base: type, *, rebinds: bool) -> Callable[[], Any]:
    def build() -> Any:
        class Classwide(base):  # type: ignore[misc]
            bank, calls = torch.zeros(K, C), 0

            def __call__(self, z: Tensor, target: Tensor) -> Tensor:
                kind = type(self)
                if rebinds and Mode.ON is Mode("on"):
                    kind.bank, kind.calls = kind.bank + 1, kind.calls + 1
                return _banked(self.bank, z, target) * (1 + self.calls)

        return Classwide()

    return build


REMOTE: Any = types.ModuleType("remote")


def _with_a_modules_attributes(z: Tensor, target: Tensor) -> Tensor:
    REMOTE.calls += 1
    loss: Tensor = REMOTE.calls * _banked(REMOTE.bank, z, target)
    return loss


def _reset_module() -> Callable[..., Tensor]:
    REMOTE.calls, REMOTE.bank = 0, torch.zeros(K, C)
    return _with_a_modules_attributes


class View(nn.Module):
    """What is written through an attribute is read from the buffer."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(2, K, C))
        self.oldest = self.bank[1].T

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        self.oldest += target.detach().mean(dim=0)[:, None]
        loss: Tensor = _loss(z, target) * self.bank.sum().exp()
        return loss


def _nest(value: Any, depth: int) -> Any:
    for _ in range(depth):
        helper: Any = Helper()
        helper.inner = value
        value = helper
    return value


def _reset_default() -> Callable[..., Tensor]:
    _with_default.__defaults__ = ([],)
    return _with_default


def _reset_keyword() -> Callable[..., Tensor]:
    _with_keyword.__kwdefaults__ = {"calls": []}
    return _with_keyword


def _in_place(tensor: Tensor) -> Tensor:
    return tensor.add_(1)


def _through_data(tensor: Tensor) -> Tensor:
    return tensor.data.add_(1)


def _count(owner: Any) -> None:
    owner.calls += 1


def _enqueue(owner: Any) -> None:
    owner.queue.append(torch.ones(3))


TENSOR = torch.zeros(3)
HIDDEN: dict[str, Callable[[], Any]] = {
    "pointer, flag and ring": Memory,
    "tensor in place": _made(Plain, lambda m: _in_place(m.bank), bank=TENSOR),
    "tensor through data": _made(Plain, lambda m: _through_data(m.bank), bank=TENSOR),
    "tensor rebound": _made(Plain, lambda m: setattr(m, "bank", m.bank + 1), bank=TENSOR),
    "tensor that appears": _made(Plain, lambda m: setattr(m, "late", getattr(m, "late", 0) + 1)),
    "tensor resized": _made(Plain, lambda m: m.bank.resize_(m.bank.numel() - 1), bank=TENSOR),
    "counter": _made(Plain, _count, calls=0),
    "None at first": _made(Plain, lambda m: setattr(m, "mean", (m.mean or 0) + 1.5), mean=None),
    "flag": _made(Plain, lambda m: setattr(m, "ready", not m.ready), ready=False),
    "list": _made(Plain, _enqueue, queue=[]),
    "deque": _made(Plain, _enqueue, queue=deque([TENSOR], 2)),
    "tensor in a dict": _made(Plain, lambda m: _in_place(m.banks["a"]), banks={"a": TENSOR}),
    "tensor in a tuple": _made(Plain, lambda m: _in_place(m.banks[0]), banks=(TENSOR,)),
    "dict": _made(Plain, lambda m: m.seen.update({len(m.seen): 2}), seen={"a": 1}),
    "dict at first empty": _made(Plain, lambda m: m.seen.update({len(m.seen): 2}), seen={}),
    "set": _made(Plain, lambda m: m.seen.add(len(m.seen)), seen={0}),
    "array": _made(Plain, lambda m: m.bank.__iadd__(1), bank=np.zeros(3)),
    "object": _made(
        Plain, lambda m: setattr(m.helper, "count", m.helper.count + 1), helper=Helper()
    ),
    "list of an object": _made(Plain, lambda m: _enqueue(m.helper), helper=Helper()),
    "submodule": lambda: nn.Sequential(Wrapped(Plain(_count, calls=0)), nn.Identity())[0],
    "plain object": _made(Object, _count, calls=0),
    "plain object's tensor": _made(Object, lambda o: _in_place(o.bank), bank=TENSOR),
    "plain object's module": _made(Object, lambda o: _count(o.inner), inner=Plain(_count, calls=0)),
    "frozen object with slots": lambda: Frozen(torch.ones(3)),
    "nonlocal": _counted_by_closure,
    "closure around a module": _around(Memory),
    "closure around an object": _around(_made(Object, _enqueue, queue=[])),
    "partial of a tensor": lambda: functools.partial(_banked, torch.zeros(K, C)),
    "partial of a method": lambda: functools.partial(Memory().forward),
    "bound method": lambda: Memory().forward,
    "globals": _reset_globals,
    "attributes of a module": _reset_module,
    "view of a buffer": View,
    "globals of a method": _using_globals(_Method),
    "globals of a bound method": _using_globals(lambda: _Method().contrast),
    "globals of forward and a property": _using_globals(_Forward),
    "globals of a nested function": _using_globals(lambda: _with_nested),
    "attribute of a class": _with_class_attributes(object, rebinds=False),
    "attribute of a class, rebound": _with_class_attributes(object, rebinds=True),
    "attribute of a module's class": _with_class_attributes(nn.Module, rebinds=True),
    "objects in objects": _made(
        Plain, lambda m: _enqueue(m.a.inner.inner.inner.inner), a=_nest(Helper(), 4)
    ),
    "containers in containers": _made(
        Plain, lambda m: m.a["b"]["c"][0]["d"].append(1), a={"b": {"c": [{"d": []}]}}
    ),
    "named tuple": _made(Plain, lambda m: _in_place(m.bank.rows), bank=Rows(TENSOR)),
    "private slot": Private,
    "default": _reset_default,
    "keyword's default": _reset_keyword,
    "function's attribute": _with_attribute,
}


class Wrapped(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.inner(z, target)
        return loss


hidden = pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)


@hidden
@pytest.mark.parametrize("switch", [True, False])
def test_state_outside_of_buffers_is_lent_as_buffers_are(
    make: Callable[[], Any], switch: bool
) -> None:
    """The whole step, and the call after it, against instances that each were called once."""
    z, target, z_mixed = _leaves(3)
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
    z, target, z_mixed = _rows(3)
    once = make()
    once(z, target)
    after = once(z, target).mean()
    whole = LambdaWeightedLoss(Wrapped(make()))
    whole(z, target, z_mixed, MIXED)
    whole.mixed_loss(z_mixed, target, MIXED)
    torch.testing.assert_close(whole(z, target), after)


@hidden
def test_an_error_in_a_mixed_term_undoes_what_was_done(make: Callable[[], Any]) -> None:
    z, target, z_mixed = _rows(3)
    expected = make()(z, target).mean()
    whole = LambdaWeightedLoss(make())
    with pytest.raises(ValueError, match="one row for each"):
        whole(z, target, [z_mixed, z_mixed[:3]], [MIXED, MIXED])
    torch.testing.assert_close(whole(z, target), expected)


def test_state_that_begins_later_is_lent_then() -> None:
    module = Plain(lambda m: _enqueue(m) if m.active else None, queue=[], active=False)
    whole = LambdaWeightedLoss(module)
    z, target, z_mixed = _rows(3)
    whole(z, target, z_mixed, MIXED)
    module.active = True  # type: ignore[assignment]
    for steps in range(1, 4):
        whole(z, target, z_mixed, MIXED)
        assert len(module.queue) == steps  # type: ignore[arg-type]


def test_what_is_shared_by_attributes_stays_shared() -> None:
    shared = torch.zeros(3)
    module = Plain(lambda m: _in_place(m.one), one=shared, others=[shared])
    once = copy.deepcopy(module)
    _, target, z_mixed = _rows(3)
    expected = (MIXED.lam * once(z_mixed, target)).mean()
    ours = LambdaWeightedLoss(module, switch=False).mixed_loss(z_mixed, target, MIXED)
    torch.testing.assert_close(ours, expected)
    assert module.one is module.others[0]  # type: ignore[index]
    assert not shared.any()


def test_what_lies_deep_is_lent_where_it_also_lies_near() -> None:
    helper = Helper()
    module = Plain(lambda m: _enqueue(m.near), deep={"a": {"b": helper}}, near=helper)
    z, target, z_mixed = _rows(3)
    LambdaWeightedLoss(module)(z, target, z_mixed, MIXED)
    assert len(helper.queue) == 1


def test_gradients_reach_what_a_criterion_holds_but_does_not_own() -> None:
    """A parameter, a leaf and a computed tensor, all in a closure."""
    weight, scale = nn.Parameter(torch.ones(C)), torch.ones((), requires_grad=True)
    computed = weight * 2

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        return _loss(z * computed * weight, target) * scale

    z, target, z_mixed = _rows(3)
    leaves = (weight, scale)
    ours = torch.autograd.grad(
        LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED), leaves, retain_graph=True
    )
    plain = criterion(z, target).mean() + lambda_weighted_loss(criterion, z_mixed, target, MIXED)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, leaves))


def test_without_a_mixed_view_state_is_nobodys_business() -> None:
    module = Plain(lambda m: m.queue.append(1), queue=[])
    z, target = _rows(2)
    LambdaWeightedLoss(module)(z, target)
    assert module.queue == [1]


@pytest.mark.parametrize(
    "make, ignore, read",
    [
        (_made(Plain, _count, calls=0), ("calls",), lambda m: m.calls),
        (_made(Plain, lambda m: _count_helper(m), helper=Helper()), ["helper.count"], None),
        (_made(Plain, lambda m: _count_helper(m), helper=Helper()), ["count"], None),
        (_made(Plain, lambda m: _count_helper(m), helper=Helper()), ["helper"], None),
        (_made(Plain, _enqueue, queue=deque()), ("queue",), lambda m: len(m.queue)),
        (_made(Plain, lambda m: setattr(m, "late", getattr(m, "late", 0) + 1)), ("late",), None),
    ],
)
def test_what_is_to_be_ignored_is_used_as_it_is(
    make: Callable[[], Any], ignore: Any, read: Callable[[Any], int] | None
) -> None:
    module = make()
    z, target, z_mixed = _rows(3)
    LambdaWeightedLoss(module, ignore=ignore)(z, target, z_mixed, MIXED)
    read = read or (lambda m: getattr(m, "late", None) or m.helper.count)
    assert read(module) == 3


def _count_helper(module: Any) -> None:
    module.helper.count += 1


def test_ignoring_one_name_ignores_no_other() -> None:
    def change(module: Any) -> None:
        module.calls += 1
        module.recalls += 1

    module = Plain(change, calls=0, recalls=0)
    z, target, z_mixed = _rows(3)
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
        return _loss(self.dropout(z + noise), target)


class Drawing:
    def __init__(self) -> None:
        self.rng = random.Random(0)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        return _loss(z, target) * (1 + self.rng.random())


STATELESS: dict[str, Callable[[], Any]] = {
    "function": lambda: _loss,
    "lambda": lambda: lambda z, target: _loss(z, target),
    "partial": lambda: functools.partial(_loss),
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
    return lambda z, target: _loss(layer(z), target)


@pytest.mark.parametrize("make", STATELESS.values(), ids=STATELESS)
def test_criteria_without_state_raise_no_alarm(make: Callable[[], Any]) -> None:
    whole = LambdaWeightedLoss(make())
    for _ in range(3):
        z, target, z_mixed = _leaves(3)
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
    z, target, z_mixed = _rows(3)
    inputs = z, target, z_mixed, SHARED
    assert _count_copies(LambdaWeightedLoss(STATELESS[name]()), inputs, monkeypatch) == 0
    # Bank and pointer, once for each of the two mixed terms.
    assert _count_copies(LambdaWeightedLoss(Bank()), inputs, monkeypatch) == 4


def test_parameters_may_be_trained_between_calls_but_not_within() -> None:
    criterion = Center()
    whole = LambdaWeightedLoss(criterion)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    z, target, z_mixed = _rows(3)
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
            return _loss(z, target) * self.queue[0].sum()

    active = False
    z, target, z_mixed = _rows(3)
    LambdaWeightedLoss(Queue())(z, target, z_mixed, MIXED)
    active, criterion = True, Queue()
    before, place = criterion.queue.detach().clone(), criterion.queue.data_ptr()
    with pytest.raises(ValueError, match=r"'queue' changed during a call"):
        LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    torch.testing.assert_close(criterion.queue.detach(), before, equal_nan=True)
    assert criterion.queue.data_ptr() == place


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
            return _loss(self.student(z), target)

    criterion = Teaching()
    whole = LambdaWeightedLoss(criterion)
    names, held = list(whole.state_dict()), dict(vars(criterion))
    z, target, z_mixed = _rows(3)
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
            return _loss(z, self.teacher(target))

    criterion = Distilling()
    own, other, once = (copy.deepcopy(criterion) for _ in range(3))
    z, target, z_mixed = _rows(3)
    loss = LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    mixed = MIXED.lam * own(z_mixed, target) + (1 - MIXED.lam) * other(z_mixed, target[PARTNER])
    torch.testing.assert_close(loss, once(z, target).mean() + mixed.mean())
    assert all(map(torch.equal, criterion.parameters(), once.parameters()))
    assert all(isinstance(p, nn.Parameter) for p in criterion.parameters())


COMPILED = (
    "list",
    "tensor in a tuple",
    "tensor in a dict",
    "list of an object",
    "plain object's tensor",
    "nonlocal",
    "closure around a module",
    "bound method",
    "globals",
    "globals of forward and a property",
    "attribute of a class",
    "function's attribute",
    "partial of a tensor",
    "attributes of a module",
    "view of a buffer",
)


class FrozenQueue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queue = nn.Parameter(torch.zeros(K, C), requires_grad=False)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return _banked(self.queue.data, z, target)


@pytest.mark.parametrize("name", [*COMPILED, "frozen parameter"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_state_that_cannot_be_traced_is_lent_all_the_same(name: str) -> None:
    make = HIDDEN.get(name, FrozenQueue)
    z, target, z_mixed = _rows(3)
    ours = LambdaWeightedLoss(make())
    expected = [ours(z, target, z_mixed, MIXED).detach() for _ in range(3)]
    torch._dynamo.reset()
    compiled = torch.compile(LambdaWeightedLoss(make()), backend="eager")
    for wanted in expected:
        torch.testing.assert_close(compiled(z, target, z_mixed, MIXED).detach(), wanted)


@pytest.mark.parametrize(
    "name",
    [
        "list",
        "dict at first empty",
        "nonlocal",
        "globals",
        "partial of a tensor",
        "view of a buffer",
    ],
)
def test_a_single_graph_is_refused_where_state_cannot_be_traced(name: str) -> None:
    torch._dynamo.reset()
    whole = torch.compile(LambdaWeightedLoss(HIDDEN[name]()), backend="eager", fullgraph=True)
    z, target, z_mixed = _rows(3)
    with pytest.raises(Exception, match=r"keep its state in buffers, or compile without"):
        whole(z, target, z_mixed, MIXED)


TEMPERATURE = 0.5
IN_ONE_GRAPH: dict[str, Callable[[], Any]] = {
    "function": lambda: _loss,
    "constant of a module": lambda: lambda z, target: _loss(z, target) * TEMPERATURE,
    "constant in a closure": lambda: (lambda scale: lambda z, t: _loss(z, t) * scale)(0.25),
    "partial": lambda: functools.partial(F.smooth_l1_loss, beta=0.5),
    "InfoNCE": lambda: InfoNCE(torch.randn(K, C), reduction="none"),
    "module of torch": nn.PairwiseDistance,
    "buffers and a temperature": Center,
}


@pytest.mark.parametrize("make", IN_ONE_GRAPH.values(), ids=IN_ONE_GRAPH)
def test_what_holds_no_state_or_only_buffers_is_one_graph(make: Callable[[], Any]) -> None:
    criterion = make()
    z, target, z_mixed = _rows(3)
    expected = LambdaWeightedLoss(copy.deepcopy(criterion))(z, target, z_mixed, SHARED)
    torch._dynamo.reset()
    whole = torch.compile(LambdaWeightedLoss(criterion), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(z, target, z_mixed, SHARED), expected)


def test_a_trainer_that_is_held_through_a_weak_proxy_is_lent() -> None:
    """As Lightning's trainer is by its parts."""
    module = Plain(_count, calls=0)
    proxy = weakref.proxy(module)
    whole = LambdaWeightedLoss(lambda z, target: proxy(z, target))
    z, target, z_mixed = _rows(3)
    whole(z, target, z_mixed, MIXED)
    assert module.calls == 1


def test_two_tensors_without_memory_share_none() -> None:
    """Both grow during the call, each on its own."""

    def grow(module: Any) -> None:
        for bank in (module.one, module.other):
            bank.resize_(bank.numel() + 2).fill_(float(bank is module.one))

    module = Plain(grow, one=torch.empty(0), other=torch.empty(0))
    once = copy.deepcopy(module)
    _, target, z_mixed = _rows(3)
    expected = (SHARED.lam * once(z_mixed, target)).mean()
    ours = LambdaWeightedLoss(module, switch=False).mixed_loss(z_mixed, target, SHARED)
    torch.testing.assert_close(ours, expected)
    assert module.one.numel() == module.other.numel() == 0  # type: ignore[operator]
