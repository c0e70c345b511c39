"""Images and labels from `.npz` files, as data sets travel without a downloader."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Arrays = Mapping[str, Any]


def read_arrays(path: Path, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Read one file: images (N, 3, H, W) uint8 and labels (N,) int64.

    A file holds one of
    - `images` (N, H, W, 3) uint8 and `labels`;
    - `webp`, `offsets` and `fine`: pictures of one width, in which square images are stacked;
    - `body`, `offsets`, `header`, `header_offsets`, `header_id` and `label`: JPEGs without the
      headers that many of them share.

    Args:
        path: The file.
        size: Height and width to which images are resized. Default: as they are.
    """
    with np.load(path) as arrays:
        if "images" in arrays:
            images, labels = arrays["images"], arrays["labels"]
        elif "webp" in arrays:
            images, labels = _read_stacks(arrays), arrays["fine"]
        else:
            images, labels = _read_jpegs(arrays, size), arrays["label"]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels.astype(np.int64))


def read_files(
    paths: Iterable[Path], *, size: int | None = None, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read several files in a row, as many as it takes for `count` images; see `read_arrays`."""
    images, labels = [], []
    for path in paths:
        pixels, classes = read_arrays(path, size)
        images.append(pixels)
        labels.append(classes)
        if count is not None and sum(map(len, labels)) >= count:
            break
    return torch.cat(images), torch.cat(labels)


def _read_stacks(arrays: Arrays) -> Any:
    body = arrays["webp"].tobytes()
    stacks = [
        np.asarray(Image.open(io.BytesIO(body[start:end])).convert("RGB"))
        for start, end in pairwise(arrays["offsets"])
    ]
    side = stacks[0].shape[1]
    return np.concatenate(stacks).reshape(-1, side, side, 3)


def _read_jpegs(arrays: Arrays, size: int | None) -> Any:
    body, header = arrays["body"].tobytes(), arrays["header"].tobytes()
    headers = [header[start:end] for start, end in pairwise(arrays["header_offsets"])]
    images = []
    places = pairwise(arrays["offsets"])
    for (start, end), number in zip(places, arrays["header_id"], strict=True):
        image = Image.open(io.BytesIO(headers[number] + body[start:end])).convert("RGB")
        if size is not None:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        images.append(np.asarray(image))
    return np.stack(images)
