from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mixmask
from mixmask import (
    BlockMaskGenerator,
    DiscreteMaskGenerator,
    MixedBatch,
    MixMask,
    cells_to_pixels,
    cutmix_batch,
    erase_batch,
    mix_batch,
    mixup_batch,
)

Golden = Callable[[str], dict[str, Tensor]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape) * 255).to(dtype)


def _mix_slowly(images: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """Eq. 1, pixel by pixel; `mask` at pixel size, (H, W) or (N, H, W)."""
    mixed = images.clone()
    n, _, height, width = images.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                kept = mask[y, x] if mask.ndim == 2 else mask[i, y, x]
                source = i if kept else int(partner[i])
                mixed[i, :, y, x] = images[source, :, y, x]
    return mixed


@pytest.fixture(params=["contiguous", "channels_last", "strided", "expanded"])
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Lay images out in memory in another way, without changing their values."""

    def strided(images: Tensor) -> Tensor:
        wide = images.new_zeros(*images.shape[:-1], 2 * images.shape[-1])
        wide[..., ::2] = images
        return wide[..., ::2]

    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda images: images.contiguous(),
        "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
        "strided": strided,
        "expanded": lambda images: images[:, :1].expand_as(images),
    }
    return layouts[request.param]


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (5, 3, 7, 9), (2, 1, 4, 4), (3, 4, 5, 11)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixing_agrees_with_a_loop(
    shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    images = layout(_images(*shape, dtype=dtype))
    before = images.clone()
    n, _, height, width = shape
    partner = torch.randperm(n)
    for masks in (
        torch.rand(3, 4) < 0.5,
        torch.rand(n, 2, 3) < 0.5,
        torch.rand(height, width) < 0.5,
    ):
        mixed = mix_batch(images, masks, partner=partner)
        mask = cells_to_pixels(masks, height, width)
        assert torch.equal(mixed.images, _mix_slowly(images, mask, partner))
        assert mixed.images.dtype == dtype
        assert mixed.mask is not None
        assert torch.equal(mixed.mask, mask)
        assert torch.equal(mixed.partner, partner)
        assert mixed.lam.dtype == torch.float32
        assert torch.equal(mixed.lam, mask.float().mean(dim=(-2, -1)))
    assert torch.equal(images, before)


def _channels_last(n: int) -> Tensor:
    return _images(n, 3, 8, 8).contiguous(memory_format=torch.channels_last)


MIXTURES: dict[str, Callable[[Tensor], MixedBatch]] = {
    "mix": lambda images: mix_batch(images, BlockMaskGenerator(4)),
    "mix per sample": lambda images: mix_batch(images, BlockMaskGenerator(4)(len(images))),
    "mixup": mixup_batch,
    "cutmix": cutmix_batch,
    "erase": lambda images: erase_batch(images, BlockMaskGenerator(4)),
}


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_channels_last_is_kept(name: str, needs_grad: bool) -> None:
    images = _channels_last(4).requires_grad_(needs_grad)
    mixed = MIXTURES[name](images)
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_pixels_that_are_no_numbers_stay_where_they_were(
    dtype: torch.dtype, bad: float, needs_grad: bool
) -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=dtype)
    images[1] = bad
    mask = torch.rand(8, 8) < 0.5
    mixed = mix_batch(images.requires_grad_(needs_grad), mask).images.detach()
    strange = ~torch.isfinite(mixed)
    assert torch.equal(strange[1], mask.expand(3, 8, 8))
    assert torch.equal(strange[2], (~mask).expand(3, 8, 8))
    assert not strange[[0, 3]].any()
    torch.testing.assert_close(
        mixed[1, :, mask], images.detach()[1, :, mask], rtol=0, atol=0, equal_nan=True
    )


def test_signed_zeros_and_tiny_numbers_survive() -> None:
    images = torch.tensor([-0.0, 1e-45, -1e-45, 0.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    mask = torch.tensor([[True, False], [False, True]])
    mixed = mix_batch(images, mask).images
    expected = _mix_slowly(images, mask, torch.tensor([3, 2, 1, 0]))
    assert torch.equal(mixed.contiguous().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_reach_the_images_they_came_from(per_sample: bool) -> None:
    images = torch.rand(5, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(5, 3, 3) < 0.5 if per_sample else torch.rand(3, 3) < 0.5
    partner = torch.tensor([1, 2, 0, 1, 1])
    weights = torch.rand(5, 2, 6, 6, dtype=torch.float64)
    mixed = mix_batch(images, masks, partner=partner)
    torch.autograd.backward((mixed.images * weights).sum())

    mask = cells_to_pixels(masks, 6, 6).expand(5, 6, 6)[:, None].double()
    expected = mask * weights
    for i in range(5):
        expected[int(partner[i])] += (1 - mask[i]) * weights[i]
    torch.testing.assert_close(images.grad, expected)


def test_gradients_of_the_other_mixtures() -> None:
    images = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def seeded(mixture: Callable[..., MixedBatch]) -> Callable[[Tensor], Tensor]:
        return lambda x: mixture(x, generator=_seeded(0)).images

    for mixture in (mixup_batch, cutmix_batch):
        assert torch.autograd.gradcheck(seeded(mixture), (images,))
    mixed = erase_batch(images, torch.eye(4, dtype=torch.bool))
    torch.autograd.backward(mixed.images.sum())
    assert images.grad is not None
    assert torch.equal(images.grad, torch.eye(4, dtype=torch.float64).expand(3, 1, 4, 4))


def test_a_generator_draws_one_mask_for_the_batch() -> None:
    images = _images(6, 3, 32, 32)
    masks = DiscreteMaskGenerator(8, 0.25)
    mixed = mix_batch(images, masks, generator=_seeded(3))
    expected = cells_to_pixels(masks(generator=_seeded(3)), 32, 32)
    assert mixed.mask is not None
    assert torch.equal(mixed.mask, expected)
    assert mixed.lam.shape == ()
    assert mixed.lam.item() == 0.25


@pytest.mark.parametrize("size", [(30, 45), (33, 33), (8, 9)])
def test_lam_is_measured_on_the_pixels(size: tuple[int, int]) -> None:
    mixed = mix_batch(_images(3, 1, *size), BlockMaskGenerator(7, 0.3)(3))
    assert mixed.mask is not None
    assert mixed.lam.tolist() == pytest.approx(
        [int(mask.sum()) / mask.numel() for mask in mixed.mask], abs=1e-7
    )


def test_mixing_matches_the_published_code(golden: Golden) -> None:
    numbers = golden("moco_mixmask")
    mixed = mix_batch(numbers["x_q"], numbers["cell_mask"].bool())
    torch.testing.assert_close(mixed.images, numbers["mixed"], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.lam, numbers["lam"], rtol=0, atol=1e-5)
    assert mixed.mask is not None
    assert torch.equal(mixed.mask, numbers["mask"].bool())
    numbers = golden("moco_both")
    mixed = mix_batch(numbers["x_q"], numbers["mask"].bool(), partner=numbers["permutation"])
    torch.testing.assert_close(mixed.images, numbers["mixed_mask"], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.lam, numbers["lam_mask"], rtol=0, atol=1e-5)


def test_mixup_matches_the_published_code(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = golden("moco_both")
    share = numbers["lam_unmix"].float()
    monkeypatch.setattr(mixmask.mixing, "_draw_shares", lambda *_: share.view(1))
    mixed = mixup_batch(numbers["x_q"])
    torch.testing.assert_close(mixed.images, numbers["mixed_unmix"], rtol=0, atol=1e-5)
    assert mixed.lam == share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_blends(dtype: torch.dtype, per_sample: bool) -> None:
    images = _images(5, 3, 8, 8, dtype=dtype)
    before = images.clone()
    mixed = mixup_batch(images, per_sample=per_sample, partner="random")
    assert mixed.images.dtype == dtype
    assert mixed.mask is None
    assert mixed.lam.shape == ((5,) if per_sample else ())
    assert mixed.lam.dtype == torch.float32
    share = mixed.lam.double().view(-1, 1, 1, 1)
    expected = share * images.double() + (1 - share) * images[mixed.partner].double()
    # uint8 is rounded to the nearest; the others are within their resolution.
    tolerance = 0.5 + 1e-4 if dtype == torch.uint8 else 255 * 4 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        tolerance = 1e-4  # The share itself is float32.
    assert float((mixed.images.double() - expected).abs().max()) <= tolerance
    assert torch.equal(images, before)


def test_mixup_rounds_bytes_and_keeps_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixmask.mixing, "_draw_shares", lambda *_: torch.tensor([0.75]))
    images = torch.tensor([0, 255, 1, 2], dtype=torch.uint8).view(4, 1, 1, 1)
    # 0.5 goes to the even neighbour, as torch.round does.
    assert mixup_batch(images).images.flatten().tolist() == [0, 192, 64, 2]
    flat = torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(mixup_batch(flat).images, flat)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_follow_beta(alpha: float) -> None:
    """Mean 1/2 and variance 1 / (4 (2α + 1)), each within five standard errors."""
    n = 20_000
    lam = mixup_batch(torch.zeros(n, 1, 1, 1), alpha=alpha, per_sample=True).lam.double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(lam.mean()) - 0.5) < 5 * (variance / n) ** 0.5
    squares = (lam - 0.5) ** 2
    error = float(squares.std()) / n**0.5
    assert abs(float(squares.mean()) - variance) < 5 * error
    assert 0 <= float(lam.min()) <= float(lam.max()) <= 1


def test_a_tiny_alpha_gives_whole_images() -> None:
    lam = mixup_batch(torch.zeros(64, 1, 1, 1), alpha=1e-300, per_sample=True).lam
    assert bool(torch.isfinite(lam).all())


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cutmix_pastes_a_box(dtype: torch.dtype, per_sample: bool) -> None:
    images = _images(6, 3, 20, 30, dtype=dtype)
    for _ in range(20):
        mixed = cutmix_batch(images, per_sample=per_sample)
        assert mixed.mask is not None
        assert torch.equal(mixed.images, _mix_by_where(images, mixed.mask, mixed.partner))
        # λ is what the box left, after clipping.
        torch.testing.assert_close(
            mixed.lam, mixed.mask.float().mean(dim=(-2, -1)), rtol=0, atol=1e-6
        )
        for mask in mixed.mask.view(-1, 20, 30):
            box = ~mask
            rows, columns = box.any(dim=1), box.any(dim=0)
            assert torch.equal(box, rows[:, None] & columns)
            for line in (rows, columns):
                assert int(line.int().diff().abs().sum()) <= 2


def _mix_by_where(images: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    return torch.where(mask.expand(len(images), -1, -1)[:, None], images, images[partner])


def test_cutmix_boxes_have_the_drawn_area(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixmask.mixing, "_draw_shares", lambda n, *_: torch.full((n,), 0.75))
    mixed = cutmix_batch(torch.rand(500, 1, 40, 60), per_sample=True)
    assert mixed.mask is not None
    # Half of each side, 20 x 30 pixels; clipping only makes boxes smaller.
    assert float(mixed.lam.min()) == 0.75
    assert float(mixed.lam.max()) < 1
    whole = mixed.mask[mixed.lam == 0.75]
    assert {tuple(map(int, ((~m).any(1).sum(), (~m).any(0).sum()))) for m in whole} == {(20, 30)}
    assert len(set((~mixed.mask).flatten(1).int().argmax(dim=1).tolist())) > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_erasing_fills_with_noise(dtype: torch.dtype) -> None:
    images = torch.full((8, 3, 32, 32), 100.0, dtype=dtype)
    before = images.clone()
    masks = BlockMaskGenerator(4, 0.25)
    mixed = erase_batch(images, masks, mean=3.0, std=2.0)
    assert mixed.images.dtype == dtype
    assert mixed.partner.tolist() == list(range(8))
    assert mixed.lam.item() == 0.25
    assert mixed.mask is not None
    assert torch.equal(mixed.images[:, :, mixed.mask], images[:, :, mixed.mask])
    noise = mixed.images[:, :, ~mixed.mask].double()
    assert abs(float(noise.mean()) - 3) < 5 * 2 / noise.numel() ** 0.5
    assert abs(float(noise.std()) - 2) < 0.1
    assert torch.equal(images, before)
    flat = erase_batch(images, mixed.mask, mean=7.0, std=0.0).images
    assert bool((flat[:, :, ~mixed.mask] == 7).all())


def test_erasing_works_on_one_image_and_on_masks_of_their_own() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert erase_batch(images, BlockMaskGenerator(2)).images.shape == images.shape
    mixed = erase_batch(torch.ones(5, 3, 8, 8), DiscreteMaskGenerator(4)(5), std=0.0)
    torch.testing.assert_close(mixed.images.mean(dim=(1, 2, 3)), mixed.lam)


@pytest.mark.parametrize("pattern", ["block", "discrete"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("partner", ["reverse", "random"])
def test_the_module_is_mix_batch(pattern: str, per_sample: bool, partner: str) -> None:
    images = _images(6, 3, 32, 32)
    module = MixMask(8, (0.2, 0.8), pattern, per_sample=per_sample, partner=partner)
    mixed = module(images, generator=_seeded(5))
    kind = BlockMaskGenerator if pattern == "block" else DiscreteMaskGenerator
    masks: Any = kind(8, (0.2, 0.8))
    generator = _seeded(5)
    if per_sample:
        masks = masks(6, generator=generator)
    expected = mix_batch(images, masks, partner=partner, generator=generator)
    assert torch.equal(mixed.images, expected.images)
    assert torch.equal(mixed.lam, expected.lam)
    assert torch.equal(mixed.partner, expected.partner)
    assert mixed.lam.shape == ((6,) if per_sample else ())
    assert not list(module.parameters())


def test_the_module_rolls() -> None:
    torch.manual_seed(1)
    masks = [MixMask(8, 0.25, roll=True)(torch.rand(2, 1, 8, 8)).mask for _ in range(300)]
    corners = sum(bool(mask[0, 0]) for mask in masks if mask is not None)
    assert abs(corners / 300 - 0.25) < 5 * (0.25 * 0.75 / 300) ** 0.5


@pytest.mark.parametrize("rows", [1, 4])
def test_erasing_takes_a_mask_a_channel(rows: int) -> None:
    images = torch.rand(4, 3, 8, 8)
    masks = torch.rand(rows, 3, 2, 2) < 0.5
    erased = erase_batch(images, masks, std=0.0, mean=9.0)
    kept = masks.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).expand(4, -1, -1, -1)
    torch.testing.assert_close(erased.images, torch.where(kept, images, torch.tensor(9.0)))
    share = kept.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(erased.lam, share[0] if rows == 1 else share)


def test_mixing_on_a_device(device: torch.device) -> None:
    images = _images(6, 3, 32, 32)
    masks = BlockMaskGenerator(4)
    expected = mix_batch(images, masks, partner="random", generator=_seeded(1))
    mixed = mix_batch(images.to(device), masks, partner="random", generator=_seeded(1))
    assert mixed.images.device.type == device.type
    assert torch.equal(mixed.images.cpu(), expected.images)
    assert torch.equal(mixed.lam.cpu(), expected.lam)
