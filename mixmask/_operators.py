"""Loops and draws that torch.compile and torch.export take as one node, whatever the sizes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# And not torch.library.custom_op, whose first call imports the whole compiler.
_LIBRARY = torch.library.Library("mixmask", "FRAGMENT")


def as_operator(signature: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a function an operator where it is traced; elsewhere it is called as it is.

    Args:
        signature: As in "(Tensor rows, SymInt n) -> Tensor". A size that is an `int` and no
            `SymInt` makes the compiler start anew for each value of it.
        fake: Returns empty tensors of the shapes and dtypes that the function returns.
    """

    def register(function: Function) -> Function:
        name = function.__name__.lstrip("_")
        _LIBRARY.define(f"{name}{signature}")
        # A factory has no tensor whose device would choose the kernel.
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mixmask::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.mixmask, name).default

        def call(*args: Any) -> Any:
            return operator(*args) if torch.compiler.is_compiling() else function(*args)

        call.__doc__ = function.__doc__
        return cast("Function", call)

    return register


def seeded(seed: Tensor, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that starts from a drawn seed."""
    return torch.Generator(device).manual_seed(int(seed))
