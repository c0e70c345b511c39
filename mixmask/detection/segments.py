"""COCO's segmentations, polygons and run lengths, checked and drawn as masks."""

from __future__ import annotations

import math
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
        valid = min(runs, default=0) >= 0 and sum(runs) == height * width
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
        values = np.arange(len(runs), dtype=np.uint8) % 2  # Zeros first, then ones, ...
        columns = np.repeat(values, runs).reshape(width, height)  # COCO goes down each column.
        mask.copy_(torch.from_numpy(columns.T))  # (H, W)
    return masks


def _is_polygon(polygon: object, side: int) -> bool:
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        return False
    # pycocotools walks along each edge, so that a far corner would take all memory.
    near = len(polygon) >= 6 and -side <= min(polygon) and max(polygon) <= 2 * side
    return near and len(polygon) % 2 == 0 and not math.isnan(sum(polygon))


def _runs(counts: object) -> list[int]:
    """Return run lengths, decoded if they are COCO's text; [-1] if they are neither.

    Each character holds five bits of a number, low ones first, and one that says whether more
    follow; from the fourth number on, the number is the difference from the one two before.
    """
    if isinstance(counts, list) and all(type(run) is int for run in counts):
        return counts
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode() if isinstance(counts, str) else b"":
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if shift > 60:
            return [-1]
        if bits & 0x20:
            continue
        if bits & 0x10:  # The sign.
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs if runs and not shift else [-1]
