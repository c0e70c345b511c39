from __future__ import annotations

import copy
import functools
import pickle
import random
from collections import deque
from collections.abc import Callable
from typing import Any

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


# What keeps its state where it cannot be lent.


class Plain(nn.Module):
    """A module with attributes, which a function given to it changes."""

    def __init__(self, change: Callable[[Any], Any], **attributes: Any) -> None:
        super().__init__()
        vars(self).update(attributes)
        self._change = staticmethod(change)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        self._change(self)
        return _loss(z, target)


class Helper:
    def __init__(self) -> None:
        self.queue: list[Tensor] = []
        self.count = 0


def _in_place(tensor: Tensor) -> Tensor:
    return tensor.add_(1)


def _through_data(tensor: Tensor) -> Tensor:
    return tensor.data.add_(1)


def _plain(change: Callable[[Any], Any], **attributes: Any) -> Callable[[], nn.Module]:
    return lambda: Plain(change, **copy.deepcopy(attributes))


def _counted_by_closure() -> Callable[..., Tensor]:
    count = 0

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return _loss(z, target)

    return criterion


def _around_a_module() -> Callable[..., Tensor]:
    module = Bank()
    return lambda z, target: module(z, target)


def _banked(bank: Tensor, z: Tensor, target: Tensor) -> Tensor:
    bank[: len(z)] = target.detach()
    return _loss(z, target)


def _with_default(z: Tensor, target: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(len(z))
    return _loss(z, target)


def _with_keyword(z: Tensor, target: Tensor, *, calls: list[int] = []) -> Tensor:  # noqa: B006
    calls.append(len(z))
    return _loss(z, target)


def _with_attribute() -> Callable[..., Tensor]:
    def criterion(z: Tensor, target: Tensor) -> Tensor:
        criterion.calls += 1  # type: ignore[attr-defined]
        return _loss(z, target)

    criterion.calls = 0  # type: ignore[attr-defined]
    return criterion


GLOBAL_BANK = torch.zeros(K, C)


def _with_a_global(z: Tensor, target: Tensor) -> Tensor:
    GLOBAL_BANK[: len(z)] = target.detach()
    return _loss(z, target)


TENSOR = torch.zeros(3)
HIDDEN: dict[str, tuple[Callable[[], Any], str]] = {
    "tensor in place": (_plain(lambda m: _in_place(m.bank), bank=TENSOR), "bank"),
    "tensor through data": (_plain(lambda m: _through_data(m.bank), bank=TENSOR), "bank"),
    "tensor rebound": (_plain(lambda m: setattr(m, "bank", m.bank + 1), bank=TENSOR), "bank"),
    "tensor that appears": (_plain(lambda m: setattr(m, "bank", TENSOR + 1)), "bank"),
    "tensor resized": (_plain(lambda m: m.bank.resize_(0), bank=TENSOR), "bank"),
    "counter": (_plain(lambda m: setattr(m, "calls", m.calls + 1), calls=0), "calls"),
    "list": (_plain(lambda m: m.queue.append(1), queue=[]), "queue.0"),
    "deque": (_plain(lambda m: m.queue.append(TENSOR), queue=deque(maxlen=3)), "queue.0"),
    "full deque": (
        _plain(lambda m: m.queue.append(TENSOR.clone()), queue=deque([TENSOR], 1)),
        "queue.0",
    ),
    "tensor in a dict": (_plain(lambda m: _in_place(m.banks["a"]), banks={"a": TENSOR}), "banks.a"),
    "dict": (_plain(lambda m: m.seen.update(b=2), seen={"a": 1}), "seen.b"),
    "object": (
        _plain(lambda m: setattr(m.helper, "count", m.helper.count + 1), helper=Helper()),
        "helper.count",
    ),
    "list of an object": (_plain(lambda m: m.helper.queue.append(1), helper=Helper()), "queue.0"),
    "submodule's attribute": (
        lambda: nn.Sequential(nn.Identity(), Plain(lambda m: setattr(m, "calls", 1), calls=0))[1],
        "calls",
    ),
    "nonlocal": (_counted_by_closure, "count"),
    "closure around a module": (_around_a_module, "module.bank"),
    "partial of a tensor": (lambda: functools.partial(_banked, torch.zeros(K, C)), "'0'"),
    "partial of a method": (lambda: functools.partial(Bank().forward), "__self__.bank"),
    "bound method": (lambda: Bank().forward, "__self__.bank"),
    "global": (lambda: _with_a_global, "GLOBAL_BANK"),
    "default": (lambda: _with_default, "__defaults__.0"),
    "keyword's default": (lambda: _with_keyword, "__kwdefaults__.calls"),
    "function's attribute": (_with_attribute, "calls"),
}
hidden = pytest.mark.parametrize("make, name", HIDDEN.values(), ids=HIDDEN)


@hidden
def test_hidden_state_is_noticed_and_named(make: Callable[[], Any], name: str) -> None:
    whole = LambdaWeightedLoss(make())
    z, target, z_mixed = _rows(3)
    text = rf"must keep its state in buffers.*{name.replace('.', '[.]')}.* changed during a call"
    with pytest.raises(ValueError, match=text) as refused:
        whole(z, target, z_mixed, MIXED)
    assert "hold it with register_buffer" in str(refused.value)


@hidden
def test_hidden_state_is_noticed_without_the_switch_and_by_the_mixed_loss(
    make: Callable[[], Any], name: str
) -> None:
    z, target, z_mixed = _rows(3)
    with pytest.raises(ValueError, match=name.replace(".", "[.]")):
        LambdaWeightedLoss(make(), switch=False)(z, target, z_mixed, MIXED)
    with pytest.raises(ValueError, match=name.replace(".", "[.]")):
        LambdaWeightedLoss(make()).mixed_loss(z_mixed, target, MIXED)


@pytest.mark.parametrize(
    "make, name",
    [case for key, case in HIDDEN.items() if key != "submodule's attribute"],
    ids=[key for key in HIDDEN if key != "submodule's attribute"],
)
def test_hidden_state_of_a_submodule_is_noticed(make: Callable[[], Any], name: str) -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            loss: Tensor = self.inner(z, target)
            return loss

    z, target, z_mixed = _rows(3)
    with pytest.raises(ValueError, match=rf"inner.*{name.strip(chr(39)).replace('.', '[.]')}"):
        LambdaWeightedLoss(Owner())(z, target, z_mixed, MIXED)


def test_state_that_begins_later_is_noticed_then() -> None:
    module = Plain(lambda m: m.queue.append(1) if m.active else None, queue=[], active=False)
    whole = LambdaWeightedLoss(module)
    z, target, z_mixed = _rows(3)
    for _ in range(3):
        whole(z, target, z_mixed, MIXED)
    module.active = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"queue\.0"):
        whole(z, target, z_mixed, MIXED)


def test_without_a_mixed_view_state_is_nobodys_business() -> None:
    module = Plain(lambda m: m.queue.append(1), queue=[])
    z, target = _rows(2)
    LambdaWeightedLoss(module)(z, target)
    assert module.queue == [1]


@pytest.mark.parametrize(
    "make, ignore",
    [
        (_plain(lambda m: setattr(m, "calls", m.calls + 1), calls=0), ("calls",)),
        (_plain(lambda m: setattr(m.helper, "count", 7), helper=Helper()), ("helper.count",)),
        (_plain(lambda m: setattr(m.helper, "count", 7), helper=Helper()), ["count"]),
        (_counted_by_closure, ("count",)),
        (_plain(lambda m: m.queue.append(TENSOR), queue=deque(maxlen=3)), ("queue",)),
        (_plain(lambda m: m.helper.queue.append(1), helper=Helper()), ("helper",)),
    ],
)
def test_what_is_to_be_ignored_may_change(make: Callable[[], Any], ignore: Any) -> None:
    whole = LambdaWeightedLoss(make(), ignore=ignore)
    z, target, z_mixed = _rows(3)
    torch.testing.assert_close(
        whole(z, target, z_mixed, MIXED),
        _loss(z, target).mean() + lambda_weighted_loss(_loss, z_mixed, target, MIXED),
    )


def test_ignoring_one_name_ignores_no_other() -> None:
    def change(module: Any) -> None:
        module.calls += 1
        module.recalls += 1

    whole = LambdaWeightedLoss(Plain(change, calls=0, recalls=0), ignore=("calls",))
    z, target, z_mixed = _rows(3)
    with pytest.raises(ValueError, match="got one whose 'recalls' changed"):
        whole(z, target, z_mixed, MIXED)


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

    with pytest.raises(ValueError, match="'temperature' changed during a call"):
        LambdaWeightedLoss(Training())(z, target, z_mixed, MIXED)


def test_a_refused_criterion_has_its_buffers_as_they_were() -> None:
    class Both(Bank):
        calls = 0

        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(z, target)

    criterion = Both()
    before = _buffers(criterion)
    z, target, z_mixed = _rows(3)
    with pytest.raises(ValueError, match="'calls' changed"):
        LambdaWeightedLoss(criterion)(z, target, z_mixed, MIXED)
    assert _equal(_buffers(criterion), before)
