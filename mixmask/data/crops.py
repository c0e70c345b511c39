"""Random crops of image files, as workers take them."""

from __future__ import annotations

import io
import math
import signal
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mixmask._seeds import fold_seed
from mixmask.data.folders import Files
from mixmask.data.sets import UNREADABLE, read_any, to_rgb
from mixmask.data.views import random_boxes

# An image is decoded at this multiple of its views' size or more; closer to 1, views get sharper.
_MARGIN = 2


class Request(NamedTuple):
    """A part of a draw: these images, from this place in a batch on."""

    numbers: list[int]
    first: int
    total: int
    crops: int
    seed: int


class Answer(NamedTuple):
    """A part of a batch.

    Attributes:
        request: What was asked for.
        images: (crops, n, S, S, 3) uint8.
        unreadable: Numbers of the files that could not be read.
        error: Why reading cannot go on; empty if it can.
    """

    request: Request
    images: Tensor
    unreadable: list[int]
    error: str


@dataclass(frozen=True)
class Reader(Dataset[Answer]):
    """What a worker does: read files and crop them.

    Attributes:
        files: All files.
        size: Height and width of the crops, in pixels.
        min_scale: Smallest share of an image's area that a crop takes.
    """

    files: Files
    size: int
    min_scale: float

    def __getitem__(self, request: Request) -> Answer:
        """Read a part of a batch; the request's seed alone decides all draws."""
        generator = torch.Generator()
        read = partial(
            read_crops,
            count=request.crops,
            size=self.size,
            min_scale=self.min_scale,
            generator=generator,
        )
        shape = (request.crops, len(request.numbers), self.size, self.size, 3)
        images = torch.empty(shape, dtype=torch.uint8)
        unreadable: list[int] = []
        error = ""
        try:
            for place, number in enumerate(request.numbers):
                # One seed per image: crops do not depend on how a batch is split into parts.
                generator.manual_seed(fold_seed(request.seed, request.first + place))
                crops, tried = read_any(self.files, number, read)
                unreadable += tried
                images[:, place] = crops.permute(0, 2, 3, 1)  # (crops, S, S, 3)
        except OSError as problem:  # An exception in a worker would arrive with its traceback.
            error = str(problem)
        return Answer(request, images, unreadable, error)


def start_worker(number: int) -> None:
    """Ignore Ctrl-C and SIGTERM: the training process finishes its step, then ends the workers."""
    del number
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")


def read_crops(
    file: Path, count: int, size: int, *, min_scale: float, generator: torch.Generator
) -> Tensor | None:
    """Read an image and take random resized crops of it.

    A large JPEG is decoded at a half, a quarter or an eighth of its size, as long as its smallest
    crop keeps twice `size`. Crops of photographs differ by about 0.3 grey levels of 256.

    Args:
        file: An image file.
        count: How many crops.
        size: Their height and width, in pixels.
        min_scale: Smallest share of the image's area that a crop takes; the largest is 1.
        generator: A CPU generator; every readable image takes equally many numbers from it.

    Returns:
        (count, 3, size, size) uint8, or None for a file that cannot be read.
    """
    try:
        # At once: over a network, many small reads take long.
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            width, height = image.size
            boxes = random_boxes(count, height, width, min_scale, generator=generator)
            return _crop(image, boxes.long().tolist(), size)
    except UNREADABLE:
        return None


def _crop(image: Image.Image, boxes: list[list[int]], size: int) -> Tensor:
    """Decode an image at the size that its crops need, and take them: (crops, 3, size, size)."""
    width, height = image.size
    smallest = min(min(w, h) for _, _, w, h in boxes)
    kept = _MARGIN * size / smallest
    image.draft("RGB", (math.ceil(width * kept), math.ceil(height * kept)))
    rgb = to_rgb(image)
    reduction = round(width / rgb.width)
    if reduction > 1:
        return torch.stack([_crop_reduced(rgb, box, size, reduction) for box in boxes])
    pixels = _to_tensor(rgb)[None]  # (1, 3, H, W)
    crops = [
        F.interpolate(
            pixels[..., top : top + h, left : left + w],
            (size, size),
            mode="bilinear",
            antialias=True,
        )
        for left, top, w, h in boxes
    ]
    return torch.cat(crops)


def _crop_reduced(image: Image.Image, box: list[int], size: int, reduction: int) -> Tensor:
    """Crop an image that was decoded smaller, to fractions of its pixels, which Pillow can."""
    left, top, w, h = (side / reduction for side in box)
    place = (left, top, left + w, top + h)
    return _to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, place))


def _to_tensor(image: Image.Image) -> Tensor:
    """Return (3, H, W) uint8, channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
