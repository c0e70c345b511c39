"""Random views: their shape, range, seeds, and what each option does."""

from __future__ import annotations

import torch

from mixmask.views import RandomView, denormalize, normalize


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
