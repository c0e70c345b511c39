"""The state of a criterion where torch.compile looks on: that of its modules, or nothing."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.losses._state import (
    PLAIN,
    Loan,
    list_attributes,
    list_codes,
    list_slots,
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


def is_traceable(whole: Any) -> bool:
    """Tell whether the state of `whole.criterion` lies in tensors and numbers of its modules."""
    with _Probe(whole.criterion) as probe:
        probe.lend_all(whole.criterion)
    return not (probe.scattered or probe.plain & probe.stored)


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
is_traceable._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def is_library(criterion: object) -> bool:
    """Tell whether a criterion is a loss of this package, or a function of torch: no state."""
    # Spelt out, since Dynamo knows torch's functions by identity alone.
    for function in _FUNCTIONS:
        if criterion is function:
            return True
    return type(criterion).__module__.startswith("mixmask.losses.")


class _Probe(Loan):
    """The same walk, to see where state lies rather than to lend it."""

    def __init__(self, criterion: Any) -> None:
        super().__init__((), cautious=False)
        self.known = set(criterion.modules()) if isinstance(criterion, nn.Module) else set()
        self.scattered = False
        # Numbers that a function reads are constants, unless some code rebinds the name.
        self.plain: set[str] = set()
        self.stored: set[str] = set()

    def lend_tensor(self, value: Tensor, name: str) -> Tensor:
        """Return the tensor itself: nothing will be called."""
        del name
        return value

    def lend_parts(self, value: Any, name: str, depth: int) -> Any:
        """Note containers; what changes in one cannot be seen on the module that holds it."""
        if isinstance(value, partial):
            self.lend(value.func, name, depth)
            return self.lend((*value.args, *value.keywords.values()), name, depth)
        if isinstance(value, tuple):
            self.scattered |= any(isinstance(part, Tensor) for part in value)
        elif hasattr(value, "__len__") and not isinstance(value, nn.Module):
            self.scattered = True
        return super().lend_parts(value, name, depth)

    def swap_slots(self, owner: Any, name: str, depth: int) -> None:
        """Note what an owner holds."""
        if isinstance(owner, FunctionType):
            for code in list_codes(owner.__code__):
                stores = [one for one in dis.get_instructions(code) if "STORE_" in one.opname]
                self.stored.update(str(one.argval) for one in stores)
        for key, part, _ in list_slots(owner):
            self._note(owner, key, part)
        super().swap_slots(owner, name, depth)

    def swap_member(self, kind: type, key: str) -> None:
        """Note what a class holds."""
        self._note(kind, key, vars(kind)[key])
        super().swap_member(kind, key)

    def _note(self, owner: Any, key: str, part: Any) -> None:
        if isinstance(owner, nn.Module):
            registered = owner._parameters.get(key) is part and part is not None
            if registered and part.requires_grad:
                return
            self.scattered |= owner not in self.known or isinstance(part, nn.Parameter)
        elif not isinstance(owner, (FunctionType, type)):
            self.scattered = True
        elif isinstance(part, PLAIN):
            self.plain.add(key)
        else:
            self.scattered |= isinstance(part, Tensor)
