"""Figures of features: maps in two dimensions, nearest neighbours, confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mixmask.figures.style import (
    CLASS_COLOURS,
    COLOURS,
    add_caption,
    new_figure,
    shorten,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
_MOST_IN_LEGEND = 20
_QUERY, _WRONG = COLOURS[:2]  # Blue and orange, as the legend says.
# More classes than these would be unreadable in a confusion matrix.
_NUMBERED_CLASSES, _NAMED_CLASSES = 20, 120


def class_style(label: int, classes: int) -> tuple[str, str]:
    """Choose colour and mark of a class; no two of up to a hundred classes share both.

    Up to ten classes differ in both, so either one is enough to tell them apart.

    Example:
        >>> class_style(11, 10) == class_style(1, 10), class_style(11, 100)[0]
        (True, '#ffa90e')
    """
    mark = label if classes <= len(CLASS_COLOURS) else label // len(CLASS_COLOURS)
    return CLASS_COLOURS[label % len(CLASS_COLOURS)], _MARKS[mark % len(_MARKS)]


def figure_map(
    maps: Sequence[tuple[str, Tensor, tuple[str, str]]],
    labels: Tensor | None,
    classes: Sequence[str] = (),
    *,
    title: str = "",
) -> Figure:
    """Draw maps of the same images side by side, with one colour and mark per class.

    Args:
        maps: Title, points (N, 2) and names of the axes, per panel.
        labels: (N,) int64, or None for images without labels, which are grey.
        classes: Names of the classes, for the legend, which has up to 20.
        title: Above all panels.
    """
    columns, rows = min(len(maps), 2), (len(maps) + 1) // 2
    figure = new_figure(4.3 * columns + 2, 4.4 * rows + 0.6)  # The legend takes about 2 inches.
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(maps) :]:
        axis.remove()
    for axis, (name, points, names) in zip(axes, maps, strict=False):
        _scatter(axis, points, labels, len(classes))
        axis.set(xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
        axis.set_title(shorten(name, 40), fontsize=9)
        axis.set_box_aspect(1)  # The axes of a map have no unit in common.
        axis.spines[["top", "right"]].set_visible(False)
    caption = "" if labels is None else _name_classes(figure, axes[0], labels, classes)
    add_caption(figure, title, caption)
    return figure


def figure_neighbours(
    queries: Tensor,
    neighbours: Tensor,
    similarity: Tensor,
    *,
    names: Sequence[tuple[str, Sequence[str]]] | None = None,
    title: str = "",
) -> Figure:
    """Draw one row per query: its nearest images, those of another class framed.

    Args:
        queries: (M, 3, H, W) uint8.
        neighbours: (M, k, 3, H, W) uint8, the nearest first.
        similarity: (M, k) cosine similarities.
        names: The query's class and its neighbours' classes, per row; None without labels.
        title: Above the sheet.
    """
    rows, columns = neighbours.shape[:2]  # M, k
    figure = new_figure(max(1.05 * (columns + 1), 6), 1.25 * rows + 0.7)
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    for i, axis_row in enumerate(axes):
        query_name = names[i][0] if names else ""
        show_image(axis_row[0], queries[i], shorten(query_name, 15) or "query", frame=_QUERY)
        for j, axis in enumerate(axis_row[1:]):
            text, frame = f"{similarity[i, j]:.2f}", None
            if names and (name := names[i][1][j]) != query_name:
                text, frame = f"{shorten(name, 10)} {text}", _WRONG
            show_image(axis, neighbours[i, j], text, frame=frame)
            axis.spines[:].set_visible(frame is not None)
    legend = "blue: query; number: cosine similarity"
    if names is not None:
        legend += "; orange and named: another class"
    add_caption(figure, title, legend)
    return figure


def figure_confusion(confusion: Tensor, classes: Sequence[str], *, title: str = "") -> Figure:
    """Draw how often images of one class were classified as another, as shares of the class.

    For up to 20 classes the cells hold the shares in per cent; up to 120 classes are named. Rows
    of classes that do not occur stay white.

    Args:
        confusion: (C, C) counts: rows are the true classes, columns the predicted ones.
        classes: Their C names.
        title: What was measured.

    Raises:
        ValueError: If shapes and names do not fit.
    """
    count = len(classes)
    if confusion.shape != (count, count):
        raise ValueError(
            f"confusion must be ({count}, {count}) for {count} classes, got "
            f"{tuple(confusion.shape)}; pass the names of all classes"
        )
    totals = confusion.sum(dim=1, keepdim=True)  # (C, 1)
    shares = (100 * confusion.double() / totals.clamp_min(1)).numpy()  # (C, C), rows sum to 100
    side = min(max(0.33 * count + 2.5, 5.0), 13.0)
    figure = new_figure(side + 0.8, side)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03, label="% of the true class")
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(title, fontsize=10, wrap=True)
    if count <= _NAMED_CLASSES:
        size = min(8, 700 / count)  # A row is 7.8 points high where there are a hundred.
        names = [shorten(name, 24) for name in classes]
        axis.set_xticks(range(count), names, rotation=90, fontsize=size)
        axis.set_yticks(range(count), names, fontsize=size)
    if count <= _NUMBERED_CLASSES:
        for row, column in confusion.nonzero().tolist():
            share = shares[row, column]
            axis.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize=8,
                color="white" if share > 50 else "black",
            )  # fmt: skip
    return figure


def _scatter(axis: Axes, points: Tensor, labels: Tensor | None, classes: int) -> None:
    size = 22 if len(points) <= 1000 else 8
    for label in [None] if labels is None else labels.unique().tolist():
        colour, mark = ("grey", "o") if label is None else class_style(label, classes)
        x, y = (
            points if label is None else points[labels == label]
        ).T.numpy()  # (n, 2) -> 2 x (n,)
        axis.scatter(x, y, s=size, color=colour, marker=mark, linewidths=0, alpha=0.8)


def _name_classes(figure: Figure, axis: Axes, labels: Tensor, classes: Sequence[str]) -> str:
    """Name the classes in a legend, or return the reason why there is none for the caption."""
    present = labels.unique().tolist()
    if len(present) > _MOST_IN_LEGEND:
        shared = " (from 100 classes on, several share one)" if len(classes) > 100 else ""
        return f"{len(present)} classes by colour and mark{shared}: too many for a legend"
    handles = []
    for label in present:
        colour, mark = class_style(label, len(classes))
        name = shorten(classes[label], 24)
        handles.append(axis.scatter([], [], color=colour, marker=mark, label=name))
    # Not at the top, where the title may be as wide as the figure.
    figure.legend(
        handles=handles, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.4
    )
    return ""
