"""Figures of features: maps of two dimensions, and sheets of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten colours that differ in lightness too (Petroff, "Accessible Color Sequences for Data
# Visualization"), times ten marks, tell a hundred classes apart.
_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70",
    "#717581", "#92dadd",
)  # fmt: skip
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
_MOST_IN_LEGEND = 20
_QUERY, _WRONG = "#0072b2", "#d55e00"


def class_style(label: int, classes: int) -> tuple[str, str]:
    """Choose colour and mark of a class; no two of up to a hundred classes share both.

    Up to ten classes differ in both, so that neither alone must be seen.

    Example:
        >>> class_style(11, 10) == class_style(1, 10), class_style(11, 100)[0]
        (True, '#ffa90e')
    """
    mark = label if classes <= len(_COLOURS) else label // len(_COLOURS)
    return _COLOURS[label % len(_COLOURS)], _MARKS[mark % len(_MARKS)]


def figure_map(
    maps: Sequence[tuple[str, Tensor, tuple[str, str]]],
    labels: Tensor | None,
    classes: Sequence[str] = (),
    *,
    title: str = "",
) -> Figure:
    """Draw maps of the same images side by side, a colour and a mark a class.

    Args:
        maps: Of each panel its title, points (N, 2) and the names of its axes.
        labels: (N,) int64, or None for images without labels, which are grey.
        classes: Names of the classes, for the legend, which has up to 20.
        title: Above all panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(maps) + 1.5, 5.2), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (name, points, names) in zip(axes, maps, strict=True):
        _scatter(axis, points, labels, len(classes))
        axis.set(xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
        axis.set_title(_shorten(name, 60), fontsize=9)
        axis.set_box_aspect(1)
        axis.spines[["top", "right"]].set_visible(False)
    if labels is not None:
        title += _add_legend(figure, axes[0], labels, classes)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def figure_neighbours(
    queries: Tensor,
    neighbours: Tensor,
    similarity: Tensor,
    *,
    names: Sequence[tuple[str, Sequence[str]]] | None = None,
    title: str = "",
) -> Figure:
    """Draw a sheet: a row a query, its nearest images, those of another class framed.

    Args:
        queries: (M, 3, H, W) uint8.
        neighbours: (M, k, 3, H, W) uint8, the nearest first.
        similarity: (M, k) cosine similarities.
        names: Of each row the query's class and its neighbours'; None without labels.
        title: Above the sheet.
    """
    from matplotlib.figure import Figure

    rows, columns = neighbours.shape[:2]
    figure = Figure(figsize=(max(1.15 * (columns + 1), 6), 1.32 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    for i, axis_row in enumerate(axes):
        query_name = names[i][0] if names else ""
        _show(axis_row[0], queries[i], _shorten(query_name, 18) or "query", _QUERY)
        for j, axis in enumerate(axis_row[1:]):
            other = names is not None and names[i][1][j] != query_name
            text = f"{similarity[i, j]:.2f}"
            if other and names is not None:
                text = f"{_shorten(names[i][1][j], 14)} {text}"
            _show(axis, neighbours[i, j], text, _WRONG if other else None)
    legend = "blue: query; number: cosine similarity"
    if names is not None:
        legend += "; orange and named: another class"
    figure.suptitle(f"{title}\n{legend}" if title else legend, fontsize=9)
    return figure


def _scatter(axis: Axes, points: Tensor, labels: Tensor | None, classes: int) -> None:
    size = 22 if len(points) <= 1000 else 8
    if labels is None:
        x, y = points.T.numpy()
        axis.scatter(x, y, s=size, color="grey", linewidths=0, alpha=0.7)
        return
    for label in labels.unique().tolist():
        colour, mark = class_style(label, classes)
        x, y = points[labels == label].T.numpy()
        axis.scatter(x, y, s=size, color=colour, marker=mark, linewidths=0, alpha=0.8)


def _add_legend(figure: Any, axis: Axes, labels: Tensor, classes: Sequence[str]) -> str:
    """Name the classes beside the panels, or return for the title why they are not named."""
    present = labels.unique().tolist()
    if len(present) > _MOST_IN_LEGEND:
        shared = " (from 100 classes on, several share one)" if len(classes) > 100 else ""
        return f"\n{len(present)} classes by colour and mark{shared}: too many for a legend"
    handles = []
    for label in present:
        colour, mark = class_style(label, len(classes))
        handles.append(axis.scatter([], [], color=colour, marker=mark, label=classes[label]))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return ""


def _shorten(name: str, most: int) -> str:
    """Cut the middle out of a name that would run into its neighbour's."""
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}"


def _show(axis: Axes, image: Tensor, title: str, colour: str | None) -> None:
    axis.imshow(image.permute(1, 2, 0).to(torch.uint8).numpy())
    axis.set_title(title, fontsize=7, color=colour or "black", pad=3)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=3)
