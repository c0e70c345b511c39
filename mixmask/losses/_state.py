"""What a criterion remembers: buffers that can be lent, and the rest, which can only be watched."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# How many objects deep the watch looks: criterion, helper, queue, its storage.
_DEPTH = 4
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
# Their functions remember nothing; looking into them would take longer than calling them.
_STATELESS_PACKAGES = frozenset({"mixmask", "torch"})
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@contextmanager
def lent_buffers(criterion: Callable[..., Any]) -> Iterator[None]:
    """Let a criterion work on copies of its buffers; it has its own back afterwards, untouched.

    Copies, and not a restored original: what autograd keeps of the call must not change under it.
    """
    if not isinstance(criterion, nn.Module):
        yield
        return
    owners = [(module, dict(module._buffers)) for module in criterion.modules()]
    copies: dict[int, Tensor] = {}
    for module, buffers in owners:
        for name, buffer in buffers.items():
            if buffer is not None:
                copy = copies.setdefault(id(buffer), buffer.detach().clone())
                setattr(module, name, copy)
    try:
        yield
    finally:
        for module, buffers in owners:
            for name in [name for name in module._buffers if name not in buffers]:
                delattr(module, name)
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


@contextmanager
def watched(
    criterion: Callable[..., Any], ignore: Collection[str] = (), *, closely: bool = False
) -> Iterator[None]:
    """Refuse a criterion that remembers a call outside its buffers.

    Args:
        criterion: A module, an object, a function with what it encloses, or a partial.
        ignore: Names that may change.
        closely: Compare the values of tensors too, which waits for their device. Otherwise a
            write through `.data`, which leaves no trace, goes unseen.

    Raises:
        ValueError: On leaving, if anything changed, by name.
    """
    if torch.compiler.is_compiling():
        yield
        return
    before = _plain_state(criterion, closely=closely)
    yield
    after = _plain_state(criterion, closely=closely)
    changed = [
        name
        for name in (*before, *(name for name in after if name not in before))
        # In lists, NaN is equal to itself.
        if [before.get(name)] != [after.get(name)] and not _ignored(name, ignore)
    ]
    if changed:
        names = ", ".join(repr(name) for name in changed[:5])
        raise ValueError(
            "a criterion must keep its state in buffers, so that the terms of a step do not see "
            f"each other's changes, got one whose {names} changed during a call; hold it with "
            "register_buffer in an nn.Module, or, if the loss does not depend on it, name it in "
            f"LambdaWeightedLoss(criterion, ignore=({changed[0]!r},))"
        )


def _ignored(name: str, ignore: Collection[str]) -> bool:
    """Tell whether a dotted name is that of an attribute to ignore, or of what it holds."""
    return any(f".{path}." in f".{name}." for path in ignore)


class _Same:
    """Equal to itself alone; holding on to the object keeps its identity its own."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Values:
    """The bits of a tensor, NaN equal to itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.bits = tensor.detach().reshape(-1).clone().view(torch.uint8)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]


def _plain_state(criterion: Callable[..., Any], *, closely: bool) -> dict[str, Any]:
    """Describe what a criterion remembers outside its own buffers, by dotted names."""
    lent = criterion.buffers() if isinstance(criterion, nn.Module) else ()
    description = _Description(frozenset(map(id, lent)), closely)
    description.add("", criterion, _DEPTH)
    return description.state


class _Description:
    """A walk through what a criterion holds."""

    def __init__(self, lent: frozenset[int], closely: bool) -> None:
        self.lent = lent
        self.closely = closely
        self.state: dict[str, Any] = {}
        self.seen: dict[int, Any] = {}

    def add(self, name: str, value: Any, depth: int) -> None:
        """Note a value and what it holds."""
        if isinstance(value, Tensor):
            if id(value) not in self.lent:
                self.state[name] = _tensor_state(value, closely=self.closely)
            return
        if isinstance(value, _PLAIN):
            self.state[name] = value
            return
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        self.state[name] = _Same(value)
        prefix = f"{name}." if name else ""
        if depth > 0:
            for key, part in _parts(value):
                self.add(prefix + key, part, depth - 1)
        if isinstance(value, nn.Module):
            # Submodules are part of their owner, however deep they lie.
            for key, child in value.named_children():
                self.add(prefix + key, child, depth)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """List what an object holds, by name."""
    if isinstance(value, nn.Module):
        plain = [(key, part) for key, part in vars(value).items() if key not in _MODULE_INTERNALS]
        return [*plain, *value.named_buffers(recurse=False), *value.named_parameters(recurse=False)]
    if isinstance(value, functools.partial):
        keywords = value.keywords.items()
        return [("func", value.func), *(_numbered(value.args)), *keywords]
    if inspect.isfunction(value):
        return _used_by(value)
    if inspect.ismethod(value):
        return [("__self__", value.__self__)]
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return _numbered(value)
    if hasattr(value, "tobytes"):
        return [("values", value.tobytes())]
    # Our own criteria are frozen, and their queues need not be compared.
    ours = type(value).__module__.startswith("mixmask.losses.")
    if ours or inspect.ismodule(value) or isinstance(value, type):
        return []
    return list(vars(value).items()) if hasattr(value, "__dict__") else []


def _used_by(function: Any) -> list[tuple[str, Any]]:
    """List what a function takes from around it, its defaults and what was set on it."""
    if (function.__module__ or "").partition(".")[0] in _STATELESS_PACKAGES:
        return []
    used = inspect.getclosurevars(function)
    return [
        *used.nonlocals.items(),
        *used.globals.items(),
        ("__defaults__", function.__defaults__),
        ("__kwdefaults__", function.__kwdefaults__),
        *vars(function).items(),
    ]


def _numbered(values: Collection[Any]) -> list[tuple[str, Any]]:
    return [(str(index), value) for index, value in enumerate(values)]


def _tensor_state(tensor: Tensor, *, closely: bool) -> tuple[Any, ...]:
    """Describe a tensor: which one, where it lies, how often it was written to, and its values."""
    version = None if tensor.is_inference() else tensor._version
    # Parameters may be large, and what changes them is an optimizer.
    compared = closely and not isinstance(tensor, nn.Parameter)
    values = _Values(tensor) if compared else None
    return _Same(tensor), tensor.data_ptr(), tuple(tensor.shape), version, values
