"""Figures of masks and mixes, and of the views that a network saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixmask.data.views import denormalize
from mixmask.figures.style import new_figure, show_image
from mixmask.masks import BlockMaskGenerator, DiscreteMaskGenerator, MaskGenerator
from mixmask.mixing import mix_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PATTERNS = {"block": BlockMaskGenerator, "discrete": DiscreteMaskGenerator}


def figure_masks(
    images: Tensor,
    *,
    grid_sizes: Sequence[int] = (2, 4, 8),
    ratio: float = 0.5,
    generator: torch.Generator | None = None,
) -> Figure:
    """Draw the paper's figure 1: masks of both patterns at several grids, and the two mixes.

    Args:
        images: (N, 3, H, W) uint8, mixed in pairs; an odd last one meets the first.
        grid_sizes: Cells per side; each has a group of columns.
        ratio: Share of an image's own pixels.
        generator: A CPU generator for the masks. Default: torch's global one.

    Returns:
        A matplotlib figure, two rows per pair; `style.save_figure` writes it.
    """
    pairs = [
        torch.stack([images[i], images[(i + 1) % len(images)]]) for i in range(0, len(images), 2)
    ]
    rows, columns = 2 * len(pairs), 1 + 3 * len(grid_sizes)
    figure = new_figure(1.3 * columns, 1.5 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for pair, pair_axes in zip(pairs, axes.reshape(len(pairs), 2, columns), strict=True):
        show_image(pair_axes[0, 0], pair[0], "image")
        show_image(pair_axes[1, 0], pair[1], "partner")
        for axis_row, (pattern, build) in zip(pair_axes, _PATTERNS.items(), strict=True):
            for i, grid_size in enumerate(grid_sizes):
                masks: MaskGenerator = build(grid_size, ratio)
                mixed = mix_batch(pair, masks, generator=generator)
                assert mixed.mask is not None
                mask_axis, mix_axis, switch_axis = axis_row[1 + 3 * i : 4 + 3 * i]
                show_image(mask_axis, mixed.mask, f"{pattern}, grid {grid_size}")
                show_image(mix_axis, mixed.images[0], f"mix, λ = {float(mixed.lam):.2f}")
                show_image(switch_axis, mixed.images[1], "switch image")
    return figure


def figure_views(query: Tensor, mixed: Sequence[Tensor], key: Tensor) -> Figure:
    """Draw what a network saw: a row of query views, of each mixed view, and of key views.

    Args:
        query: (n, 3, S, S) normalised views.
        mixed: Of the same shape, one for each mixture; may be empty.
        key: Of the same shape.
    """
    names = ["view", *["mixed view"] * len(mixed), "key view"]
    figure = new_figure(1.1 * len(query) + 0.6, 1.15 * len(names))
    axes = figure.subplots(len(names), len(query), squeeze=False)
    for axis_row, name, batch in zip(axes, names, [query, *mixed, key], strict=True):
        for axis, image in zip(axis_row, denormalize(batch), strict=True):
            show_image(axis, image)
        axis_row[0].set_ylabel(name, fontsize=9)
    return figure


def figure_detections(
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    predictions: Sequence[dict[str, Tensor]],
    classes: Sequence[str],
    *,
    threshold: float = 0.5,
) -> Figure:
    """Draw what was annotated beside what was detected, a row an image.

    Args:
        images: (3, H, W) uint8 each.
        targets: Of each, `boxes` (n, 4) in pixels, `labels` (n,) and maybe `masks` (n, H, W).
        predictions: Of each, the same and `scores` (n,).
        classes: Names; label 1 is the first.
        threshold: Smallest score of a detection that is drawn.
    """
    height = 4.2 * sum(image.shape[1] / image.shape[2] for image in images) + 0.6
    figure = new_figure(8.6, height)
    axes = figure.subplots(len(images), 2, squeeze=False)
    colours = [f"C{i % 10}" for i in range(len(classes))]
    for (left, right), image, target, found in zip(axes, images, targets, predictions, strict=True):
        sure = found["scores"] >= threshold
        shown = {name: values[sure] for name, values in found.items()}
        show_image(left, image, f"annotated: {len(target['boxes'])}")
        count = int(sure.sum())
        show_image(right, image, f"detected: {count} with a score of {threshold:g} or more")
        for axis, boxes in ((left, target), (right, shown)):
            _draw_boxes(axis, boxes, colours)
    handles = [_patch((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(
        handles, classes, loc="outside lower center", ncols=min(len(classes), 6), frameon=False
    )
    return figure


def _draw_boxes(axis: Axes, boxes: dict[str, Tensor], colours: Sequence[str]) -> None:
    """Draw boxes in their classes' colours, with scores and masks where there are any."""
    scores = boxes.get("scores")
    for i, (corners, label) in enumerate(zip(boxes["boxes"], boxes["labels"], strict=True)):
        # A picture's first pixel is drawn around 0; its left edge is at -0.5.
        left, top, right, bottom = (corners - 0.5).tolist()
        colour = colours[int(label) - 1]
        box = _patch((left, top), right - left, bottom - top, fill=False, color=colour)
        axis.add_patch(box)
        if scores is not None:
            axis.text(
                left, top, f"{float(scores[i]):.2f}", color="white", fontsize=6, va="top",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
        if "masks" in boxes:
            mask = boxes["masks"][i].float().numpy()
            axis.contour(mask, [0.5], colors=[colour], linewidths=0.8)


def _patch(corner: tuple[float, float], width: float, height: float, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, linewidth=1, **options)
