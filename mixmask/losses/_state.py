"""What a criterion remembers, lent out as copies while it is called for mixed terms."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import is_
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# How many objects of other packages deep. The criterion's own package, modules, and what only
# holds or passes on do not count.
_DEPTH = 3
_HOLDERS = (list, deque, dict, tuple, partial, MethodType, nn.Module)
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
# What these packages define remembers nothing outside of buffers.
_STATELESS = ("torch.", "einops.", "mixmask.losses.")
PLAIN = (bool, int, float, complex, str, bytes, type(None), ModuleType)


@contextmanager
def lend_state(
    criterion: Callable[..., Any], ignore: Collection[str] = (), *, cautious: bool = False
) -> Iterator[Callable[..., Any]]:
    """Yield a criterion that works on copies; afterwards it has its own state back, untouched.

    Lent are buffers, attributes, and what a function or a method encloses, has as defaults or
    reads from its module or class. What is rebound or written in place is undone. Copies, and not
    a restored original: what autograd keeps of the call must not change under it.

    Args:
        criterion: A module, an object, a function, a method or a partial.
        ignore: Dotted names of attributes that are used as they are.
        cautious: Keep the values of what is trained, too, to restore them before an error.

    Raises:
        ValueError: On leaving, if a tensor that is trained was written to.
    """
    with Loan(ignore, cautious) as loan:
        yield loan.lend_all(criterion)
    loan.check_trained()


class Loan(ExitStack):
    """A walk through what a criterion holds; leaving it undoes every change."""

    def __init__(self, ignore: Collection[str], cautious: bool) -> None:
        super().__init__()
        self.ignore, self.cautious = ignore, cautious
        # By id, so that what is shared stays shared; holding the original keeps its id its own.
        self.lent: dict[int, tuple[Any, Any]] = {}
        self.trained: list[tuple[str, Tensor, int, Tensor, Tensor | None]] = []
        self.package = ""
        # Of classes, only what some code names is looked at.
        self.kinds: set[type] = set()
        self.names = {"__call__", "forward"}

    def lend_all(self, criterion: Callable[..., Any]) -> Callable[..., Any]:
        """Return a copy of the criterion, or itself after its parts were swapped for copies."""
        base: Any = criterion
        while isinstance(base, (partial, MethodType)):
            base = base.func if isinstance(base, partial) else base.__func__
        self.package = _name_package(base)
        lent: Callable[..., Any] = self.lend(criterion)
        visited: set[tuple[type, str]] = set()
        while todo := {(k, n) for k in self.kinds for n in self.names & vars(k).keys()} - visited:
            visited |= todo
            for kind, name in todo:
                self.swap_member(kind, name)
        return lent

    def lend(self, value: Any, name: str = "", depth: int = _DEPTH) -> Any:
        """Return a copy of a value, or the value itself after its parts were swapped for copies."""
        if isinstance(value, type) and not is_stateless(value):
            self.kinds.add(value)
        if isinstance(value, (*PLAIN, type)):
            return value
        if id(value) in self.lent:
            return self.lent[id(value)][1]
        near = isinstance(value, _HOLDERS) or _name_package(value) == self.package
        # What lies too deep is left, and not noted: it may be met again from nearer.
        if depth <= 0 and not (near or isinstance(value, Tensor)):
            return value
        self.lent[id(value)] = value, value
        if isinstance(value, Tensor):
            stand_in: Any = self.lend_tensor(value, name)
        else:
            stand_in = self.lend_parts(value, name, depth - (not near))
        self.lent[id(value)] = value, stand_in
        return stand_in

    def lend_tensor(self, value: Tensor, name: str) -> Tensor:
        if not (value.requires_grad and value.is_leaf):
            return value.clone()
        # The gradient of a copy would be lost, so what is trained is only watched.
        kept = value.detach().clone() if self.cautious else None
        self.trained.append((name.lstrip("."), value, value._version, value.detach(), kept))
        return value

    def lend_parts(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, (list, deque, dict)):
            copied = copy.copy(value)
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                copied[key] = self.lend(part, f"{name}.{key}", depth)
            return copied
        if isinstance(value, tuple):
            parts = [self.lend(part, f"{name}.{i}", depth) for i, part in enumerate(value)]
            if all(map(is_, parts, value)):
                return value
            return value._make(parts) if hasattr(value, "_make") else tuple(parts)
        if isinstance(value, (set, bytearray)) or hasattr(value, "__array_interface__"):
            return copy.copy(value)
        if isinstance(value, partial):
            held = value.func, value.args, value.keywords
            function, arguments, options = (self.lend(part, name, depth) for part in held)
            return partial(function, *arguments, **options)
        if isinstance(value, MethodType):
            self.lend(value.__self__, f"{name}.__self__", depth)
            self.lend(value.__func__, name, depth)
            return value
        self.swap_slots(value, name, depth)
        return value

    def swap_slots(self, owner: Any, name: str, depth: int) -> None:
        if isinstance(owner, FunctionType):
            self.names.update(_list_names(owner))
        else:
            self.kinds.update(kind for kind in type(owner).__mro__ if not is_stateless(kind))
        self.callback(self._drop_new, owner, name, list_attributes(owner).keys())
        for key, part, store in list_slots(owner):
            self._swap(key, part, store, name, depth)
        if isinstance(owner, nn.Module):
            for key, child in owner.named_children():
                self.lend(child, f"{name}.{key}", depth)

    def swap_member(self, kind: type, key: str) -> None:
        part = vars(kind)[key]
        function = getattr(part, "__func__", getattr(part, "fget", part))
        if isinstance(function, FunctionType):
            self.lend(function)
        elif not hasattr(part, "__get__"):
            self._swap(key, part, partial(_set_member, kind, key), "", _DEPTH)

    def _swap(
        self, key: str, part: Any, store: Callable[[Any], None], name: str, depth: int
    ) -> None:
        if self._ignores(f"{name}.{key}"):
            return
        self.callback(store, part)
        stand_in = self.lend(part, f"{name}.{key}", depth)
        if stand_in is not part:
            store(stand_in)

    def _drop_new(self, owner: Any, name: str, known: Collection[str]) -> None:
        for key in list_attributes(owner).keys() - set(known):
            if not self._ignores(f"{name}.{key}"):
                spaces = [getattr(owner, space, {}) for space in ("__dict__", "_buffers")]
                space = next((space for space in spaces if key in space), None)
                object.__delattr__(owner, key) if space is None else space.pop(key)

    def _ignores(self, name: str) -> bool:
        return any(f".{path}." in f"{name}." for path in self.ignore)

    def check_trained(self) -> None:
        """Refuse a criterion that wrote to what is trained; restore it where that is known."""
        changed = [one for one in self.trained if _has_changed(*one[1:])]
        if not changed:
            return
        with torch.no_grad():
            for _, tensor, _, storage, kept in changed:
                if kept is not None:
                    tensor.data = storage.copy_(kept)
        names = ", ".join(repr(name) for name, *_ in changed[:5])
        raise ValueError(
            f"a criterion must not write to what is trained, got one whose {names} changed during "
            "a call; update it once per step, outside of the criterion"
        )


def _has_changed(tensor: Tensor, version: int, _: Tensor, kept: Tensor | None) -> bool:
    now = tensor.detach()
    if tensor._version != version or kept is None:
        return tensor._version != version
    # What is written through .data has no new version. NaN stays what it is.
    return now.shape != kept.shape or bool(((now != kept) & (now == now)).any())


def _set_attribute(owner: Any, key: str, value: Any) -> None:
    # Past __setattr__, which a module, a proxy or a frozen object may have of its own.
    space = getattr(owner, "__dict__", {})
    if key in space or not hasattr(type(owner), key):
        space[key] = value
    else:
        object.__setattr__(owner, key, value)


def _set_member(kind: type, key: str, value: Any) -> None:
    # Not every class lets itself be written to.
    if vars(kind).get(key) is not value:
        setattr(kind, key, value)


def _name_package(thing: Any) -> str:
    named = thing if isinstance(thing, FunctionType) else type(thing)
    return f"{named.__module__}".partition(".")[0]


def is_stateless(thing: Any) -> bool:
    return f"{thing.__module__}.".startswith(_STATELESS)


def list_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those inside it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from list_codes(part)


def _list_names(function: FunctionType) -> set[str]:
    """Return the names of the globals and attributes that a function mentions."""
    return {name for code in list_codes(function.__code__) for name in code.co_names}


def list_attributes(owner: Any) -> dict[str, Any]:
    """Return what an object holds by name: its own attributes, slots, and a module's buffers."""
    if isinstance(owner, nn.Module):
        own = {} if is_stateless(type(owner)) else vars(owner)
        plain = {name: own[name] for name in own if name not in _MODULE_INTERNALS}
        return {**plain, **owner._buffers}
    if is_stateless(owner if isinstance(owner, FunctionType) else type(owner)):
        return {}
    spaces = [vars(kind) for kind in type(owner).__mro__ if "__slots__" in vars(kind)]
    slots = [
        key for space in spaces for key in space if isinstance(space[key], MemberDescriptorType)
    ]
    held = {name: getattr(owner, name) for name in slots if hasattr(owner, name)}
    return {**held, **getattr(owner, "__dict__", {})}


def list_slots(owner: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Yield the name and value of each part of an object, and what puts another in its place."""
    is_module = isinstance(owner, nn.Module)
    registries: list[Any] = [owner._buffers, owner._parameters] if is_module else []
    for registry in registries:
        for name, part in registry.items():
            yield name, part, partial(registry.__setitem__, name)
    for name, part in list_attributes(owner).items():
        if not any(name in registry for registry in registries):
            yield name, part, partial(_set_attribute, owner, name)
    if not isinstance(owner, FunctionType) or is_stateless(owner):
        return
    for name, cell in zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True):
        with suppress(ValueError):  # A cell may be empty.
            yield name, cell.cell_contents, partial(setattr, cell, "cell_contents")
    for name in ("__defaults__", "__kwdefaults__"):
        yield name, getattr(owner, name), partial(setattr, owner, name)
    used = owner.__globals__
    for name in _list_names(owner) & used.keys():
        yield name, used[name], partial(used.__setitem__, name)
