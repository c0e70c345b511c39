"""Random crops of image files, as workers take them, or JPEGs as they are for the device."""

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
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mixmask._seeds import fold_seed
from mixmask.data.folders import Files
from mixmask.data.jpegs import Jpeg, Jpegs, is_plain, take_crops
from mixmask.data.sets import UNREADABLE, read_any, to_rgb
from mixmask.data.views import random_boxes

# How much larger than its views an image is at least decoded; closer to 1, views become sharper.
_MARGIN = 2


class Request(NamedTuple):
    """A part of a draw: these images, from this place in a batch of so many on."""

    numbers: list[int]
    first: int
    total: int
    crops: int
    seed: int

    def one(self, place: int) -> Request:
        """Ask for a single image of the part, whose crops will be the same."""
        return self._replace(numbers=[self.numbers[place]], first=self.first + place)


class Answer(NamedTuple):
    """A part of a batch.

    Attributes:
        request: What was asked for.
        images: (crops, n, S, S, 3) uint8, crops of the images that are no JPEGs to decode.
        jpegs: What is left to decode.
        places: Where in the part those stand, in order.
        unreadable: Numbers of the files that could not be read.
        error: What is wrong for good; empty if nothing is.
    """

    request: Request
    images: Tensor
    jpegs: Jpegs
    places: list[int]
    unreadable: list[int]
    error: str


@dataclass(frozen=True)
class Reader(Dataset[Answer]):
    """What a worker does: read files and crop them.

    Attributes:
        files: All files.
        size: Height and width of the crops, in pixels.
        min_scale: Smallest share of an image's area that a crop takes.
        keep_jpegs: Whether usual JPEGs are left to the device to decode.
    """

    files: Files
    size: int
    min_scale: float
    keep_jpegs: bool = False

    def __getitem__(self, request: Request) -> Answer:
        """Read a part of a batch; what is drawn follows from the request's seed alone."""
        generator = torch.Generator()
        read = partial(
            read_jpeg if self.keep_jpegs else read_crops,
            count=request.crops,
            size=self.size,
            min_scale=self.min_scale,
            generator=generator,
        )
        cropped: list[Tensor] = []
        jpegs: list[Jpeg] = []
        places: list[int] = []
        unreadable: list[int] = []
        error = ""
        try:
            for place, number in enumerate(request.numbers):
                generator.manual_seed(fold_seed(request.seed, request.first + place))
                found, tried = read_any(self.files, number, read)
                unreadable += tried
                if isinstance(found, Jpeg):
                    jpegs.append(found)
                    places.append(place)
                else:
                    cropped.append(found)
        except OSError as problem:  # A worker's exception would come with its traceback.
            error = str(problem)
        images = torch.empty(
            request.crops, len(cropped), self.size, self.size, 3, dtype=torch.uint8
        )
        for place, crops in enumerate(cropped):
            images[:, place] = crops.permute(0, 2, 3, 1)
        return Answer(request, images, Jpegs.of(jpegs, request.crops), places, unreadable, error)


def start_worker(number: int) -> None:
    """Leave Ctrl-C and a scheduler's SIGTERM to the process that trains, which ends the step."""
    del number
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")


def read_crops(
    file: Path, count: int, size: int, *, min_scale: float, generator: torch.Generator
) -> Tensor | None:
    """Read an image and take random resized crops of it.

    A large JPEG is decoded at a half, a quarter or an eighth, of which even the smallest crop has
    twice the size. The crops hardly show it: photographs differ by about 0.3 grey levels of 256.

    Args:
        file: An image file.
        count: How many crops.
        size: Their height and width, in pixels.
        min_scale: Smallest share of the image's area that a crop takes; the largest is 1.
        generator: A CPU generator. As many numbers are drawn from it for every readable image.

    Returns:
        (count, 3, size, size) uint8, or None for a file that cannot be read.
    """
    try:
        # At once: over a network, many small reads take long.
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            boxes = _draw(image, count, min_scale, generator)
            return _crop(image, boxes.tolist(), size)
    except UNREADABLE:
        return None


def read_jpeg(
    file: Path, count: int, size: int, *, min_scale: float, generator: torch.Generator
) -> Jpeg | Tensor | None:
    """Do as `read_crops`, but leave a usual JPEG as it is, with the boxes of its crops."""
    try:
        content = file.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            boxes = _draw(image, count, min_scale, generator)
            if is_plain(image, content):
                return Jpeg(content, image.height, image.width, boxes)
            return _crop(image, boxes.tolist(), size)
    except UNREADABLE:
        return None


def _draw(image: Image.Image, count: int, min_scale: float, generator: torch.Generator) -> Tensor:
    """Return (count, 4) int64, left, top, width and height of each crop in pixels."""
    width, height = image.size
    return random_boxes(count, height, width, min_scale, generator=generator).long()


def _crop(image: Image.Image, boxes: list[list[int]], size: int) -> Tensor:
    """Decode an image as far as its crops need it, and take them: (crops, 3, size, size)."""
    width, height = image.size
    smallest = min(min(w, h) for _, _, w, h in boxes)
    kept = _MARGIN * size / smallest
    image.draft("RGB", (math.ceil(width * kept), math.ceil(height * kept)))
    rgb = to_rgb(image)
    reduction = round(width / rgb.width)
    if reduction > 1:
        return torch.stack([_crop_reduced(rgb, box, size, reduction) for box in boxes])
    return take_crops(_to_tensor(rgb), boxes, size)


def _crop_reduced(image: Image.Image, box: list[int], size: int, reduction: int) -> Tensor:
    """Crop an image that was decoded smaller, to fractions of its pixels, which Pillow can."""
    left, top, w, h = (side / reduction for side in box)
    place = (left, top, left + w, top + h)
    return _to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, place))


def _to_tensor(image: Image.Image) -> Tensor:
    """Return (3, H, W) uint8, channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
