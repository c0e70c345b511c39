"""Who is mixed with whom: partners as an index over the batch, nobody with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from mixmask._checks import check_choice, check_generator
from mixmask._devices import move

# "reverse", "random", or an index (N,).
Partner = str | Tensor


def choose_partners(
    partner: Partner, n: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Return the partners as an index tensor (n,) on the device."""
    if isinstance(partner, Tensor):
        return move(_check_partner(partner, n), device)
    if not isinstance(partner, str):
        raise TypeError(
            f"partner must be 'reverse', 'random' or an index tensor, got "
            f"{type(partner).__name__}; use torch.tensor(partner)"
        )
    check_choice("partner", partner, ("reverse", "random"))
    if partner == "reverse":
        return _reverse(n, device)
    check_generator(generator)
    # A permutation read as a ring: each image's partner is the one before it.
    ring = torch.randperm(n, generator=generator, device="cpu")
    return move(torch.empty_like(ring).index_copy_(0, ring, ring.roll(1)), device)


def _reverse(n: int, device: torch.device) -> Tensor:
    index = torch.arange(n - 1, -1, -1, device=device)
    if n % 2 == 0:
        return index
    # Reversal would pair the middle of an odd batch with itself: the middle three form a ring.
    middle = n // 2
    ends = index[: middle - 1], index[middle + 2 :]
    ring = torch.arange(middle - 1, middle + 2, device=device).roll(-1)
    return torch.cat([ends[0], ring, ends[1]])


def _check_partner(partner: Tensor, n: int) -> Tensor:
    if partner.is_floating_point() or partner.is_complex() or partner.dtype == torch.bool:
        raise TypeError(f"partner must hold integer indices, got {partner.dtype}; use torch.long")
    if partner.shape != (n,):
        raise ValueError(
            f"partner must be ({n},), one index per image, got {tuple(partner.shape)}; "
            "draw it with torch.randperm(len(images))"
        )
    # Looking at values on a device would wait for it; there, indexing itself is checked.
    if partner.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(partner.min()), int(partner.max())
        if low < 0 or high >= n:
            raise ValueError(
                f"partner must lie within 0 ... {n - 1}, got {low} ... {high}; "
                "draw it with torch.randperm(len(images))"
            )
    return partner.long()
