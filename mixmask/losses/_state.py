"""What a criterion remembers, lent out as copies while it is called for mixed terms.

That is what modules and objects hold, the closure variables of functions, and the globals that
they name, with containers and views of these; attributes of classes and of imported modules are
not. Where torch.compile looks on, `lend_buffers` does it for modules, if `is_traceable` finds
nothing else.
"""

from __future__ import annotations

import copy
import copyreg
import dis
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from operator import is_
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mixmask.losses._criteria import is_own, unwrap

# How many objects of other packages deep. The criterion's own package, modules, and what only
# holds or passes on do not count.
_DEPTH = 3
_PASSING = (tuple, partial, MethodType)
_HOLDERS = (list, deque, dict, nn.Module, *_PASSING)
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
# What these packages define remembers nothing outside of buffers.
_STATELESS = ("torch.", "einops.", "numpy.", "mixmask.losses.")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))

# Puts values in their place by name.
Store = Callable[[dict[str, object]], None]


@contextmanager
def lend_state(
    criterion: Callable[..., object], ignore: Collection[str] = (), *, cautious: bool = False
) -> Iterator[Callable[..., object]]:
    """Yield a criterion that works on copies; afterwards it has its own state back, untouched.

    Copies, and not a restored original: what autograd keeps of the call must not change under it.
    `cautious` also keeps the values of trained parameters, to restore them before an error.
    """
    with Loan(ignore, cautious) as loan:
        yield loan.lend_all(criterion)
    loan.check_trained()


class Loan(AbstractContextManager["Loan"]):
    """A walk through what a criterion holds; leaving it undoes every change.

    Tensors and containers are replaced by copies. Objects, modules and functions, which others may
    hold too, stay themselves: what they hold is swapped.
    """

    def __init__(self, ignore: Collection[str] = (), cautious: bool = False) -> None:
        self.ignore, self.cautious = ignore, cautious
        # Originals and copies by the id of the original, which stays its own while it is held here.
        self.lent: dict[int, tuple[object, object]] = {}
        # Copies of two views of one memory are views of one memory, too.
        self.storages: dict[int, Any] = {}
        # What puts the originals back, and which names an object had when it was met.
        self.parts: list[tuple[Store, dict[str, object]]] = []
        self.spaces: list[tuple[dict[str, object], str, Collection[str]]] = []
        self.trained: list[tuple[str, Tensor, int, Tensor, Tensor | None]] = []
        self.package = ""
        # Of a class, only the methods that some code names are looked at.
        self.classes: set[type] = set()
        self.names = {"__call__", "forward"}

    def __exit__(self, *_: object) -> None:
        # The last first: a global that two functions name was swapped twice.
        for store, held in reversed(self.parts):
            store(held)
        self.drop_new()

    def drop_new(self) -> None:
        """Drop the names that objects did not have when they were met."""
        for space, name, known in self.spaces:
            for key in space.keys() - known:
                if not self._ignores(f"{name}.{key}"):
                    del space[key]

    def lend_all(self, criterion: Callable[..., object]) -> Callable[..., Any]:
        """Return a copy of the criterion, or itself after its parts were swapped for copies."""
        base = unwrap(criterion)
        self.package = _name_home(getattr(base, "__func__", base)).partition(".")[0] + "."
        lent: Callable[..., object] = self.lend(criterion)
        # Methods name globals and further methods: until no more.
        done: set[tuple[type, str]] = set()
        while todo := {(c, name) for c in self.classes for name in self.names & {*vars(c)}} - done:
            done |= todo
            for kind, name in todo:
                method = vars(kind)[name]
                # Of a bound or class method what it wraps, of a property its getter.
                function = getattr(method, "__func__", getattr(method, "fget", method))
                if isinstance(function, FunctionType):
                    self.lend(function)
        return lent

    def lend(self, value: object, name: str = "", depth: int = _DEPTH) -> Any:
        """Return a copy of a value, or the value itself after its parts were swapped for copies."""
        if isinstance(value, type) and not _is_stateless(value):
            self.classes.add(value)
        if isinstance(value, (*_PLAIN, type, ModuleType)) or is_own(value):
            return value
        if id(value) in self.lent:
            return self.lent[id(value)][1]
        near = isinstance(value, _HOLDERS) or _name_home(value).startswith(self.package)
        # What lies too deep is left, and not noted: it may be met again from nearer.
        if depth <= 0 and not (near or isinstance(value, Tensor)):
            return value
        # Noted before its parts are walked, which may refer back to it.
        self.lent[id(value)] = value, value
        if isinstance(value, Tensor):
            stand_in = self._lend_tensor(value, name)
        else:
            stand_in = self._lend_parts(value, name, depth - (not near))
        # A copy stands for itself, where a cell or a global shows it a second time.
        self.lent[id(value)], self.lent[id(stand_in)] = (value, stand_in), (stand_in, stand_in)
        return stand_in

    def _lend_tensor(self, value: Tensor, name: str) -> Tensor:
        if value.requires_grad and value.is_leaf:
            # The gradient of a copy would be lost, so trained parameters are only watched.
            kept = value.detach().clone() if self.cautious else None
            self.trained.append((name.lstrip("."), value, value._version, value.detach(), kept))
            return value
        # Of what is computed from trained tensors, a clone keeps the graph.
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        if value.requires_grad or value.is_conj() or not plain:
            return value.clone()
        storage = value.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.clone()
        place = value.storage_offset(), value.shape, value.stride()
        return value.new_empty(0).set_(self.storages[storage._cdata], *place)

    def _lend_parts(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, (list, deque, dict)):
            copied = copy.copy(value)
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                copied[key] = self.lend(part, f"{name}.{key}", depth)
            return copied
        if isinstance(value, tuple):
            parts = [self.lend(part, f"{name}.{i}", depth) for i, part in enumerate(value)]
            # An unchanged tuple stays itself, so that nothing is written to its owner.
            if all(map(is_, parts, value)):
                return value
            return value._make(parts) if hasattr(value, "_make") else tuple(parts)
        if isinstance(value, set) or hasattr(value, "__array_interface__"):
            return copy.copy(value)
        if isinstance(value, partial):
            function, arguments = (
                self.lend(part, name, depth) for part in (value.func, value.args)
            )
            options = {key: self.lend(part, name, depth) for key, part in value.keywords.items()}
            return partial(function, *arguments, **options)
        if isinstance(value, MethodType):
            self.lend(value.__func__, name, depth)
            self.lend(value.__self__, f"{name}.__self__", depth)
        else:
            self._swap_parts(value, name, depth)
        return value

    def _swap_parts(self, owner: Any, name: str, depth: int) -> None:
        if isinstance(owner, FunctionType):
            self.names |= _list_names(owner)
        else:
            self.classes |= {kind for kind in type(owner).__mro__ if not _is_stateless(kind)}
        self.spaces += [(space, name, set(space)) for space in _list_spaces(owner)]
        for store, held in _list_parts(owner):
            kept = {key: part for key, part in held.items() if not self._ignores(f"{name}.{key}")}
            self.parts.append((store, kept))
            for key, part in kept.items():
                stand_in = self.lend(part, f"{name}.{key}", depth)
                if stand_in is not part:
                    store({key: stand_in})
        # Children stay in place: hooks and optimizers hold them.
        if isinstance(owner, nn.Module):
            for key, child in owner.named_children():
                self.lend(child, f"{name}.{key}", depth)

    def _ignores(self, name: str) -> bool:
        return any(f".{path}." in f"{name}." for path in self.ignore)

    def check_trained(self) -> None:
        """Refuse a criterion that wrote to trained parameters; restore them if they were kept."""
        changed = []
        for name, tensor, version, storage, kept in self.trained:
            # What is written through .data has no new version. NaN stays what it is.
            if kept is not None and not torch.equal(tensor.nan_to_num(), kept.nan_to_num()):
                tensor.data = storage.copy_(kept)
                changed.append(name)
            elif tensor._version != version:
                changed.append(name)
        if changed:
            raise ValueError(
                "a criterion must not write to trained parameters, got one whose "
                f"{', '.join(map(repr, changed[:5]))} changed during a call; update it once per "
                "step, outside of the criterion"
            )


def _list_parts(owner: object) -> Iterator[tuple[Store, dict[str, object]]]:
    """Yield what an object holds: registries, attributes, slots, and what code closes over."""
    # Past __setattr__, which a module, a proxy or a frozen object may have of its own.
    for space in _list_spaces(owner):
        yield space.update, {key: space[key] for key in space if key not in _MODULE_INTERNALS}
    if _is_stateless(owner):
        return
    names = copyreg._slotnames(type(owner))  # type: ignore[attr-defined]
    if isinstance(owner, FunctionType):
        names = "__defaults__", "__kwdefaults__"
        for key, cell in zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True):
            with suppress(ValueError):  # A cell may be empty.
                yield partial(_assign, cell, at="cell_contents"), {key: cell.cell_contents}
        used = owner.__globals__
        yield used.update, {key: used[key] for key in _list_names(owner) & used.keys()}
    held = {key: getattr(owner, key) for key in names if hasattr(owner, key)}
    yield partial(_assign, owner), held


def _assign(owner: object, held: dict[str, object], at: str | None = None) -> None:
    for key, value in held.items():
        with suppress(AttributeError):  # A property may cover a slot of the same name.
            object.__setattr__(owner, at or key, value)


def _list_spaces(owner: object) -> list[dict[str, Any]]:
    own = [] if _is_stateless(owner) else [getattr(owner, "__dict__", {})]
    return [owner._buffers, owner._parameters, *own] if isinstance(owner, nn.Module) else own


def _list_names(function: FunctionType) -> set[str]:
    """Return the names of the globals and attributes that a function mentions."""
    return {name for code in list_codes(function.__code__) for name in code.co_names}


def list_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those inside it."""
    yield code
    for part in code.co_consts:
        yield from list_codes(part) if isinstance(part, CodeType) else ()


def _name_home(thing: object) -> str:
    """Name the module where a function, a class or the class of an object is defined."""
    named = thing if isinstance(thing, (FunctionType, type)) else type(thing)
    return f"{named.__module__}."


def _is_stateless(thing: object) -> bool:
    return _name_home(thing).startswith(_STATELESS)


@contextmanager
def lend_buffers(criterion: Callable[..., object]) -> Iterator[Callable[..., object]]:
    """Do what `lend_state` does in a way that can be traced, for what `is_traceable`."""
    owners = [(one, _list_attributes(one)) for one in _list_modules(criterion)]
    copies: dict[int, Tensor] = {}
    try:
        for owner, attributes in owners:
            # Numbers need no copy: setting the saved ones back is enough.
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    setattr(owner, name, copies.setdefault(id(value), value.detach().clone()))
        yield criterion
    finally:
        for owner, attributes in owners:
            for name in _list_attributes(owner).keys() - attributes.keys():
                delattr(owner, name)
            for name, value in attributes.items():
                setattr(owner, name, value)


def is_traceable(whole: Any) -> bool:
    """Tell whether the state of `whole.criterion` lies in tensors and numbers of its modules."""
    with Loan() as loan:
        loan.lend_all(whole.criterion)
    modules = _list_modules(whole.criterion)
    held = [part for one in modules for part in _list_attributes(one).values()]
    tensors = {id(part) for part in held if isinstance(part, Tensor)}
    # Copies of views would be no views: the walk outside of the graph sees to them.
    if len(loan.storages) < len(tensors):
        return False
    known = tensors | {id(one) for one in [*modules, *(one for _, one, *_ in loan.trained)]}
    known |= {id(copied) for one, copied in loan.lent.values() if id(one) in tensors}
    return all(
        # Numbers that a function reads are constants, unless it rebinds them.
        not _rebinds(one)
        if isinstance(one, FunctionType)
        else id(one) in known or isinstance(one, _PASSING)
        for one, _ in loan.lent.values()
    )


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
is_traceable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _rebinds(function: FunctionType) -> bool:
    """Tell whether a function writes to its globals, to closure variables, or has attributes."""
    return any(isinstance(part, _PLAIN) for part in vars(function).values()) or any(
        step.opname == "STORE_GLOBAL"
        or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars)
        for code in list_codes(function.__code__)
        for step in dis.get_instructions(code)
    )


def _list_modules(criterion: object) -> list[nn.Module]:
    return list(criterion.modules()) if isinstance(criterion, nn.Module) else []


def _list_attributes(module: nn.Module) -> dict[str, object]:
    """Return a module's buffers and, where it may change them, its plain attributes."""
    own = {} if _is_stateless(module) else vars(module)
    return {name: own[name] for name in own if name not in _MODULE_INTERNALS} | module._buffers
