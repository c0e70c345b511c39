"""Reference trainers: one readable file per method, and the loop that runs them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixmask.trainers.start import Pretrained as Pretrained
    from mixmask.trainers.start import pretrain as pretrain

__all__ = ["Pretrained", "pretrain"]


def __getattr__(name: str) -> Any:
    """Import what a notebook uses when it is asked for: it needs all of `.[train]`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mixmask.trainers.start"), name)
