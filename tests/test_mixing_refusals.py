"""Bad images, partners, masks and options of mixtures are refused, with a fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixmask import (
    BlockMaskGenerator,
    MixedBatch,
    MixMask,
    cutmix_batch,
    erase_batch,
    mix_batch,
    mixup_batch,
)

EIGHT = torch.rand(4, 3, 8, 8)
MASK = torch.eye(8, dtype=torch.bool)


@pytest.mark.parametrize("mixture", [mix_batch, erase_batch, mixup_batch, cutmix_batch])
@pytest.mark.parametrize(
    "images, error, text",
    [
        (torch.rand(3, 8, 8), ValueError, r"must be \(N, C, H, W\), got \(3, 8, 8\); mix whole"),
        (torch.rand(4, 2, 3, 8, 8), ValueError, r"got \(4, 2, 3, 8, 8\); .* as in images\[:, 0\]"),
        (torch.rand(4, 16), ValueError, r"got \(4, 16\); pass the images, not their embeddings"),
        ([torch.rand(4, 3, 8, 8)] * 2, TypeError, r"got list of 2; mix each .* as in images\[0\]"),
        ({"x": torch.rand(4, 3, 8, 8)}, TypeError, r"got dict; pass the one .* out of 'x'"),
        (torch.rand(0, 3, 8, 8), ValueError, r"not be empty, got \(0, 3, 8, 8\); skip empty"),
        (torch.rand(4, 3, 0, 8), ValueError, r"not be empty, got \(4, 3, 0, 8\); skip empty"),
        (torch.ones(4, 3, 8, 8).int(), TypeError, r"floating or uint8, got torch\.int32; conv"),
        (torch.ones(4, 3, 8, 8).bool(), TypeError, r"floating or uint8, got torch\.bool; conv"),
        (
            [torch.rand(3, 8, 8)],
            TypeError,
            r"must be a tensor \(N, C, H, W\), got list of 1; stack",
        ),
    ],
)
def test_bad_images_are_refused(
    mixture: Callable[..., MixedBatch], images: Any, error: type[Exception], text: str
) -> None:
    arguments = (images, MASK) if mixture in (mix_batch, erase_batch) else (images,)
    with pytest.raises(error, match=text):
        mixture(*arguments)


@pytest.mark.parametrize(
    "mixture",
    [
        lambda x: mix_batch(x, MASK),
        mixup_batch,
        cutmix_batch,
        MixMask(4),
        MixMask(4, per_sample=True),
    ],
)
def test_one_image_has_no_partner(mixture: Callable[[Tensor], MixedBatch]) -> None:
    text = (
        r"a batch must hold at least two images to mix, got one; use larger batches, or drop_last"
    )
    with pytest.raises(ValueError, match=text):
        mixture(EIGHT[:1])


@pytest.mark.parametrize(
    "mixture",
    [
        lambda **kw: mix_batch(EIGHT, MASK, **kw),
        lambda **kw: mixup_batch(EIGHT, **kw),
        lambda **kw: cutmix_batch(EIGHT, **kw),
    ],
)
@pytest.mark.parametrize(
    "partner, error, text",
    [
        (torch.tensor([0, 1, 2, 4]), ValueError, r"within 0 \.\.\. 3, got 0 \.\.\. 4; draw it"),
        (torch.tensor([0, 1, 2, -1]), ValueError, r"within 0 \.\.\. 3, got -1 \.\.\. 2; draw it"),
        (torch.tensor([0, 1, 2]), ValueError, r"must be \(4,\), .* got \(3,\); draw it with"),
        (torch.zeros(4, 1).long(), ValueError, r"must be \(4,\), .* got \(4, 1\); draw it with"),
        (torch.zeros(4), TypeError, r"integer indices, got torch\.float32; use torch\.long"),
        (torch.zeros(4).bool(), TypeError, r"integer indices, got torch\.bool; use torch\.long"),
        ("flip", ValueError, r"partner must be one of 'reverse', 'random', got 'flip'"),
    ],
)
def test_bad_partners_are_refused(
    mixture: Callable[..., MixedBatch], partner: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        mixture(partner=partner)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 2, 4, 4), (1, 1, 3, 4, 4)])
def test_masks_a_channel_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    images = torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"one per channel is \(1, C, h, w\) or .*, C = 3"):
        erase_batch(images, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="draw masks"):  # Mixing knows spatial masks only.
        mix_batch(images, torch.ones(4, 3, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("mixture", [mix_batch, erase_batch])
@pytest.mark.parametrize(
    "masks, error, text",
    [
        (torch.ones(5, 8, 8).bool(), ValueError, r"with N = 4, got \(5, 8, 8\); draw masks\(len"),
        (torch.ones(8).bool(), ValueError, r"with N = 4, got \(8,\); draw masks\(len"),
        (torch.ones(4, 1, 8, 8).bool(), ValueError, r"N = 4, got \(4, 1, 8, 8\); draw masks"),
        (torch.ones(8, 8), TypeError, r"masks must be bool, got torch\.float32; use masks > 0\.5"),
        (BlockMaskGenerator(9), ValueError, r"9 x 9 cells does not fit an image of 8 x 8 pixels"),
        (torch.ones(2, 9).bool(), ValueError, r"2 x 9 cells does not fit .* 8 x 8 pixels; use a"),
        (0.5, TypeError, r"a generator or a bool tensor, got float; use for instance Block"),
    ],
)
def test_bad_masks_are_refused(
    mixture: Callable[..., MixedBatch], masks: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        mixture(EIGHT, masks)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: mixup_batch(EIGHT, alpha=0), ValueError, r"alpha must be positive .* got 0; use"),
        (lambda: cutmix_batch(EIGHT, alpha=-1.0), ValueError, r"alpha must be positive .* -1\.0"),
        (lambda: mixup_batch(EIGHT, alpha=float("inf")), ValueError, r"and finite, got inf; use"),
        (lambda: MixMask(pattern="dots"), ValueError, r"one of 'block', 'discrete', got 'dots'"),
        (lambda: MixMask(partner="self"), ValueError, r"one of 'reverse', 'random', got 'self'"),
        (lambda: MixMask(1), ValueError, r"grid_size must be at least 2, got 1"),
        (
            lambda: MixMask(pattern="discrete", roll=True),
            ValueError,
            r"roll=True needs pattern='block', got 'discrete'",
        ),
        (
            lambda: erase_batch((EIGHT * 255).byte(), MASK),
            TypeError,
            r"erase_batch needs floating images, got torch\.uint8; normalise them first",
        ),
    ],
)
def test_bad_options_are_refused(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    "mixture",
    [
        lambda generator: mix_batch(EIGHT, BlockMaskGenerator(4), generator=generator),
        lambda generator: mix_batch(EIGHT, MASK, partner="random", generator=generator),
        lambda generator: mixup_batch(EIGHT, generator=generator),
        lambda generator: cutmix_batch(EIGHT, generator=generator),
        lambda generator: erase_batch(EIGHT, MASK, generator=generator),
        lambda generator: MixMask(4)(EIGHT, generator=generator),
    ],
)
def test_what_is_no_generator_is_refused(mixture: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.Generator, got int; use torch\.Gen"):
        mixture(0)


class _Generating(nn.Module):
    """A module that draws masks, as a generator does."""

    def forward(
        self, n: int | None = None, *, device: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return BlockMaskGenerator(2)(n, device=device, generator=generator)


@pytest.mark.parametrize(
    "masks, message",
    [
        (BlockMaskGenerator, r"got the class BlockMaskGenerator; pass an instance, as Block"),
        (MixMask, r"got the class MixMask; pass an instance"),
        (MixMask(2), r"got MixMask; let MixMask mix by itself, as mix\(images\), or .* mix\.masks"),
        (nn.Identity(), r"got Identity; "),
    ],
)
def test_classes_and_modules_are_no_masks(masks: Any, message: str) -> None:
    images = torch.rand(4, 3, 8, 8)
    for mix in (mix_batch, erase_batch):
        with pytest.raises(TypeError, match=f"must be a generator or a bool tensor, {message}"):
            mix(images, masks)


def test_a_module_may_be_a_mask_generator() -> None:
    assert mix_batch(torch.rand(4, 3, 8, 8), _Generating()).lam == 0.5
