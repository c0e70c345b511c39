"""The state of a criterion where torch.compile looks on: that of its modules, or nothing."""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.losses._state import (
    MODULE_INTERNALS,
    PLAIN,
    Loan,
    find_memory,
    is_stateless,
    list_codes,
    list_parts,
)

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


@contextmanager
def lend_buffers(criterion: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Do what `lend_state` does in a way that can be traced, for what `is_traceable`.

    Dynamo refuses to trace a module whose plain attributes change: that takes a graph break.
    """
    owners = list(criterion.modules()) if isinstance(criterion, nn.Module) else []
    saved = [list_attributes(owner) for owner in owners]
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
            for name in list_attributes(owner).keys() - attributes.keys():
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
    tensors = [part for one in modules for part in list_attributes(one).values()]
    tensors = [part for part in tensors if isinstance(part, Tensor)]
    # Copies of views would be no views: the walk outside of the graph sees to them.
    pointers = Counter({id(one): find_memory(one) for one in tensors}.values())
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
            parts = [part for _, held in list_parts(value) for part in held.items()]
            read |= {name for name, part in parts if isinstance(part, PLAIN)}
            steps = [
                one for code in list_codes(value.__code__) for one in dis.get_instructions(code)
            ]
            stored |= {f"{one.argval}" for one in steps if "STORE_" in one.opname}
        elif not (id(value) in known or isinstance(value, (MethodType, partial, tuple))):
            return False
    for kind in loan.kinds:
        read |= {name for name, part in vars(kind).items() if isinstance(part, PLAIN)}
    return not read & stored


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
is_traceable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def list_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's buffers and, where it may change them, its plain attributes."""
    own = {} if is_stateless(module) else vars(module)
    return {name: own[name] for name in own if name not in MODULE_INTERNALS} | module._buffers
