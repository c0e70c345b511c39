"""JPEGs decoded and cropped on the device, by TorchCodec: nvJPEG on a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin
from torch import Tensor

# Pixels that are decoded at once: what they take on the device, three bytes each, is small beside
# a step, and a part of a batch still is one call unless its photographs are large.
_PIXELS = 2**25
_END = b"\xff\xd9"
_ORIENTATION = 0x0112


class Jpeg(NamedTuple):
    """A JPEG and the crops to take of it.

    Attributes:
        content: What the file holds.
        height: In pixels.
        width: In pixels.
        boxes: (crops, 4) int64, left, top, width and height of each crop in pixels.
    """

    content: bytes
    height: int
    width: int
    boxes: Tensor


class Jpegs(NamedTuple):
    """Several JPEGs, in as few tensors as a worker hands over cheaply.

    Attributes:
        content: (bytes,) uint8, one file after the other.
        lengths: Bytes of each.
        pixels: Height times width of each.
        boxes: (n, crops, 4) int64, left, top, width and height of each crop in pixels.
    """

    content: Tensor
    lengths: list[int]
    pixels: list[int]
    boxes: Tensor

    @classmethod
    def of(cls, jpegs: Sequence[Jpeg], crops: int) -> Jpegs:
        """Join JPEGs, of which there may be none."""
        joined = bytearray().join(jpeg.content for jpeg in jpegs)
        return cls(
            torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte(),
            [len(jpeg.content) for jpeg in jpegs],
            [jpeg.height * jpeg.width for jpeg in jpegs],
            torch.stack([jpeg.boxes for jpeg in jpegs])
            if jpegs
            else torch.empty(0, crops, 4).long(),
        )


def is_plain(image: Image.Image, content: bytes) -> bool:
    """Tell whether any decoder reads an image alike: a whole, upright JPEG in colours or grey.

    Args:
        image: As Pillow opened it; nothing has to be decoded.
        content: What its file holds.
    """
    return (
        isinstance(image, JpegImagePlugin.JpegImageFile)
        and image.mode in ("RGB", "L")
        and image.info.get("adobe_transform", 1) == 1
        and image.getexif().get(_ORIENTATION, 1) == 1
        and content.endswith(_END)
    )


def check_decoder(device: torch.device) -> None:
    """Refuse a device on which no JPEG can be decoded, by decoding one.

    Raises:
        ValueError: If TorchCodec is missing or too old, or the device cannot decode.
    """
    try:
        decode_jpeg = _decoder()
    except Exception as error:  # Its libraries, too, may not load.
        raise ValueError(
            f"--decode device needs TorchCodec 0.16 or newer ({error}); pip install "
            "'mixmask[decode]', or use --decode workers"
        ) from error
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    try:
        decode_jpeg([buffer.getvalue()], device=device)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"JPEGs cannot be decoded on {device} ({text}); use --decode workers"
        ) from error


def decode_crops(jpegs: Jpegs, size: int, device: torch.device) -> Iterator[Tensor | None]:
    """Decode JPEGs on a device, where their crops are taken.

    Large JPEGs are decoded whole, as nvJPEG does not decode them smaller.

    Args:
        jpegs: What workers handed over.
        size: Height and width of the crops, in pixels.
        device: Where to.

    Yields:
        (crops, size, size, 3) uint8 for each, or None where the decoder fails.
    """
    contents = jpegs.content.split(jpegs.lengths)
    boxes = jpegs.boxes.tolist()
    for start, end in _groups(jpegs.pixels):
        decoded = _decode(contents[start:end], device)
        for pixels, places in zip(decoded, boxes[start:end], strict=True):
            yield None if pixels is None else take_crops(pixels, places, size).permute(0, 2, 3, 1)


def take_crops(pixels: Tensor, boxes: Sequence[Sequence[int]], size: int) -> Tensor:
    """Crop an image, and resize the crops with antialiasing.

    Args:
        pixels: (3, H, W) uint8.
        boxes: Left, top, width and height of each crop, in pixels.
        size: Height and width of what is returned, in pixels.

    Returns:
        (crops, 3, size, size) uint8.
    """
    if pixels.device.type != "cpu":  # Where torch resizes no integers.
        pixels = pixels.float()
    crops = [
        F.interpolate(
            pixels[None, :, top : top + h, left : left + w],
            (size, size),
            mode="bilinear",
            antialias=True,
        )
        for left, top, w, h in boxes
    ]
    found = torch.cat(crops)
    return found.round().byte() if found.is_floating_point() else found


def _groups(pixels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split places into runs, each with few pixels in all or of one image."""
    start = total = 0
    for place, count in enumerate(pixels):
        if place > start and total + count > _PIXELS:
            yield start, place
            start, total = place, 0
        total += count
    if pixels:
        yield start, len(pixels)


def _decoder() -> Callable[..., Any]:
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg


def _decode(contents: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode to (3, H, W) uint8 each; one that fails, which makes the whole call fail, is None."""
    try:
        return list(_decoder()(contents, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if len(contents) == 1:
            return [None]
    return [found for content in contents for found in _decode([content], device)]
