"""Seeds of positions within a run, so that no step depends on those before."""

from __future__ import annotations

import hashlib

import torch


def fold_seed(*parts: int | str) -> int:
    """Hash a seed and a position (rank, step, ...) into one seed, the same on every machine.

    Example:
        >>> fold_seed(0, 1) != fold_seed(1, 0)
        True
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def step_generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator for one position within a run; see `fold_seed`.

    Example:
        >>> step_generator(0, 1).initial_seed() == fold_seed(0, 1)
        True
    """
    return torch.Generator().manual_seed(fold_seed(*parts))
