"""What a criterion remembers, lent out as copies while it is called for mixed terms."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# How many objects or containers deep: criterion, its helper, its list. Submodules do not count.
_DEPTH = 3
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
# What these packages define remembers nothing outside of buffers.
_STATELESS = ("torch.", "einops.", "mixmask.losses.")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, ModuleType)


@contextmanager
def lend_state(
    criterion: Callable[..., Any], ignore: Collection[str] = (), *, cautious: bool = False
) -> Iterator[Callable[..., Any]]:
    """Yield a criterion that works on copies; afterwards it has its own state back, untouched.

    Lent are buffers, attributes, and what a function encloses, has as defaults or reads from its
    module. What is rebound or written in place is undone. Copies, and not a restored original:
    what autograd keeps of the call must not change under it.

    Args:
        criterion: A module, an object, a function, a method or a partial.
        ignore: Dotted names of attributes that are used as they are.
        cautious: Keep the values of what is trained, too, to restore them before an error.

    Raises:
        ValueError: On leaving, if a tensor that is trained was written to.
    """
    with _Loan(ignore, cautious) as loan:
        yield loan.lend(criterion)
    loan.check_trained()


@contextmanager
def lend_buffers(criterion: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Do the same where torch.compile looks on, for modules, which is what it can follow.

    It refuses to trace a module whose plain attributes change: that takes a graph break.
    """
    owners = list(criterion.modules()) if isinstance(criterion, nn.Module) else []
    saved = [_list_attributes(owner) for owner in owners]
    copies: dict[int, Tensor] = {}
    try:
        for owner, attributes in zip(owners, saved, strict=True):
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    copied = copies.setdefault(id(value), value.detach().clone())
                    setattr(owner, name, copied)
        yield criterion
    finally:
        for owner, attributes in zip(owners, saved, strict=True):
            for name in _list_attributes(owner).keys() - attributes.keys():
                delattr(owner, name)
            for name, value in attributes.items():
                setattr(owner, name, value)


class _Loan(ExitStack):
    """A walk through what a criterion holds; leaving it undoes every change."""

    def __init__(self, ignore: Collection[str], cautious: bool) -> None:
        super().__init__()
        self.ignore, self.cautious = ignore, cautious
        # By id, so that what is shared stays shared; holding the original keeps its id its own.
        self.lent: dict[int, tuple[Any, Any]] = {}
        self.trained: list[tuple[str, Tensor, int, Tensor | None]] = []

    def lend(self, value: Any, name: str = "", depth: int = _DEPTH) -> Any:
        """Return a copy of a value, or the value itself after its parts were swapped for copies."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) in self.lent:
            return self.lent[id(value)][1]
        # What lies too deep is left, and not noted: it may be met again from nearer.
        if depth <= 0 and not isinstance(value, (Tensor, nn.Module)):
            return value
        self.lent[id(value)] = value, value
        if isinstance(value, Tensor):
            stand_in: Any = self._lend_tensor(value, name)
        else:
            stand_in = self._lend_parts(value, name, depth - 1)
        self.lent[id(value)] = value, stand_in
        return stand_in

    def _lend_tensor(self, value: Tensor, name: str) -> Tensor:
        if not (value.requires_grad and value.is_leaf):
            return value.clone()
        # The gradient of a copy would be lost, so what is trained is only watched.
        kept = value.detach().clone() if self.cautious else None
        self.trained.append((name.lstrip("."), value, value._version, kept))
        return value

    def _lend_parts(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, (list, deque, dict)):
            copied = copy.copy(value)
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                copied[key] = self.lend(part, f"{name}.{key}", depth)
            return copied
        if type(value) is tuple:
            return tuple(self.lend(part, f"{name}.{i}", depth) for i, part in enumerate(value))
        if isinstance(value, (set, bytearray)) or hasattr(value, "__array_interface__"):
            return copy.copy(value)
        # What only passes a call on is no level of its own.
        if isinstance(value, partial):
            parts = value.func, value.args, value.keywords
            function, arguments, options = (self.lend(part, name, depth + 1) for part in parts)
            return partial(function, *arguments, **options)
        if isinstance(value, MethodType):
            self.lend(value.__self__, f"{name}.__self__", depth + 1)
            return value
        self._swap_slots(value, name, depth)
        return value

    def _swap_slots(self, owner: Any, name: str, depth: int) -> None:
        self.callback(self._drop_new, owner, name, _list_attributes(owner).keys())
        for key, part, store in _list_slots(owner):
            if not self._ignores(f"{name}.{key}"):
                self.callback(store, part)
                # What a function encloses is as near as the function; what it imports is not.
                near = isinstance(owner, FunctionType) and owner.__globals__.get(key) is not part
                stand_in = self.lend(part, f"{name}.{key}", depth + near)
                if stand_in is not part:
                    store(stand_in)
        if isinstance(owner, nn.Module):
            for key, child in owner.named_children():
                self.lend(child, f"{name}.{key}", depth + 1)

    def _drop_new(self, owner: Any, name: str, known: Collection[str]) -> None:
        delete: Any = delattr if isinstance(owner, nn.Module) else object.__delattr__
        for key in _list_attributes(owner).keys() - set(known):
            if not self._ignores(f"{name}.{key}"):
                delete(owner, key)

    def _ignores(self, name: str) -> bool:
        return any(f".{path}." in f"{name}." for path in self.ignore)

    def check_trained(self) -> None:
        """Refuse a criterion that wrote to what is trained; restore it where that is known."""
        changed = [one for one in self.trained if one[1]._version != one[2]]
        if not changed:
            return
        with torch.no_grad():
            for _, tensor, _, kept in changed:
                if kept is not None:
                    tensor.copy_(kept)
        names = ", ".join(repr(name) for name, *_ in changed[:5])
        raise ValueError(
            f"a criterion must not write to what is trained, got one whose {names} changed during "
            "a call; update it once per step, outside of the criterion"
        )


def _is_stateless(thing: Any) -> bool:
    return f"{thing.__module__}.".startswith(_STATELESS)


def _list_attributes(owner: Any) -> dict[str, Any]:
    """Return what an object holds by name: its own attributes, slots, and a module's buffers."""
    if isinstance(owner, nn.Module):
        own = {} if _is_stateless(type(owner)) else vars(owner)
        plain = {name: own[name] for name in own if name not in _MODULE_INTERNALS}
        return {**plain, **owner._buffers}
    if _is_stateless(owner if isinstance(owner, FunctionType) else type(owner)):
        return {}
    slots = [name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(owner, name) for name in slots if hasattr(owner, name)}
    return {**held, **getattr(owner, "__dict__", {})}


def _list_slots(owner: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Yield the name and value of each part of an object, and what puts another in its place."""
    store: Any = setattr if isinstance(owner, nn.Module) else object.__setattr__
    for name, part in _list_attributes(owner).items():
        yield name, part, partial(store, owner, name)
    if isinstance(owner, nn.Module):
        for name, parameter in owner._parameters.items():
            yield name, parameter, partial(owner._parameters.__setitem__, name)
    if not isinstance(owner, FunctionType) or _is_stateless(owner):
        return
    for name, cell in zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True):
        with suppress(ValueError):  # A cell may be empty.
            yield name, cell.cell_contents, partial(setattr, cell, "cell_contents")
    for name in ("__defaults__", "__kwdefaults__"):
        yield name, getattr(owner, name), partial(setattr, owner, name)
    used = owner.__globals__
    for name in owner.__code__.co_names:
        if name in used:
            yield name, used[name], partial(used.__setitem__, name)
