"""Moving tensors without waiting, and memory that ran out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Bytes of pageable memory that a copy to a GPU takes along without a wait.
_STAGED = 2**16


def move(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """Return a tensor on a device, as it is for None; only a copy to the host is waited for."""
    if device is None:
        return tensor
    device = torch.device(device) if isinstance(device, str) else device
    if device.type == "cuda" and _is_large_and_pageable(tensor):
        tensor = tensor.pin_memory()
    # The host would read a copy that has not arrived; a device's own queue keeps the order.
    return tensor.to(device, non_blocking=device.type != "cpu")


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which products on a tensor's device keep their dtype."""
    if tensor.is_meta:  # autocast knows of no such device.
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(tensor.device.type, enabled=False)
    return context


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; torch raises a plain one for the host's."""
    texts = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    out = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out or any(text in str(error) for text in texts)


def _is_large_and_pageable(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return tensor.nbytes > _STAGED and not tensor.is_pinned()
