"""What RandomMixMask refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kornia
import kornia.augmentation as K
import pytest
import torch
from torch import Tensor

from mixmask.integrations.kornia import RandomMixMask, take_labels

# kornia's annotation leaves out its mix augmentations.
Sequential: Any = K.AugmentationSequential
VERSION = tuple(int(part) for part in kornia.__version__.split(".")[:2])


def test_only_containers_take_labels() -> None:
    with pytest.raises(TypeError, match="must be an AugmentationSequential, got RandomMixMask"):
        take_labels(RandomMixMask(2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"grid_size": 1}, "grid_size must be at least 2, got 1"),
        ({"ratio": 0.0}, "ratio must lie strictly between 0 and 1, got 0.0"),
        ({"pattern": "blocks"}, "pattern must be one of 'block', 'discrete', got 'blocks'"),
        ({"partner": "roll"}, "partner must be one of 'reverse', 'random', got 'roll'"),
        ({"pattern": "discrete", "roll": True}, "roll=True needs pattern='block'"),
        ({"per_sample": True, "same_on_batch": True}, "set one of them"),
        ({"p": 1.5}, r"p must lie within \[0, 1\], got 1.5; use"),
        ({"p": -0.1}, r"p must lie within \[0, 1\], got -0.1; use"),
    ],
)
def test_bad_options_are_refused_at_once(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RandomMixMask(**bad)


@pytest.mark.parametrize(
    "key, value",
    [
        ("mask", torch.zeros(4, 1, 8, 8)),
        ("bbox", torch.zeros(4, 2, 4, 2)),
        ("bbox_xyxy", torch.zeros(4, 2, 4)),
        ("keypoints", torch.zeros(4, 5, 2)),
    ],
)
def test_other_data_keys_are_refused(key: str, value: Tensor) -> None:
    with pytest.raises(NotImplementedError, match=f"takes 'input' and 'class', got '{key}'"):
        RandomMixMask(data_keys=["input", key])
    mix = RandomMixMask(4)
    with pytest.raises(NotImplementedError):
        mix(torch.rand(4, 3, 8, 8), value, data_keys=["input", key])
    if VERSION >= (0, 9):  # Before, containers let them pass any mix augmentation untouched.
        views = Sequential(mix, data_keys=["input", key])
        with pytest.raises(NotImplementedError, match="takes 'input' and 'class'"):
            views(torch.rand(4, 3, 8, 8), value)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 8, 8)])
def test_a_single_image_is_refused(p: float, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two images to mix, got one"):
        RandomMixMask(4, p=p)(torch.rand(shape))


def test_bad_batches_are_refused() -> None:
    mix, new = RandomMixMask(4, data_keys=["input", "class"]), RandomMixMask(4)
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mix(images, labels)
    params = mix._params
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: new.mixed_batch(images), "params must be those of a mix, got none yet"),
        (lambda: mix(images[:, :, :3], labels), "does not fit an image of 3 x 8 pixels"),
        (lambda: mix(images, torch.zeros(4, 10)), r"labels must be \(B,\), got \(4, 10\)"),
        (lambda: mix(images, labels[:3]), "labels must be those of the 4 images"),
        (
            lambda: mix(images[:2], labels[:2], params=params),
            "images must be those of the 4 images",
        ),
        (lambda: mix.mixed_batch(images[:2], params), "images must be those of the 4 images"),
    ]
    for call, text in refused:
        with pytest.raises(ValueError, match=text):
            call()


def test_frames_of_a_video_are_mixed_only_by_draws_of_their_own() -> None:
    videos = torch.rand(3, 4, 3, 8, 8)
    apart, alike = (
        K.VideoSequential(RandomMixMask(4), data_format="BTCHW", same_on_frame=same)
        for same in (False, True)
    )
    assert apart(videos).shape == videos.shape
    with pytest.raises(ValueError, match="set same_on_frame=False"):
        alike(videos)
