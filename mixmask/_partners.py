"""Which images are mixed: partners as an index over the batch, no image with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from mixmask._checks import check_choice
from mixmask._devices import as_operator, make_generator, move
from mixmask._seeds import draw_seed

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
    return move(_draw_ring(draw_seed(generator), n), device)


@as_operator("(Tensor seed, SymInt n) -> Tensor", lambda seed, n: seed.new_empty(n))
def _draw_ring(seed: Tensor, n: int) -> Tensor:
    # A permutation read as a ring: each image's partner is the one before it, so that all are
    # partners once and none is its own.
    ring = torch.randperm(n, generator=make_generator(seed), device="cpu")  # (n,)
    return torch.empty_like(ring).index_copy_(0, ring, ring.roll(1))


def _reverse(n: int, device: torch.device) -> Tensor:
    place = torch.arange(n, device=device)  # (n,)
    middle, odd = n // 2, n % 2
    # Reversal would pair the middle of an odd batch with itself: the middle three form a ring.
    # In one expression, for a compiler would start again where a batch is odd.
    return n - 1 - place + odd * ((place == middle).long() - (place == middle - 1).long())


def _check_partner(partner: Tensor, n: int) -> Tensor:
    # A bool tensor would be taken for a selection of images.
    if partner.is_floating_point() or partner.is_complex() or partner.dtype == torch.bool:
        raise TypeError(f"partner must hold integer indices, got {partner.dtype}; use torch.long")
    if partner.shape != (n,):
        raise ValueError(
            f"partner must be ({n},), one index per image, got {tuple(partner.shape)}; "
            "draw it with torch.randperm(len(images))"
        )
    # Looking at values on a device would wait for it; there, indexing itself is checked.
    return _check_range(partner.long(), n) if partner.device.type == "cpu" else partner.long()


# The result is used in the place of what was checked, or a compiler would drop the check.
@as_operator("(Tensor partner, SymInt n) -> Tensor", lambda partner, _: torch.empty_like(partner))
def _check_range(partner: Tensor, n: int) -> Tensor:
    low, high = int(partner.min()), int(partner.max())
    if low < 0 or high >= n:
        raise ValueError(
            f"partner must lie within 0 ... {n - 1}, got {low} ... {high}; "
            "draw it with torch.randperm(len(images))"
        )
    # An operator must not return its input.
    return partner.clone() if torch.compiler.is_compiling() else partner
