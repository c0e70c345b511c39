"""Seeds of draws, and of positions within a run, so that no step depends on those before."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mixmask._checks import check_generator, check_integer
from mixmask._devices import HOST


def check_seed(seed: int) -> None:
    """Require a seed that every library takes, 0 ... 2**31 - 1."""
    check_integer("--seed", seed, 0, "use for instance 0")
    if seed >= 2**31:
        raise ValueError(f"--seed must be below 2**31, got {seed}; use for instance 0")


def fold_seed(*parts: int | str) -> int:
    """Hash a seed and a position (rank, step, ...) into one seed, the same on every machine.

    Example:
        >>> fold_seed(0, 1) != fold_seed(1, 0)
        True
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def step_generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator for one position within a run; see `fold_seed`."""
    return torch.Generator().manual_seed(fold_seed(*parts))


def draw_seed(generator: torch.Generator | None) -> Tensor:
    """Draw the seed of one operator, (): one draw from the user's generator, of a fixed size."""
    check_generator(generator)
    # What is drawn is then a pure function of it, with the same values compiled and not.
    return torch.randint(2**62, (), dtype=torch.int64, generator=generator, device=HOST)
