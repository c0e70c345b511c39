"""Figures of masks and mixes, and of the views that a network saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmask._checks import Ratio
from mixmask.data.views import denormalize
from mixmask.figures.style import new_figure, show_image
from mixmask.masks import BlockMaskGenerator, DiscreteMaskGenerator, MaskGenerator
from mixmask.mixing import mix_batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PATTERNS = {"block": BlockMaskGenerator, "discrete": DiscreteMaskGenerator}


def figure_masks(
    images: Tensor,
    *,
    grid_sizes: Sequence[int] = (2, 4, 8),
    ratio: Ratio = 0.5,
    generator: torch.Generator | None = None,
) -> Figure:
    """Draw the paper's figure 1: masks of both patterns at several grids, and the two mixes.

    Args:
        images: (N, 3, H, W) uint8, mixed in pairs; an odd last one meets the first.
        grid_sizes: Cells per side; each has a group of columns.
        ratio: Share of an image's own pixels, or a range (low, high).
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
    """Draw what a network saw: rows of query views, of each mixed view, and of key views.

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
