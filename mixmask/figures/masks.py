"""Figures of masks and mixes, and of the views that a network saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from mixmask._checks import Ratio
from mixmask.data.views import denormalize
from mixmask.figures.style import add_caption, new_figure, show_image
from mixmask.masks import PATTERNS
from mixmask.mixing import MixedBatch, mix_batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEGEND = "white keeps\none's own pixels,\nblack takes\nthe partner's"
_SHARED = "in a step all images share mask and λ; here each column is mixed as in a step of its own"


def figure_masks(
    images: Tensor,
    *,
    grid_sizes: Sequence[int] = (2, 4, 8),
    ratio: Ratio = 0.5,
    generator: torch.Generator | None = None,
) -> Figure:
    """Draw the paper's figure 1: rows of masks, of mixes and of switch images for each pair.

    Args:
        images: (N, 3, H, W) uint8, mixed in pairs; an odd last one meets the first.
        grid_sizes: Cells per side; each has a column per pattern.
        ratio: Share of an image's own pixels, or a range (low, high).
        generator: A CPU generator for the masks. Default: torch's global one.
    """
    # (2, 3, H, W) each: by reversal, a pair's images are each other's partners.
    pairs = [
        torch.stack([images[i], images[(i + 1) % len(images)]]) for i in range(0, len(images), 2)
    ]
    settings = [(pattern, grid) for pattern in PATTERNS for grid in grid_sizes]
    figure = new_figure(1.25 * (1 + len(settings)), 4.15 * len(pairs))
    axes = figure.subplots(3 * len(pairs), 1 + len(settings), squeeze=False)
    # Three rows per pair: masks, mixes, switch images.
    for pair, rows in zip(pairs, rearrange(axes, "(p r) c -> p r c", r=3), strict=True):
        rows[0, 0].axis("off")
        rows[0, 0].text(0.5, 0.5, _LEGEND, ha="center", va="center", fontsize=9)
        show_image(rows[1, 0], pair[0], "image", size=9)
        show_image(rows[2, 0], pair[1], "partner", size=9)
        for column, (pattern, grid) in zip(rows[:, 1:].T, settings, strict=True):
            mixed = mix_batch(pair, PATTERNS[pattern](grid, ratio), generator=generator)
            assert mixed.mask is not None
            show_image(column[0], mixed.mask, f"{pattern}, grid {grid}", size=9)
            show_image(column[1], mixed.images[0], f"mix, λ = {float(mixed.lam):.2f}", size=9)
            show_image(column[2], mixed.images[1], "switch image", size=9)
    return figure


def figure_views(
    images: Tensor, query: Tensor, mixed: Sequence[Sequence[MixedBatch]], key: Tensor
) -> Figure:
    """Draw what a network saw: rows of images, query views, masks, mixed views and key views.

    Args:
        images: (n, 3, H, W) uint8, the originals.
        query: (n, 3, S, S) normalised views.
        mixed: The mixed query views: per mixture one draw for all, or one draw for each image.
        key: Of the same shape.
    """
    rows: list[tuple[str, Iterable[Tensor], Sequence[Tensor] | None]] = [
        ("image", images, None),
        ("query view", denormalize(query), None),
    ]
    for draws in mixed:
        own = [(i, draws[i % len(draws)]) for i in range(len(query))]
        if any(batch.mask is not None for batch in draws):
            rows.append(("mask", [_mask_of(batch, i) for i, batch in own], None))
        views = torch.stack([batch.images[i] for i, batch in own])  # (n, 3, s, s)
        shares = [batch.lam.expand(len(batch))[i] for i, batch in own]
        rows.append(("mixed view", denormalize(views), shares))
    rows.append(("key view", denormalize(key), None))
    figure = new_figure(1.15 * len(query) + 0.5, 1.25 * len(rows) + 0.3)
    axes = figure.subplots(len(rows), len(query), squeeze=False)
    for axis_row, (name, pictures, lam) in zip(axes, rows, strict=True):
        for i, (axis, shown) in enumerate(zip(axis_row, pictures, strict=True)):
            show_image(axis, shown, "" if lam is None else f"λ = {float(lam[i]):.2f}")
        axis_row[0].set_ylabel(name, fontsize=9)
    add_caption(figure, *_explain(mixed))
    return figure


def _mask_of(batch: MixedBatch, i: int) -> Tensor:
    """Return an image's mask (H, W), or (C, H, W) of one per channel; of mixup a grey of λ."""
    if batch.mask is None:
        return batch.lam.expand(len(batch))[i].expand(batch.images.shape[-2:])
    mask = batch.mask if batch.mask.ndim > 2 else batch.mask[None]  # (H, W) -> (1, H, W)
    return mask[i % len(mask)].float()


def _explain(mixed: Sequence[Sequence[MixedBatch]]) -> tuple[str, str]:
    """Say what a mask's colours mean, and what a column shows that a step does not."""
    if not mixed:
        return "", ""
    first = mixed[0][0]
    dims = [{0 if batch.mask is None else batch.mask.ndim for batch in draws} for draws in mixed]
    legend = f"mask: {_LEGEND}".replace("\n", " ") if dims != [{0}] else ""
    if torch.equal(first.partner, torch.arange(len(first))):  # Erased, not mixed.
        legend = legend.replace("takes the partner's", "is filled with noise")
    legend += ", colours: one mask per channel" if any(4 in kinds for kinds in dims) else ""
    legend += ", grey blends both by λ" if any({0} < kinds for kinds in dims) else ""
    shared = any(len(draws) > 1 and draws[0].lam.ndim == 0 for draws in mixed)
    return legend, _SHARED if shared else ""
