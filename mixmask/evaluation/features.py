"""From stored images to features of a frozen backbone: the one path of all evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask._checks import check_integer
from mixmask.data.sets import Images
from mixmask.data.views import IMAGENET, Normalization, check_pixels, normalize
from mixmask.runs.records import plural

# Of images that are larger than a view, the usual part is tested: 224 px of 256.
_CENTRE = 7 / 8


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Images,
    *,
    size: int | None = None,
    normalization: Normalization = IMAGENET,
    batch_size: int = 256,
) -> Tensor:
    """Compute pooled features of images, in evaluation mode, leaving the mode as it was.

    Args:
        backbone: (n, C, H, W) -> (n, D).
        images: (N, C, H, W) uint8 or float within [0, 1], a tensor or sliced like one; while a
            batch is computed, the next one is read.
        size: Height and width that the backbone sees, in pixels; see `resize`. Default: those of
            the images, which have the most detail, or the only ones that the backbone takes.
        normalization: Mean and deviation of each channel, see `normalize`.
        batch_size: Images at a time.

    Returns:
        (N, D) float32 on the backbone's device.

    Raises:
        TypeError: If the images are no tensor, or neither uint8 nor floating, or a size is no
            integer.
        ValueError: If there are no images, a size is less than 1, floats lie beyond 0 ... 1, or the
            backbone does not take images of that size.

    Example:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> extract_features(nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), images).shape
        torch.Size([2, 5])
    """
    check_integer("batch_size", batch_size, 1, "leave it out for 256")
    if size is not None:
        check_integer("size", size, 1, "leave it out for that of the images")
    if len(images) == 0:
        raise ValueError("images must not be empty; pass at least one")
    # Raw pixels are features too, by a module without weights.
    device = next((weight.device for weight in backbone.parameters()), torch.device("cpu"))
    was_training = backbone.training
    size = size or only_size(backbone)
    backbone.eval()
    parts = []
    try:
        for batch in _batches(images, batch_size):
            if not isinstance(batch, Tensor):
                raise TypeError(
                    f"images must be a tensor (N, C, H, W), got {type(images).__name__}; "
                    "convert them, for instance with torch.from_numpy"
                )
            x = batch.to(device)
            x = x if size is None else resize(x, size)
            x = normalize(x, normalization)  # (n, C, S, S) float32
            parts.append(_forward(backbone, x.contiguous(memory_format=torch.channels_last)))
    finally:
        backbone.train(was_training)
    return torch.cat(parts).float()


def _forward(backbone: nn.Module, x: Tensor) -> Tensor:
    try:
        # Beside what `Module.compile` has set up: that would compile once more for these sizes,
        # and what a CUDA graph returns lasts only until the next batch. Hooks are kept.
        features: Tensor = backbone._call_impl(x)
    except (AssertionError, RuntimeError) as error:  # As by networks that cannot divide a size.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = next((each for each in backbone.modules() if isinstance(each, nn.Conv2d)), None)
        wanted = x.shape[1] if first is None else first.in_channels
        fix = "use another image size"
        if wanted != x.shape[1]:
            fix = f"it takes images of {plural(wanted, 'channel')}, got {x.shape[1]}"
        text = f"the backbone fails on images of {x.shape[-1]} px ({error}); {fix}"
        raise ValueError(text) from error
    return features


def only_size(backbone: nn.Module) -> int | None:
    """Return the only image size that a backbone of timm takes; None if it takes any."""
    known = getattr(backbone, "pretrained_cfg", {})
    if not known.get("fixed_input_size"):
        return None
    built = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    return int((built or known["input_size"])[-1])


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images (N, 3, H, W) to squares, larger ones without their outer eighth."""
    height, width = images.shape[-2:]
    if min(height, width) > size:
        side = max(size, round(_CENTRE * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        images = images[..., top : top + side, left : left + side]
    if images.shape[-2:] == (size, size):
        return images
    check_pixels(images)  # The clamping below would hide what is out of range.
    resized = F.interpolate(
        images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    if images.is_floating_point():
        return resized.clamp(0, 1)
    return resized.round().clamp(0, 255).byte()  # As if stored at that size.


def _batches(images: Images, size: int) -> Iterator[Tensor]:
    """Slice images, one batch ahead in a thread, where slicing may mean reading files."""
    starts = range(0, len(images), size)
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(images.__getitem__, slice(i, i + size)) for i in starts[:1]]
        for i in starts:
            batch = ahead.pop().result()
            if i + size < len(images):
                ahead.append(reader.submit(images.__getitem__, slice(i + size, i + 2 * size)))
            yield batch
