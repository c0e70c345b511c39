"""Random views: their shape, range, seeds, and what each option does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kornia
import pytest
import torch
from kornia.augmentation.random_generator import ColorJitterGenerator, ResizedCropGenerator
from torch import Tensor

from mixmask.data.views import (
    RandomView,
    ViewParameters,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    denormalize,
    normalize,
    random_boxes,
    shift_hue,
)


def photographs(n: int = 6) -> torch.Tensor:
    return torch.randint(256, (n, 3, 40, 40), dtype=torch.uint8)


def test_normalize_round_trip() -> None:
    images = photographs()
    torch.testing.assert_close(denormalize(normalize(images)), images / 255)


def test_view_has_the_asked_size_and_differs_each_time() -> None:
    view, images = RandomView(24, blur=0.5), photographs()
    first, second = view(images), view(images)
    assert first.shape == (6, 3, 24, 24)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)


def test_views_follow_the_global_seed() -> None:
    view, images = RandomView(24, blur=0.5), photographs()
    torch.manual_seed(7)
    first = view(images)
    torch.manual_seed(7)
    assert torch.equal(view(images), first)


def test_without_randomness_a_view_is_the_image() -> None:
    view, images = RandomView(40, min_scale=1.0, jitter=0, hue=0, grey=0), photographs()
    # What is left is the crop's aspect ratio, the flip, and rounding.
    images = images[:, :, :1, :1].expand(-1, -1, 40, 40).contiguous()
    torch.testing.assert_close(view(images), normalize(images), atol=1e-4, rtol=0)


def test_grey_views_have_equal_channels() -> None:
    images = denormalize(RandomView(24, grey=1.0)(photographs()))
    torch.testing.assert_close(images[:, 0], images[:, 1], atol=1e-4, rtol=0)


def plain(n: int, height: int, width: int) -> ViewParameters:
    """Parameters that change nothing but the size."""
    whole = torch.tensor([0.0, 0.0, width, height]).expand(n, 4)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].expand(4, n)
    no = torch.zeros(n, dtype=torch.bool)
    return ViewParameters(whole, no, neutral, (0, 1, 2, 3), no, torch.zeros(n))


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, kornia.enhance.adjust_brightness_accumulative, 0.0, 2.0),
        (adjust_contrast, kornia.enhance.adjust_contrast_with_mean_subtraction, 0.0, 2.0),
        (adjust_saturation, kornia.enhance.adjust_saturation_with_gray_subtraction, 0.0, 2.0),
        (shift_hue, lambda x, f: kornia.enhance.adjust_hue(x, 2 * torch.pi * f), -0.5, 0.5),
    ],
)
def test_colours_are_adjusted_as_by_kornia(ours: Any, theirs: Any, low: float, high: float) -> None:
    x = torch.rand(64, 3, 9, 7)
    x[0], x[1], x[2, 1:] = 0.0, 0.5, 0.0  # Black, grey and pure red have hues of their own.
    x[3, 1] = x[3, 0]  # Two channels that are both the largest.
    factor = low + torch.rand(64) * (high - low)
    mine = ours(x.clone(), factor[:, None, None, None])
    torch.testing.assert_close(mine, theirs(x, factor), atol=5e-6, rtol=0)


def test_crops_and_flips_are_those_of_kornia() -> None:
    images = photographs(16)
    drawn = replace(plain(16, 40, 40), boxes=random_boxes(16, 40, 40, 0.1))
    left, top, w, h = drawn.boxes.unbind(1)
    right, bottom = left + w - 1, top + h - 1
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    boxes = torch.stack([torch.stack(corner, dim=1) for corner in corners], dim=1)
    cropped = kornia.geometry.transform.crop_and_resize(
        images.float() / 255, boxes, (24, 24), align_corners=True
    )
    view = RandomView(24)
    torch.testing.assert_close(denormalize(view(images, drawn)), cropped, atol=2e-4, rtol=0)
    flipped = view(images, replace(drawn, flipped=torch.arange(16) % 2 == 0))
    cropped[::2] = cropped[::2].flip(3)
    torch.testing.assert_close(denormalize(flipped), cropped, atol=2e-4, rtol=0)


def test_only_the_chosen_views_are_blurred_and_as_by_kornia() -> None:
    images = photographs(8)
    sigma = torch.tensor([0.0, 0.3, 2.0, 0.0, 1.0, 0.1, 0.0, 0.7])
    view = RandomView(40, blur=0.5, crop=False)
    blurred = denormalize(view(images, replace(plain(8, 40, 40), sigma=sigma)))
    expected = images / 255
    some = sigma > 0
    size = (view.kernel, view.kernel)
    expected[some] = kornia.filters.gaussian_blur2d(
        expected[some], size, sigma[some, None].expand(-1, 2)
    )
    torch.testing.assert_close(blurred, expected, atol=1e-5, rtol=0)
    assert (blurred[2] - images[2] / 255).abs().max() > 0.1


def test_colours_follow_the_order_drawn_and_grey_comes_last() -> None:
    images = photographs(4)
    factors = torch.tensor([0.6, 1.4, 1.6, 0.2])[:, None].expand(4, 4)
    drawn = replace(plain(4, 40, 40), factors=factors, order=(2, 0, 3, 1), grey=torch.arange(4) > 2)
    made = denormalize(RandomView(40, crop=False)(images, drawn))
    jitter = kornia.augmentation.ColorJitter(0.5, 0.5, 0.9, 0.3, order=(2, 0, 3, 1))
    named = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    parameters = dict(zip(named, factors, strict=True)) | {
        "batch_prob": torch.ones(4),
        "order": torch.tensor([2, 0, 3, 1]),
    }
    expected = jitter(images / 255, params=parameters)
    expected[3] = kornia.color.rgb_to_grayscale(expected[3])
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


def quantiles(values: Tensor) -> Tensor:
    return torch.quantile(values.double(), torch.linspace(0, 1, 11, dtype=torch.float64))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (60, 200), (200, 50)])
def test_boxes_are_distributed_as_those_of_kornia(height: int, width: int) -> None:
    n = 20_000
    boxes = random_boxes(n, height, width, 0.2)
    generator = ResizedCropGenerator((32, 32), (0.2, 1.0), (3 / 4, 4 / 3))
    generator.make_samplers(torch.device("cpu"), torch.float32)
    corners = generator(torch.Size((n, 3, height, width)))["src"]
    theirs = torch.cat([corners[:, 0], corners[:, 2] - corners[:, 0] + 1], dim=1)
    side = max(height, width)
    for number in range(4):
        if number < 2 and height != width:
            continue  # Where no try fits, ours is in the middle, as torchvision's.
        apart = quantiles(boxes[:, number]) - quantiles(theirs[:, number])
        assert apart.abs().max() < 0.03 * side
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 0] + boxes[:, 2] <= width).all()
    assert inside
    assert (boxes[:, 1] + boxes[:, 3] <= height).all()


def test_colour_factors_are_distributed_as_those_of_kornia() -> None:
    n = 20_000
    view = RandomView(32, jitter=0.4, hue=0.1, grey=0.3, blur=0.6)
    drawn = view.draw(n, 32, 32)
    generator = ColorJitterGenerator(0.4, 0.4, 0.4, 0.1)
    generator.make_samplers(torch.device("cpu"), torch.float32)
    theirs = generator(torch.Size((n,)))
    jittered = drawn.factors[0] != 1
    assert abs(float(jittered.float().mean()) - 0.8) < 0.02
    for mine, name in zip(
        drawn.factors, ("brightness", "contrast", "saturation", "hue"), strict=True
    ):
        apart = quantiles(mine[jittered]) - quantiles(theirs[f"{name}_factor"])
        assert apart.abs().max() < 0.02
    for share, expected in ((drawn.flipped, 0.5), (drawn.grey, 0.3), (drawn.sigma > 0, 0.6)):
        assert abs(float(share.float().mean()) - expected) < 0.02
    assert 0.1 <= drawn.sigma[drawn.sigma > 0].min() < drawn.sigma.max() <= 2
    assert len({view.draw(1, 32, 32).order for _ in range(200)}) == 24


def test_views_draw_nothing_on_the_device_and_can_be_made_again() -> None:
    view, images = RandomView(24, blur=0.5), photographs()
    drawn = view.draw(6, 40, 40)
    state = torch.get_rng_state()
    assert torch.equal(view(images, drawn), view(images, drawn))
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_are_left_as_they_are_where_none_is_asked_for() -> None:
    images = photographs()
    made = RandomView(40, jitter=0, hue=0, grey=0, crop=False)(images, plain(6, 40, 40))
    torch.testing.assert_close(made, normalize(images), atol=1e-5, rtol=0)
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_a_generator_decides_the_view_and_leaves_the_global_one_alone() -> None:
    view, images = RandomView(24, blur=0.5), photographs()
    before = torch.get_rng_state()
    made = [view(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_images_without_three_channels_keep_what_has_a_meaning(channels: int) -> None:
    images = torch.rand(4, channels, 40, 40)
    factors = torch.tensor([0.6, 1.4, 1.6, 0.2])[:, None].expand(4, 4)
    drawn = replace(plain(4, 40, 40), factors=factors, grey=torch.ones(4, dtype=torch.bool))
    made = RandomView(40, crop=False, grey=1.0)(images, drawn)
    bright = (images * 0.6).clamp(0, 1)
    mean = bright.mean(dim=(1, 2, 3), keepdim=True)
    expected = (bright * 1.4 - 0.4 * mean).clamp(0, 1)  # Saturation, hue and grey are left out.
    torch.testing.assert_close(denormalize(made), expected, atol=1e-5, rtol=0)
    blurred = RandomView(24, blur=1.0)(images)
    assert blurred.shape == (4, channels, 24, 24)
    assert blurred.is_contiguous(memory_format=torch.channels_last)


def test_floats_within_0_and_1_are_taken_as_they_are() -> None:
    images = photographs()
    floats = images.float() / 255
    before = floats.clone()
    drawn = RandomView(24).draw(6, 40, 40)
    view = RandomView(24, blur=0.5)
    torch.testing.assert_close(view(floats, drawn), view(images, drawn), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalize(floats), normalize(images))
    torch.testing.assert_close(normalize(floats.half()), normalize(images), atol=1e-2, rtol=0)
    assert torch.equal(floats, before)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.rand(2, 3, 8, 8) * 255, ValueError, r"within 0 ... 1, got .*; divide them by .*255"),
        (torch.rand(2, 3, 8, 8) - 0.5, ValueError, r"within 0 ... 1, got -"),
        (torch.full((2, 3, 8, 8), torch.nan), ValueError, "within 0 ... 1, got nan"),
        (torch.zeros(2, 3, 8, 8).long(), TypeError, r"uint8 or float .* got torch.int64; .*byte"),
        (
            torch.zeros(2, 32, 32, 3),
            ValueError,
            r"\(2, 32, 32, 3\); bring channels to their place",
        ),
        (torch.zeros(3, 8, 8), ValueError, r"got \(3, 8, 8\); add the batch's axis with images"),
        (torch.zeros(8), ValueError, r"got \(8,\); pass a batch of images"),
        ([torch.zeros(3, 8, 8)], TypeError, "got list; use torch.stack for a list of tensors"),
        (torch.zeros(2, 3, 8, 8).numpy(), TypeError, r"got ndarray; .* torch.from_numpy for an"),
    ],
)
def test_what_views_cannot_take_is_refused(
    images: Any, error: type[Exception], message: str
) -> None:
    for function in (RandomView(8), normalize):
        with pytest.raises(error, match=message):
            function(images)
