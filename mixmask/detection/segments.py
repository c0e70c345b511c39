"""COCO's segmentations, polygons and run lengths, checked and drawn as masks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_segmentation(segmentation: object, height: int, width: int, file: str) -> None:
    """Require a segmentation that can be drawn; others may crash pycocotools.

    That is a list of polygons, each x, y, x, y, ... in pixels, of three points or more, not far
    outside of the image; or `{"size": [height, width], "counts": ...}` with run lengths that fill
    the image, as numbers or in COCO's text. Errors name the file.
    """
    valid = False
    if isinstance(segmentation, list):
        valid = all(_is_polygon(polygon, max(height, width)) for polygon in segmentation)
    elif isinstance(segmentation, dict) and segmentation.get("size") == [height, width]:
        runs = _runs(segmentation.get("counts"))
        valid = min(runs, default=-1) >= 0 and sum(runs) == height * width
    if not valid:
        raise ValueError(
            f"{file} has a broken segmentation, {repr(segmentation)[:60]}; expected polygons of "
            f"three points or more, or run lengths that fill {height} x {width} pixels"
        )


def draw_masks(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Draw checked segmentations: (n, H, W) uint8."""
    from pycocotools import mask as coco_mask

    masks = torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if isinstance(segmentation, list):
            polygons = coco_mask.frPyObjects(segmentation, height, width)
            runs = _runs(coco_mask.merge(polygons)["counts"].decode())
        else:
            runs = _runs(segmentation["counts"])
        # Zeros first, then ones, ... down each column; pycocotools' own decoding warns in NumPy 2.
        values = np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs)  # (W * H,)
        mask.copy_(torch.from_numpy(values.reshape(width, height).T))  # (H, W)
    return masks


def _is_polygon(polygon: object, side: int) -> bool:
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        return False
    # pycocotools walks along each edge, so that a far corner would take all memory.
    near = len(polygon) >= 6 and -side <= min(polygon) and max(polygon) <= 2 * side
    return near and len(polygon) % 2 == 0 and not math.isnan(sum(polygon))


def _runs(counts: object) -> list[int]:
    """Return run lengths, decoded if they are COCO's text; none if they are neither."""
    if isinstance(counts, list) and all(type(run) is int for run in counts):
        return counts
    # Each character holds five bits of a number, low ones first, and one that says whether more
    # follow: P to o. Twelve of them are the most that fit 64 bits.
    if not isinstance(counts, str) or not re.fullmatch("([P-o]{0,11}[0-O])+", counts):
        return []
    runs: list[int] = []
    for number in re.findall("[P-o]*[0-O]", counts):
        bits = [ord(character) - 48 for character in number]
        value = sum((bit & 0x1F) << 5 * place for place, bit in enumerate(bits))
        if bits[-1] & 0x10:  # The sign.
            value -= 1 << 5 * len(bits)
        # From the fourth number on, it is the difference from the one two before.
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
