"""What a criterion remembers, lent out as copies while it is called for mixed terms.

`lend_state` finds state in every place that Python has. Where torch.compile looks on,
`lend_buffers` does the same for modules, if `is_traceable` says that there is nothing else.
"""

from __future__ import annotations

import copy
import dis
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import is_
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# How many objects of other packages deep. The criterion's own package, modules, and what only
# holds or passes on do not count.
_DEPTH = 3
_HOLDERS = (list, deque, dict, tuple, partial, MethodType, nn.Module)
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
# What these packages define remembers nothing outside of buffers.
_STATELESS = ("torch.", "einops.", "numpy.", "mixmask.losses.")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# The losses among torch's functions. Dynamo knows them by identity alone.
_FUNCTIONS: tuple[Any, ...] = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
)

# Values by name, and what puts others in their place.
Part = tuple[Callable[[dict[str, Any]], None], dict[str, Any]]


@contextmanager
def lend_state(
    criterion: Callable[..., Any], ignore: Collection[str] = (), *, cautious: bool = False
) -> Iterator[Callable[..., Any]]:
    """Yield a criterion that works on copies; afterwards it has its own state back, untouched.

    Copies, and not a restored original: what autograd keeps of the call must not change under it.
    `cautious` also keeps the values of trained parameters, to restore them before an error.
    """
    with Loan(ignore, cautious) as loan:
        yield loan.lend_all(criterion)
    loan.check_trained()


class Loan(ExitStack):
    """A walk through what a criterion holds; leaving it undoes every change.

    Containers and tensors are replaced by copies. Objects, modules and functions stay themselves,
    for others may hold them too; what they hold is swapped, and swapped back by a callback.
    """

    def __init__(self, ignore: Collection[str] = (), cautious: bool = False) -> None:
        super().__init__()
        self.ignore, self.cautious = ignore, cautious
        # By id, so that what is shared stays shared; holding the original keeps its id its own.
        self.lent: dict[int, tuple[Any, Any]] = {}
        self.storages: dict[int, Any] = {}
        self.trained: list[tuple[str, Tensor, int, Tensor, Tensor | None]] = []
        self.package = ""
        # Of classes and imported modules, only what some code names is looked at.
        self.kinds: dict[Any, int] = {}
        self.names = {"__call__", "forward"}

    def lend_all(self, criterion: Callable[..., Any]) -> Callable[..., Any]:
        """Return a copy of the criterion, or itself after its parts were swapped for copies."""
        base: Any = criterion
        while isinstance(base, partial):
            base = base.func
        self.package = _name_package(getattr(base, "__func__", base))
        lent: Callable[..., Any] = self.lend(criterion)
        # Methods name further attributes and classes, which hold further methods: until no more.
        visited: set[tuple[Any, str]] = set()
        while todo := {(k, n) for k in self.kinds for n in self.names & vars(k).keys()} - visited:
            visited |= todo
            for kind, name in todo:
                part = vars(kind)[name]
                # Of a bound or class method what it wraps, of a property its getter.
                function = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(function, FunctionType):
                    self.lend(function, depth=self.kinds[kind])
                elif not hasattr(part, "__get__"):
                    self._swap(partial(_assign, kind), {name: part}, "", self.kinds[kind])
        return lent

    def lend(self, value: Any, name: str = "", depth: int = _DEPTH) -> Any:
        """Return a copy of a value, or the value itself after its parts were swapped for copies."""
        if isinstance(value, (*_PLAIN, type, ModuleType)):
            self._note_kind(value, depth)
            return value
        if id(value) in self.lent:
            return self.lent[id(value)][1]
        near = isinstance(value, _HOLDERS) or _name_package(value) == self.package
        # What lies too deep is left, and not noted: it may be met again from nearer.
        if depth <= 0 and not (near or isinstance(value, Tensor)):
            return value
        # Noted before its parts are walked, which may refer back to it.
        self.lent[id(value)] = value, value
        lend = self._lend_tensor if isinstance(value, Tensor) else self._lend_parts
        self.lent[id(value)] = value, lend(value, name, depth - (not near))
        return self.lent[id(value)][1]

    def _note_kind(self, kind: Any, depth: int) -> None:
        known = isinstance(kind, ModuleType) and _name_package(kind) in sys.stdlib_module_names
        if depth > 0 and not (known or isinstance(kind, _PLAIN) or _is_stateless(kind)):
            self.kinds.setdefault(kind, depth)

    def _lend_tensor(self, value: Tensor, name: str, _depth: int) -> Tensor:
        if value.requires_grad and value.is_leaf:
            # The gradient of a copy would be lost, so trained parameters are only watched.
            kept = value.detach().clone() if self.cautious else None
            self.trained.append((name.lstrip("."), value, value._version, value.detach(), kept))
            return value
        pointer = _find_memory(value)
        # Of what is computed from trained tensors, a clone keeps the graph.
        if value.requires_grad or value.is_conj() or not pointer:
            return value.clone()
        # Copies of two views of one memory are views of one memory, too.
        if pointer not in self.storages:
            self.storages[pointer] = value.untyped_storage().clone()
        place = value.storage_offset(), value.shape, value.stride()
        return value.new_empty(0).set_(self.storages[pointer], *place)

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
            held = value.func, value.args, value.keywords
            function, arguments, options = (self.lend(part, name, depth) for part in held)
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
            for kind in type(owner).__mro__:
                self._note_kind(kind, _DEPTH)
        # Callbacks run last first: values come back before names that are new are dropped.
        for space in _list_spaces(owner):
            self.callback(self._drop_new, space, name, set(space))
        for store, held in _list_parts(owner):
            self._swap(store, held, name, depth)
        # Children stay in place: hooks and optimizers hold them.
        if isinstance(owner, nn.Module):
            for key, child in owner.named_children():
                self.lend(child, f"{name}.{key}", depth)

    def _swap(
        self, store: Callable[..., None], held: dict[str, Any], name: str, depth: int
    ) -> None:
        kept = {key: part for key, part in held.items() if not self._ignores(f"{name}.{key}")}
        self.callback(store, kept)
        for key, part in kept.items():
            stand_in = self.lend(part, f"{name}.{key}", depth)
            if stand_in is not part:
                store({key: stand_in})

    def _drop_new(self, space: dict[str, Any], name: str, known: Collection[str]) -> None:
        for key in space.keys() - known:
            if not self._ignores(f"{name}.{key}"):
                del space[key]

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


def _list_parts(owner: Any) -> Iterator[Part]:
    """Yield what an object holds: a module's registries, attributes, slots, what code closes over.

    Past __setattr__, which a module, a proxy or a frozen object may have of its own.
    """
    for space in _list_spaces(owner):
        yield space.update, {key: space[key] for key in space if key not in _MODULE_INTERNALS}
    if _is_stateless(owner):
        return
    slots = {
        key: getattr(owner, key)
        for kind in type(owner).__mro__
        if "__slots__" in vars(kind)
        for key, part in vars(kind).items()
        if isinstance(part, MemberDescriptorType) and hasattr(owner, key)
    }
    yield partial(_assign, owner), slots
    if isinstance(owner, FunctionType):
        for key, cell in zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True):
            with suppress(ValueError):  # A cell may be empty.
                yield partial(_fill, cell), {key: cell.cell_contents}
        defaults = ("__defaults__", "__kwdefaults__")
        yield partial(_assign, owner), {key: getattr(owner, key) for key in defaults}
        used = owner.__globals__
        yield used.update, {key: used[key] for key in _list_names(owner) & used.keys()}


def _find_memory(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; 0 where it has none that could be shared."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _list_spaces(owner: Any) -> list[dict[str, Any]]:
    own = [] if _is_stateless(owner) else [getattr(owner, "__dict__", {})]
    return [owner._buffers, owner._parameters, *own] if isinstance(owner, nn.Module) else own


def _fill(cell: CellType, held: dict[str, Any]) -> None:
    (cell.cell_contents,) = held.values()


def _assign(owner: Any, held: dict[str, Any]) -> None:
    put: Any = setattr if isinstance(owner, type) else object.__setattr__
    for key, value in held.items():
        # Not every class lets itself be written to.
        if getattr(owner, key, None) is not value:
            put(owner, key, value)


def _list_names(function: FunctionType) -> set[str]:
    """Return the names of the globals and attributes that a function mentions."""
    return {name for code in list_codes(function.__code__) for name in code.co_names}


def list_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those inside it."""
    yield code
    for part in code.co_consts:
        yield from list_codes(part) if isinstance(part, CodeType) else ()


def _name_home(thing: Any) -> str:
    """Name the module where a function, a class or the class of an object is defined."""
    if isinstance(thing, ModuleType):
        return thing.__name__
    named = thing if isinstance(thing, (FunctionType, type)) else type(thing)
    return f"{named.__module__}"


def _name_package(thing: Any) -> str:
    return _name_home(thing).partition(".")[0]


def _is_stateless(thing: Any) -> bool:
    return f"{_name_home(thing)}.".startswith(_STATELESS)


@contextmanager
def lend_buffers(criterion: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Do what `lend_state` does in a way that can be traced, for what `is_traceable`.

    Dynamo refuses to trace a module whose plain attributes change: that takes a graph break.
    """
    owners = list(criterion.modules()) if isinstance(criterion, nn.Module) else []
    saved = [_list_attributes(owner) for owner in owners]
    copies: dict[int, Tensor] = {}
    try:
        for owner, attributes in zip(owners, saved, strict=True):
            # Numbers need no copy: setting the saved ones back is enough.
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


def is_library(criterion: object) -> bool:
    """Tell whether a criterion is a loss of this package, or a function of torch: no state."""
    for function in _FUNCTIONS:
        if criterion is function:
            return True
    return type(criterion).__module__.startswith("mixmask.losses.")


def is_traceable(whole: Any) -> bool:
    """Tell whether the state of `whole.criterion` lies in tensors and numbers of its modules."""
    criterion = whole.criterion
    with Loan() as loan:
        loan.lend_all(criterion)
    modules = list(criterion.modules()) if isinstance(criterion, nn.Module) else []
    tensors = [part for one in modules for part in _list_attributes(one).values()]
    tensors = [part for part in tensors if isinstance(part, Tensor)]
    # Copies of views would be no views: the walk outside of the graph sees to them.
    pointers = Counter({id(one): _find_memory(one) for one in tensors}.values())
    if any(pointer and count > 1 for pointer, count in pointers.items()):
        return False
    lent = [value for value, _ in loan.lent.values()]
    options = [one.keywords for one in lent if isinstance(one, partial)]
    trained = [one for _, one, *_ in loan.trained]
    known = {id(one) for one in [*modules, *tensors, *options, *trained]}
    read: set[str] = set()
    stored: set[str] = set()
    for value in lent:
        if isinstance(value, FunctionType):
            # Numbers that a function reads are constants, unless some code rebinds the name.
            parts = [part for _, held in _list_parts(value) for part in held.items()]
            read |= {name for name, part in parts if isinstance(part, _PLAIN)}
            steps = [
                one for code in list_codes(value.__code__) for one in dis.get_instructions(code)
            ]
            stored |= {f"{one.argval}" for one in steps if "STORE_" in one.opname}
        elif not (id(value) in known or isinstance(value, (MethodType, partial, tuple))):
            return False
    for kind in loan.kinds:
        read |= {name for name, part in vars(kind).items() if isinstance(part, _PLAIN)}
    return not read & stored


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
is_traceable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _list_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's buffers and, where it may change them, its plain attributes."""
    own = {} if _is_stateless(module) else vars(module)
    return {name: own[name] for name in own if name not in _MODULE_INTERNALS} | module._buffers
