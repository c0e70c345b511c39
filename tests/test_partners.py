"""Who is mixed with whom: reversal, random rings and given partners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixmask import (
    mix_batch,
)


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape) * 255).to(dtype)


@pytest.mark.parametrize("n", range(2, 12))
def test_nobody_is_its_own_partner(n: int) -> None:
    images, mask = torch.rand(n, 1, 2, 2), torch.eye(2, dtype=torch.bool)
    everyone = torch.arange(n)
    for kind in ("reverse", "random"):
        for _ in range(20):
            partner = mix_batch(images, mask, partner=kind).partner
            assert partner.dtype == torch.int64
            assert torch.equal(partner.sort().values, everyone)
            assert not (partner == everyone).any()


def test_reversal_pairs_the_ends() -> None:
    mask = torch.eye(2, dtype=torch.bool)
    for n, expected in ((2, [1, 0]), (6, [5, 4, 3, 2, 1, 0]), (3, [1, 2, 0]), (5, [4, 2, 3, 1, 0])):
        assert mix_batch(torch.rand(n, 1, 2, 2), mask).partner.tolist() == expected


def test_random_partners_are_uniform_among_the_others() -> None:
    n, draws = 5, 4000
    images, mask = torch.rand(n, 1, 2, 2), torch.eye(2, dtype=torch.bool)
    counts = torch.zeros(n, n)
    for _ in range(draws):
        partner = mix_batch(images, mask, partner="random").partner
        counts[torch.arange(n), partner] += 1
    share = 1 / (n - 1)
    z = (counts / draws - share)[~torch.eye(n, dtype=torch.bool)] / (
        share * (1 - share) / draws
    ) ** 0.5
    assert float(z.abs().max()) < 5  # 20 pairs, each with a probability of 6e-7.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_partners_may_be_given(dtype: torch.dtype) -> None:
    images = _images(4, 3, 8, 8)
    partner = torch.tensor([0, 0, 3, 1], dtype=dtype)
    mixed = mix_batch(images, torch.zeros(8, 8, dtype=torch.bool), partner=partner)
    assert mixed.partner.dtype == torch.int64
    assert torch.equal(mixed.images, images[[0, 0, 3, 1]])
    assert len(mixed) == 4
