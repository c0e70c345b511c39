"""One image: opened, decoded to 8 bits, and cropped to its central square or at random."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mixmask._checks import one_line
from mixmask.data.views import random_boxes

# A view's image is decoded at this multiple of its size or more; closer to 1, views get sharper.
_MARGIN = 2
# Of these Pillow knows no more than the name, or starts another program to read them.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# What Pillow raises for files that hold no image, half an image, or too large a one.
_DAMAGES = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
# Tags of TIFF: samples per pixel, and what they mean, with the colours of RGB, CMYK, YCbCr and Lab.
_BANDS, _PHOTOMETRIC, _COLOURS = 277, 262, {2: 3, 5: 4, 6: 3, 8: 3}
_ORIENTATION = 0x0112  # EXIF's tag; from 5 on, width and height are exchanged.

Picture = Image.Image | Tensor


class UnreadableError(ValueError):
    """A file that holds no image which can be read; the text says why."""


@cache
def image_suffixes() -> frozenset[str]:
    """Return the endings of all files that the installed Pillow reads, in lower case."""
    known = Image.registered_extensions().items()
    return frozenset(end for end, kind in known if kind in Image.OPEN and kind not in _NOT_READ)


@contextmanager
def open_image(file: Path | bytes) -> Iterator[Image.Image]:
    """Open an image file, or what one holds; decoding it belongs into the `with` block.

    Pillow refuses images of more than about 179 million pixels. The environment variable
    MIXMASK_MAX_PIXELS sets another limit.

    Raises:
        UnreadableError: If it holds no image, or decoding fails in the block.
        ValueError: If that variable is no number.
    """
    if limit := os.environ.get("MIXMASK_MAX_PIXELS"):
        if not limit.isdecimal() or int(limit) == 0:
            raise ValueError(f"MIXMASK_MAX_PIXELS must be a whole number above 0, got {limit!r}")
        Image.MAX_IMAGE_PIXELS = int(limit)
    try:
        if isinstance(file, Path) and file.exists() and not file.is_file():
            raise UnreadableError("it is a folder, a pipe or a device")  # No wait.
        # At once: over a network, many small reads take long.
        content = file.read_bytes() if isinstance(file, Path) else file
        with Image.open(io.BytesIO(content)) as image:
            _check_bands(image)
            yield image
    except _DAMAGES as error:
        reason = one_line(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # Its text is the address of a buffer.
            reason = "not in a format that Pillow reads"
        if isinstance(error, Image.DecompressionBombError):
            reason += "; if you trust it, allow more with MIXMASK_MAX_PIXELS in the environment"
        raise UnreadableError(reason) from error


def _check_bands(image: Image.Image) -> None:
    """Refuse TIFF images whose further bands Pillow takes for transparency, and RGB would lose."""
    tags = getattr(image, "tag_v2", {})
    bands, colours = tags.get(_BANDS, 1), _COLOURS.get(tags.get(_PHOTOMETRIC, 0), 1)
    if bands > colours:
        raise UnreadableError(f"it has {bands} bands, of which only {colours} would be kept")


def is_deep(image: Image.Image) -> bool:
    """Return whether an image is greyscale of 16 or 32 bits, which Pillow cuts off at 255."""
    return image.mode[0] in "IF"


def read_deep(image: Image.Image) -> Tensor:
    """Decode a greyscale image of 16 or 32 bits: (1, H, W) float32 within [0, 1].

    Integers are divided by 65,535, the range of 16 bits, and floats are taken as they are.

    Raises:
        ValueError: If there are values beyond 0 ... 65,535, or 0 ... 1 for floats.
    """
    values = torch.from_numpy(np.asarray(image).astype(np.float32))  # (H, W)
    low, high = values.min().item(), values.max().item()
    limit = 1 if image.mode == "F" else 65_535
    if not (low >= 0 and high <= limit):  # NaN is neither.
        raise ValueError(
            f"its values go from {low:g} to {high:g}, beyond 0 to {limit} of its format; scale "
            "them in a function of your own, --data package.module:function"
        )
    return values[None] / limit


def to_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
    """Decode to RGB of 8 bits, dropping transparency, of a palette too.

    An upright image lies as its EXIF orientation says, as viewers show it.
    """
    image.load()
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    if is_deep(image):
        image = Image.fromarray((read_deep(image)[0] * 255).round().byte().numpy())
    if image.mode == "RGB":
        return image
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def take_square(image: Picture, size: int) -> Tensor:
    """Return an image's central square, resized.

    Args:
        image: An opened image, decoded here, or (C, H, W) uint8 or float within [0, 1].
        size: Height and width of the result, in pixels.

    Returns:
        (C, size, size), 3 uint8 channels for an opened image.
    """
    if isinstance(image, Image.Image):
        # A JPEG of more than twice the size is decoded at a half, a quarter or an eighth.
        image.draft("RGB", (2 * size, 2 * size))
        image = to_rgb(image)
    width, height = _size(image)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if isinstance(image, Tensor):
        # (C, H, W) -> (C, side, side) -> (C, S, S)
        return _resize(image[:, top : top + side, left : left + side], size, "bicubic")
    square = image.crop((left, top, left + side, top + side))
    return _to_tensor(square.resize((size, size), Image.Resampling.BICUBIC))


def take_crops(
    image: Picture, count: int, size: int, *, min_scale: float, generator: torch.Generator
) -> Tensor:
    """Take random resized crops of an image.

    A large JPEG is decoded at a half, a quarter or an eighth of its size, as long as its smallest
    crop keeps twice `size`. Crops of photographs differ by about 0.3 grey levels of 256.

    Args:
        image: As in `take_square`.
        count: How many crops.
        size: Their height and width, in pixels.
        min_scale: Smallest share of the image's area that a crop takes; the largest is 1.
        generator: A CPU generator; every readable image takes equally many numbers from it.

    Returns:
        (count, C, size, size), 3 uint8 channels for an opened image.
    """
    width, height = _size(image)
    boxes = random_boxes(count, height, width, min_scale, generator=generator).long().tolist()
    reduction = 1
    if isinstance(image, Image.Image):
        kept = _MARGIN * size / min(min(w, h) for _, _, w, h in boxes)
        image.draft("RGB", (math.ceil(image.width * kept), math.ceil(image.height * kept)))
        image = to_rgb(image)
        reduction = round(width / image.width)
        if reduction > 1:
            return torch.stack([_crop_reduced(image, box, size, reduction) for box in boxes])
        image = _to_tensor(image)
    crops = [
        _resize(image[:, top : top + h, left : left + w], size, "bilinear")
        for left, top, w, h in boxes
    ]
    return torch.stack(crops)  # (count, C, S, S)


def _size(image: Picture) -> tuple[int, int]:
    """Return width and height of an image as it will lie."""
    if isinstance(image, Tensor):
        return image.shape[2], image.shape[1]
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def _resize(image: Tensor, size: int, mode: str) -> Tensor:
    """Resize (C, h, w) to (C, size, size), smoothing what gets smaller."""
    resized = F.interpolate(image[None], (size, size), mode=mode, antialias=True)[0]
    # Bicubic weights overshoot; for uint8, torch clamps by itself.
    return resized.clamp_(0, 1) if image.is_floating_point() else resized


def _crop_reduced(image: Image.Image, box: list[int], size: int, reduction: int) -> Tensor:
    """Crop an image that was decoded smaller, to fractions of its pixels, which Pillow can."""
    left, top, w, h = (side / reduction for side in box)
    place = (left, top, left + w, top + h)
    return _to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, place))


def _to_tensor(image: Image.Image) -> Tensor:
    """Return (C, H, W) uint8, channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
