"""A pretended accelerator: tensors that Python sees on `cuda:0`, with values, and who waits for it.

C++ sees the tensors on the meta device, so that every operator, copy and factory arrives at a
dispatch mode. It computes them on the CPU. It refuses what a real device would refuse (tensors of
two devices, a generator of another one), and in the steady state whatever makes the host wait.

The rules for copies are CUDA's: one without `non_blocking` waits, and so may one from pageable
memory beyond what is staged at once. Stricter than torch is that tensors of the host are refused
also where they hold one number, but for other libraries, and indexing by a mask also where it sets
one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from pretended_known import Known
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mixmask

DEVICE = torch.device("cuda:0")

_HOST, _META = torch.device("cpu"), torch.device("meta")
_PACKAGE = Path(mixmask.__file__).parent
_LIBRARY = Path(torch.__file__).parent
_TESTS = Path(__file__).parents[1]
# What only passes copies on: the place is where they are asked for.
_PASSING = ("_devices.py",)
# Bytes of pageable memory that a copy to the device takes along without a wait.
_STAGED = 2**16
# Operators whose result, its shape, or whether they converged, has to be known on the host.
_WAITING = frozenset({
    "_linalg_eigh", "_linalg_svd", "_local_scalar_dense", "_unique2", "bincount", "equal",
    "is_nonzero", "item", "masked_select", "nonzero", "unique_consecutive", "unique_dim",
})  # fmt: skip
_INDEXING = frozenset({"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"})
_DATA: Any = Tensor.data
_BUILDERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_HostGenerator = torch.Generator


class BreachError(AssertionError):
    """What a device would refuse or, in the steady state, what would wait for it."""


class PretendedTensor(Tensor):
    """A tensor on the pretended device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[PretendedTensor], held: Tensor) -> PretendedTensor:
        tensor: PretendedTensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_META,
        )
        tensor.held = held
        return tensor

    device = property(lambda _: DEVICE)
    is_cuda = property(lambda _: True)
    is_meta = property(lambda _: False)
    data = property(lambda self: _DATA.__get__(self), lambda self, new: self._replace(new))
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def _replace(self, new: PretendedTensor) -> None:
        _DATA.__set__(self, new)
        self.held = new.held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse operators that nobody watches."""
        del types, args, kwargs
        raise RuntimeError(f"{func} on the pretended device, outside of pretend()")


class _GeneratorKind(type(_HostGenerator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _HostGenerator)


class _PretendedGenerator(_HostGenerator, metaclass=_GeneratorKind):
    """A generator that Python sees on the device it was asked for."""

    def __new__(cls, device: torch.device | str = "cpu") -> Any:
        if torch.device(device).type == "cpu":
            return _HostGenerator()
        return super().__new__(cls)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        del device

    device = property(lambda _: DEVICE)


@dataclass
class _Operands:
    """The arguments of an operator as the CPU takes them, and what was among them."""

    pretended: dict[int, PretendedTensor] = field(default_factory=dict)
    plain: list[Tensor] = field(default_factory=list)
    placed: bool = False
    generators: bool = False

    def lower(self, value: Any) -> Any:
        if isinstance(value, PretendedTensor):
            self.pretended[id(value.held)] = value
            return value.held
        if isinstance(value, Tensor):
            if value.is_meta:
                raise BreachError(
                    f"a tensor {tuple(value.shape)} was made without values {_describe()}"
                )
            self.plain.append(value)
        elif isinstance(value, torch.device) and value.type == "meta":
            self.placed = True
            return _HOST
        elif isinstance(value, _HostGenerator):
            self.generators = True
        elif isinstance(value, (list, tuple)):
            return type(value)(self.lower(part) for part in value)
        return value

    def lift(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # What an operator wrote in place is the tensor that it was given.
            given = self.pretended.get(id(value))
            return PretendedTensor(value) if given is None else given
        if isinstance(value, (list, tuple)):
            return type(value)(self.lift(part) for part in value)
        return value


class Accelerator(TorchDispatchMode):
    """The pretended device, in front of every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steady = False
        self.known: tuple[Known, ...] = ()
        self.met: set[Known] = set()
        self.refused: list[BreachError] = []
        self.counts: Counter[tuple[str, str]] | None = None
        self.pinned: dict[int, Tensor] = {}
        # Python's generators do not reach the dispatcher; the call's own is kept here.
        self.generator: torch.Generator | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Nothing is compiled here, and so the compiler is not imported.

    @contextmanager
    def watched(self, *known: Known) -> Iterator[None]:
        """Refuse every wait but the known ones, and afterwards known ones that were not met."""
        self.steady, self.known, self.met, self.refused = True, known, set(), []
        try:
            yield
        finally:
            self.steady = False
        for error in self.refused:  # What was raised may have been caught.
            raise error
        gone = [f"{one.operator} in {one.place}" for one in known if one not in self.met]
        if gone:
            raise BreachError(
                f"listed, but no longer there: {', '.join(gone)}; take it off the list"
            )

    @contextmanager
    def counted(self) -> Iterator[Counter[tuple[str, str]]]:
        """Count waits by operator and innermost function, whoever's it is, and refuse none."""
        self.steady, self.counts = True, Counter()
        try:
            yield self.counts
        finally:
            self.steady, self.counts = False, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operator on the CPU, if a real device would."""
        del types
        operands = _Operands()
        lowered = operands.lower(args)
        options = {name: operands.lower(value) for name, value in (kwargs or {}).items()}
        name = func.overloadpacket.__name__
        if not (operands.pretended or operands.placed):
            if operands.generators and type(self.generator) is _PretendedGenerator:
                raise BreachError(f"{name} on the host got a generator of {DEVICE} {_describe()}")
            return func(*lowered, **options)
        if name == "_to_copy":
            there = options.get("device") is None or operands.placed
            self._check_copy(name, args[0], there, bool(options.get("non_blocking")))
            copied = func(*lowered, **options)
            return operands.lift(copied) if there else copied
        if name == "copy_":
            waits_not = bool(args[2:] and args[2]) or bool(options.get("non_blocking"))
            self._check_copy(name, args[1], isinstance(args[0], PretendedTensor), waits_not)
            func(*lowered, **options)
            return args[0]
        plain = [one for one in operands.plain if one.ndim or _is_own(_find_innermost())]
        if plain:
            shape = tuple(plain[0].shape)
            raise BreachError(f"{name} got tensors of {DEVICE} and a host's {shape} {_describe()}")
        if operands.generators and type(self.generator) is not _PretendedGenerator:
            raise BreachError(f"{name} on {DEVICE} got a generator of the host {_describe()}")
        if _needs_values(name, lowered, options):
            self.note(name, "needs values on the host")
        return operands.lift(func(*lowered, **options))

    def _check_copy(self, name: str, source: Tensor, there: bool, non_blocking: bool) -> None:
        """Note a copy between host and device that waits."""
        here = isinstance(source, PretendedTensor)
        if here and not there:
            # Unless the copy is waited for, its values may not have arrived.
            self.note(name, "copies to the host")
        if here or not there:
            return
        size = source.numel() * source.element_size()
        if not non_blocking:
            self.note(name, f"copies {tuple(source.shape)} to {DEVICE} and blocks")
        elif size > _STAGED and not self.is_pinned(source):
            self.note(name, f"copies {size} bytes to {DEVICE} from pageable memory")

    def is_pinned(self, tensor: Tensor) -> bool:
        """Tell whether a tensor of the host, or what it is a view of, was pinned."""
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        """Pretend to pin a new tensor."""
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def note(self, name: str, what: str) -> None:
        """Refuse what makes the host wait in the steady state, unless it is known."""
        if not self.steady:
            return
        if self.counts is not None:
            frame = _find_innermost()
            self.counts[name, f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
            return
        place = _find_place()[1]
        for one in self.known:
            if (one.operator, one.place) == (name, place):
                self.met.add(one)
                return
        self.refused.append(BreachError(f"{name} {what} {_describe()}"))
        raise self.refused[-1]


class _PythonSide(TorchFunctionMode):
    """Send what names the device to C++'s meta device, before torch looks for a driver."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        del types
        args = [_translate(value) for value in args]
        options = {name: _translate(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.cuda:
            return args[0].to(_META, non_blocking=options.get("non_blocking", False))
        if func is Tensor.pin_memory:
            return self.accelerator.pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self.accelerator.is_pinned(args[0])
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], PretendedTensor):
            self.accelerator.note(func.__name__, "copies to the host")
            return func(args[0].held, *args[1:], **options)
        if func in _BUILDERS:
            return _build(func, args, options)
        pinned = options.pop("pin_memory", False)
        outer, self.accelerator.generator = self.accelerator.generator, options.get("generator")
        try:
            result = func(*args, **options)
        finally:
            self.accelerator.generator = outer
        return self.accelerator.pin(result) if pinned else result


def _translate(value: Any) -> Any:
    named = isinstance(value, str) and value.partition(":")[0] == DEVICE.type
    placed = isinstance(value, torch.device) and value.type == DEVICE.type
    return _META if named or placed else value


def _build(func: Callable[..., Tensor], args: list[Any], options: dict[str, Any]) -> Tensor:
    """Build a tensor from Python's numbers: on the host, then copied as torch copies it."""
    device = options.pop("device", None)
    if func is Tensor.new_tensor:
        device = device or (_META if isinstance(args[0], PretendedTensor) else None)
        options.setdefault("dtype", args[0].dtype)
        func, args = torch.tensor, args[1:]
    if func is torch.as_tensor and isinstance(args[0], Tensor):
        device = device or (_META if isinstance(args[0], PretendedTensor) else _HOST)
        return args[0].to(device, **options)
    built = func(*args, **options)
    return built if device is None else built.to(device)


def _needs_values(name: str, args: Any, options: dict[str, Any]) -> bool:
    if name == "repeat_interleave":
        return options.get("output_size") is None
    # How many entries a mask chooses is known to the device alone.
    masks = name in _INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    return masks or name in _WAITING


def _find_place() -> tuple[str, str]:
    """Return the innermost line of the package, or of a test, and the function it stands in."""
    for frame in _frames():
        file = Path(frame.f_code.co_filename)
        if file.name not in _PASSING and file.is_relative_to(_PACKAGE):
            short = file.relative_to(_PACKAGE).as_posix()
            return f"mixmask/{short}:{frame.f_lineno}", f"{short}:{frame.f_code.co_name}"
    outside = _find_innermost()
    file, line = Path(outside.f_code.co_filename), outside.f_lineno
    return f"{file.name}:{line}", f"{file.name}:{outside.f_code.co_name}"


def _find_innermost() -> FrameType:
    """Return the innermost frame outside of torch."""
    files = ((frame, Path(frame.f_code.co_filename)) for frame in _frames())
    return next(
        frame
        for frame, file in files
        if file != Path(__file__) and not file.is_relative_to(_LIBRARY)
    )


def _is_own(frame: FrameType) -> bool:
    file = Path(frame.f_code.co_filename)
    return file.is_relative_to(_PACKAGE) or file.is_relative_to(_TESTS)


def _describe() -> str:
    line, function = _find_place()
    return f"at {line} in {function.partition(':')[2]}"


def _frames() -> Iterable[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def pretend() -> Iterator[Accelerator]:
    """Let Python see the accelerator `DEVICE`, until the end of the block."""
    accelerator = Accelerator()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", _PretendedGenerator))
        available = "torch.cuda.amp.common.amp_definitely_not_available"
        stack.enter_context(mock.patch(available, return_value=False))
        stack.enter_context(accelerator)
        stack.enter_context(_PythonSide(accelerator))
        yield accelerator
