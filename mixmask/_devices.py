"""What devices and compilers ask for: moves without waiting, and loops and draws as operators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as has_transforms
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Function = TypeVar("Function", bound=Callable[..., object])

# A device by name is parsed in each call, which single masks are slowed by.
HOST = torch.device("cpu")
# Bytes of pageable memory that a copy to a GPU takes along without a wait.
_STAGED = 2**16
# And not torch.library.custom_op, whose first call imports the whole compiler.
_LIBRARY = torch.library.Library("mixmask", "FRAGMENT")


def choose_device(name: torch.device | str | int | None) -> torch.device:
    """Return a device that can compute; for None a GPU where there is one, or the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(name, bool) or not isinstance(name, (torch.device, str, int)):
        raise TypeError(f"--device must be a device or its name, got {name!r}; use cpu or cuda:0")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # A valid name need not be that of a device here.
    except (AssertionError, OverflowError, RuntimeError, ValueError):
        raise ValueError(f"--device {name} is not available; use cpu, or leave it out") from None
    return device


def move(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """Move a tensor; `None` leaves it in place. Only copies to the host block."""
    if device is None:
        return tensor
    device = torch.device(device) if isinstance(device, str) else device
    from_host = device.type == "cuda" and tensor.device.type == "cpu" and not is_compiling()
    if from_host and tensor.nbytes > _STAGED and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # The host would read a copy that has not arrived; a device's own queue keeps the order.
    return tensor.to(device, non_blocking=device.type != "cpu")


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which products on a tensor's device keep their dtype."""
    if tensor.is_meta:  # autocast knows of no such device.
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(tensor.device.type, enabled=False)
    return context


def is_transformed() -> bool:
    """Tell whether torch.func or forward mode is at work, which follow plain operations alone."""
    # Asked for every mask: by names of this module, which are found twice as fast.
    return not is_compiling() and (has_transforms() or forward_ad._current_level >= 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; torch raises a plain one for the host's."""
    texts = (
        "can't allocate memory", "not enough memory", "Cannot allocate memory",
        "Storage size calculation overflowed",
    )  # fmt: skip
    out = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out or any(text in str(error) for text in texts)


def as_operator(signature: str, fake: Callable[..., object]) -> Callable[[Function], Function]:
    """Register a function as an operator for tracing; eager calls run it directly.

    Args:
        signature: As in "(Tensor rows, SymInt n) -> Tensor". A size that is an `int` and no
            `SymInt` makes the compiler start again for each value.
        fake: Returns empty tensors of the shapes and dtypes that the function returns.
    """

    def register(function: Function) -> Function:
        name = function.__name__.lstrip("_")
        _LIBRARY.define(f"{name}{signature}")
        # A factory has no tensor whose device would choose the kernel.
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mixmask::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.mixmask, name).default

        def call(*args: object) -> object:
            return operator(*args) if is_compiling() else function(*args)

        call.__doc__ = function.__doc__
        return cast("Function", call)

    return register


def make_generator(seed: Tensor, device: torch.device = HOST) -> torch.Generator:
    """Return a generator that starts from a drawn seed."""
    return torch.Generator(device).manual_seed(int(seed))
