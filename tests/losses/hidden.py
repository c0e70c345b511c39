"""Criteria that remember outside of buffers, in every place that Python has."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from buffered import C, K, N, measure_distance
from torch import Tensor, nn


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
        loss: Tensor = measure_distance(z, target) * (1 + _measure(held) / 8)
        return loss


class Object:
    """The same without nn.Module."""

    def __init__(self, change: Callable[[Any], Any], **attributes: Any) -> None:
        vars(self).update(attributes)
        self.change = change

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        self.change(self)
        loss: Tensor = measure_distance(z, target) * (1 + _measure(vars(self)) / 8)
        return loss


@dataclass(frozen=True, slots=True)
class Frozen:
    bank: Tensor

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        self.bank.add_(1)
        loss: Tensor = measure_distance(z, target) * _measure(self.bank)
        return loss


class Private:
    __slots__ = ("__bank",)

    def __init__(self) -> None:
        self.__bank = torch.zeros(K, C)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        self.__bank = self.__bank + 1
        return fill_bank(self.__bank, z, target)


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
        return measure_distance(z, target) + (z @ bank.T).logsumexp(dim=1)


def prepare(
    kind: Callable[..., Any], change: Callable[[Any], Any], **attributes: Any
) -> Callable[[], Any]:
    return lambda: kind(change, **copy.deepcopy(attributes))


def _counted_by_closure() -> Callable[..., Tensor]:
    count = 0

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return measure_distance(z, target) * count

    return criterion


def _around(make: Callable[[], Any]) -> Callable[[], Callable[..., Tensor]]:
    def build() -> Callable[..., Tensor]:
        module = make()
        return lambda z, target: module(z, target)

    return build


def fill_bank(bank: Tensor, z: Tensor, target: Tensor) -> Tensor:
    bank[: len(z)] += target.detach()
    loss: Tensor = measure_distance(z, target) * bank.sum().exp()
    return loss


def _with_default(z: Tensor, target: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(len(z))
    return measure_distance(z, target) * len(seen)


def _with_keyword(z: Tensor, target: Tensor, *, calls: list[int] = []) -> Tensor:  # noqa: B006
    calls.append(len(z))
    return measure_distance(z, target) * len(calls)


def _with_attribute() -> Callable[..., Tensor]:
    def criterion(z: Tensor, target: Tensor) -> Tensor:
        criterion.calls += 1  # type: ignore[attr-defined]
        return measure_distance(z, target) * criterion.calls  # type: ignore[attr-defined, no-any-return]

    criterion.calls = 0  # type: ignore[attr-defined]
    return criterion


GLOBAL_BANK, GLOBAL_COUNT, GLOBAL_MODULE = torch.zeros(K, C), 0, Memory()


def _with_globals(z: Tensor, target: Tensor) -> Tensor:
    global GLOBAL_COUNT
    GLOBAL_COUNT += 1
    loss: Tensor = GLOBAL_COUNT * fill_bank(GLOBAL_BANK, z, target) + GLOBAL_MODULE(z, target)
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
        return GLOBAL_COUNT * fill_bank(GLOBAL_BANK, z, target)


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
        return GLOBAL_COUNT * fill_bank(GLOBAL_BANK, z, target)

    return contrast()


def _using_globals(make: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> Any:
        _reset_globals()
        return make()

    return build


def make_classwide() -> Any:
    """An object whose class holds its bank and its counter."""

    class Classwide:
        bank, calls = torch.zeros(K, C), 0

        def __call__(self, z: Tensor, target: Tensor) -> Tensor:
            type(self).calls += 1
            return fill_bank(self.bank, z, target)

    return Classwide()


REMOTE: Any = types.ModuleType("remote")


def fill_a_modules_bank(z: Tensor, target: Tensor) -> Tensor:
    REMOTE.calls += 1
    return fill_bank(REMOTE.bank, z, target)


def reset_module() -> Callable[..., Tensor]:
    REMOTE.calls, REMOTE.bank = 0, torch.zeros(K, C)
    return fill_a_modules_bank


class View(nn.Module):
    """What is written through an attribute is read from the buffer."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(2, K, C))
        self.oldest = self.bank[1].T

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        self.oldest += target.detach().mean(dim=0)[:, None]
        loss: Tensor = measure_distance(z, target) * self.bank.sum().exp()
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


def add_one(tensor: Tensor) -> Tensor:
    return tensor.add_(1)


def _through_data(tensor: Tensor) -> Tensor:
    return tensor.data.add_(1)


def count(owner: Any) -> None:
    owner.calls += 1


def enqueue(owner: Any) -> None:
    owner.queue.append(torch.ones(3))


TENSOR = torch.zeros(3)
HIDDEN: dict[str, Callable[[], Any]] = {
    "pointer, flag and ring": Memory,
    "tensor in place": prepare(Plain, lambda m: add_one(m.bank), bank=TENSOR),
    "tensor through data": prepare(Plain, lambda m: _through_data(m.bank), bank=TENSOR),
    "tensor rebound": prepare(Plain, lambda m: setattr(m, "bank", m.bank + 1), bank=TENSOR),
    "tensor that appears": prepare(Plain, lambda m: setattr(m, "late", getattr(m, "late", 0) + 1)),
    "tensor resized": prepare(Plain, lambda m: m.bank.resize_(m.bank.numel() - 1), bank=TENSOR),
    "counter": prepare(Plain, count, calls=0),
    "None at first": prepare(Plain, lambda m: setattr(m, "mean", (m.mean or 0) + 1.5), mean=None),
    "flag": prepare(Plain, lambda m: setattr(m, "ready", not m.ready), ready=False),
    "list": prepare(Plain, enqueue, queue=[]),
    "deque": prepare(Plain, enqueue, queue=deque([TENSOR], 2)),
    "tensor in a dict": prepare(Plain, lambda m: add_one(m.banks["a"]), banks={"a": TENSOR}),
    "tensor in a tuple": prepare(Plain, lambda m: add_one(m.banks[0]), banks=(TENSOR,)),
    "dict": prepare(Plain, lambda m: m.seen.update({len(m.seen): 2}), seen={"a": 1}),
    "dict at first empty": prepare(Plain, lambda m: m.seen.update({len(m.seen): 2}), seen={}),
    "set": prepare(Plain, lambda m: m.seen.add(len(m.seen)), seen={0}),
    "array": prepare(Plain, lambda m: m.bank.__iadd__(1), bank=np.zeros(3)),
    "object": prepare(
        Plain, lambda m: setattr(m.helper, "count", m.helper.count + 1), helper=Helper()
    ),
    "list of an object": prepare(Plain, lambda m: enqueue(m.helper), helper=Helper()),
    "submodule": lambda: nn.Sequential(Wrapped(Plain(count, calls=0)), nn.Identity())[0],
    "plain object": prepare(Object, count, calls=0),
    "plain object's tensor": prepare(Object, lambda o: add_one(o.bank), bank=TENSOR),
    "plain object's module": prepare(Object, lambda o: count(o.inner), inner=Plain(count, calls=0)),
    "frozen object with slots": lambda: Frozen(torch.ones(3)),
    "nonlocal": _counted_by_closure,
    "closure around a module": _around(Memory),
    "closure around an object": _around(prepare(Object, enqueue, queue=[])),
    "partial of a tensor": lambda: functools.partial(fill_bank, torch.zeros(K, C)),
    "partial of a method": lambda: functools.partial(Memory().forward),
    "bound method": lambda: Memory().forward,
    "globals": _reset_globals,
    "view of a buffer": View,
    "globals of a method": _using_globals(_Method),
    "globals of a bound method": _using_globals(lambda: _Method().contrast),
    "globals of forward and a property": _using_globals(_Forward),
    "globals of a nested function": _using_globals(lambda: _with_nested),
    "objects in objects": prepare(
        Plain, lambda m: enqueue(m.a.inner.inner.inner.inner), a=_nest(Helper(), 4)
    ),
    "containers in containers": prepare(
        Plain, lambda m: m.a["b"]["c"][0]["d"].append(1), a={"b": {"c": [{"d": []}]}}
    ),
    "named tuple": prepare(Plain, lambda m: add_one(m.bank.rows), bank=Rows(TENSOR)),
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
