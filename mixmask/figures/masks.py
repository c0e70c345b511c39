"""Figures: what masks and mixes look like, what a network saw, how a run went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixmask._checks import Ratio
from mixmask.data.views import denormalize
from mixmask.masks import BlockMaskGenerator, DiscreteMaskGenerator, MaskGenerator
from mixmask.mixing import mix_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More classes than these would be unreadable in a confusion matrix.
_NUMBERED_CLASSES, _NAMED_CLASSES = 20, 40
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
        grid_sizes: Cells along a side, a group of columns each.
        ratio: Share of an image's own pixels, or a range (low, high).
        generator: A CPU generator for the masks. Default: torch's global one.

    Returns:
        A matplotlib figure, two rows a pair; `save_figure` writes it.
    """
    pairs = [
        torch.stack([images[i], images[(i + 1) % len(images)]]) for i in range(0, len(images), 2)
    ]
    rows, columns = 2 * len(pairs), 1 + 3 * len(grid_sizes)
    figure: Figure
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(1.3 * columns, 1.5 * rows), squeeze=False
    )
    for pair, pair_axes in zip(pairs, axes.reshape(len(pairs), 2, columns), strict=True):
        _show(pair_axes[0, 0], pair[0], "image")
        _show(pair_axes[1, 0], pair[1], "partner")
        for axis_row, (pattern, build) in zip(pair_axes, _PATTERNS.items(), strict=True):
            for i, grid_size in enumerate(grid_sizes):
                masks: MaskGenerator = build(grid_size, ratio)
                mixed = mix_batch(pair, masks, generator=generator)
                assert mixed.mask is not None
                mask_axis, mix_axis, switch_axis = axis_row[1 + 3 * i : 4 + 3 * i]
                _show(mask_axis, mixed.mask, f"{pattern}, grid {grid_size}")
                _show(mix_axis, mixed.images[0], f"mix, λ = {float(mixed.lam):.2f}")
                _show(switch_axis, mixed.images[1], "switch image")
    figure.tight_layout(pad=0.5)
    return figure


def figure_views(query: Tensor, mixed: Sequence[Tensor], key: Tensor) -> Figure:
    """Draw what a network saw: a row of query views, of each mixed view, and of key views.

    Args:
        query: (n, 3, S, S) normalised views.
        mixed: Of the same shape, one for each mixture; may be empty.
        key: Of the same shape.
    """
    names = ["view", *["mixed view"] * len(mixed), "key view"]
    figure: Figure
    figure, axes = _pyplot().subplots(
        len(names), len(query), figsize=(1.1 * len(query) + 0.6, 1.15 * len(names)), squeeze=False
    )
    for axis_row, name, batch in zip(axes, names, [query, *mixed, key], strict=True):
        for axis, image in zip(axis_row, denormalize(batch), strict=True):
            _show(axis, image, "")
        axis_row[0].set_ylabel(name, fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def figure_curves(rows: Sequence[dict[str, float]]) -> Figure:
    """Draw a run's loss and, where they were measured, its accuracies over the epochs.

    Args:
        rows: The rows of `metrics.csv`.
    """
    figure: Figure
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(9, 3.4))
    _draw_losses(left, [row for row in rows if "loss" in row])
    right.set(xlabel="epoch", ylabel="accuracy on the test split, %", title="representation")
    for name, label in (("linear", "linear probe"), ("knn", "nearest neighbours")):
        measured = [row for row in rows if row.get(name) is not None]
        if measured:
            epochs = [row["epoch"] for row in measured]
            right.plot(epochs, [100 * row[name] for row in measured], marker="o", label=label)
            right.axhline(100 * measured[0][name], color="grey", linewidth=0.8, linestyle=":")
    if right.lines:
        right.legend(frameon=False, title="dotted: untrained")
    else:
        right.text(0.5, 0.5, "not measured", ha="center", va="center", color="grey")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def figure_confusion(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Draw what images of each class were taken for, as shares of the class.

    Up to 20 classes the shares stand in the cells, in per cent; up to 40 classes are named.

    Args:
        confusion: (C, C) counts: rows are the right classes, columns the predicted ones.
        classes: Their C names.

    Returns:
        A matplotlib figure; rows of classes that do not occur stay white.

    Raises:
        ValueError: If shapes and names do not fit.
    """
    count = len(classes)
    if confusion.shape != (count, count):
        raise ValueError(
            f"confusion must be ({count}, {count}) for {count} classes, got "
            f"{tuple(confusion.shape)}; pass the names of all classes"
        )
    totals = confusion.sum(dim=1, keepdim=True)
    shares = (100 * confusion.double() / totals.clamp_min(1)).numpy()
    side = min(max(0.5 * count + 2.5, 4.0), 12.0)
    figure: Figure
    figure, axis = _pyplot().subplots(figsize=(side + 0.8, side), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03, label="% of the class")
    axis.set(xlabel="predicted", ylabel="right class")
    if count <= _NAMED_CLASSES:
        axis.set_xticks(range(count), classes, rotation=90, fontsize=8)
        axis.set_yticks(range(count), classes, fontsize=8)
    if count <= _NUMBERED_CLASSES:
        for row, column in confusion.nonzero().tolist():
            share = shares[row, column]
            colour = "white" if share > 50 else "black"
            axis.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour
            )
    # Where the labels lie is known once they are drawn; only then is room kept for them.
    figure.canvas.draw()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, as PNG unless the name ends otherwise, and release it.

    Whoever stops meanwhile finds the picture that was there before.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:] or "png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        _pyplot().close(figure)


def _draw_losses(axis: Axes, rows: Sequence[dict[str, float]]) -> None:
    epochs = [row["epoch"] for row in rows]
    axis.plot(epochs, [row["loss_clean"] for row in rows], label="clean term", marker=".")
    if any(row["loss_mixed"] for row in rows):
        axis.plot(epochs, [row["loss_mixed"] for row in rows], label="mixed term", marker=".")
    axis.set(xlabel="epoch", ylabel="loss", title="training")
    axis.legend(frameon=False)


def _show(axis: Axes, image: Tensor, title: str) -> None:
    """Draw an image (3, H, W) or a mask (H, W), white where it is True."""
    if image.ndim == 2:
        axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    return plt
