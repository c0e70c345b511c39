"""Figures of runs: one run's curves, comparisons with bands over seeds, studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmask._checks import check_choice
from mixmask.figures.style import (
    COLOURS,
    MEASURES,
    add_caption,
    add_legend,
    finish_curves,
    new_figure,
)
from mixmask.runs.records import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Epoch -> one value per seed.
Points = Mapping[int, Sequence[float]]

BANDS = {
    "se": "± standard error over seeds",
    "sd": "± standard deviation over seeds",
    "range": "smallest to largest seed",
}
_PANELS = {
    "loss_clean": "clean term of the loss",
    "loss_mixed": "mixed term of the loss",
    **MEASURES,
}
# A second code for more lines than colours.
_STYLES = ("-", "--", ":", "-.")


def band(values: Tensor, kind: str = "se") -> tuple[Tensor, Tensor, Tensor]:
    """Compute a mean over seeds and the bounds of its band.

    Args:
        values: (seeds, E).
        kind: "se" for the mean ± its standard error, "sd" for ± the sample standard deviation,
            "range" for the smallest and the largest value.

    Returns:
        Mean, lower and upper bound, (E,) each; with one seed all three are its values.

    Example:
        >>> [bound.tolist() for bound in band(torch.tensor([[1.0], [3.0]]), "range")]
        [[2.0], [1.0], [3.0]]
    """
    check_choice("band", kind, tuple(BANDS))
    mean = values.mean(dim=0)
    if len(values) == 1:
        return mean, mean, mean
    if kind == "range":
        return mean, values.amin(dim=0), values.amax(dim=0)
    half = values.std(dim=0, correction=1)
    if kind == "se":
        half = half / len(values) ** 0.5
    return mean, mean - half, mean + half


def figure_curves(rows: Sequence[dict[str, float]]) -> Figure:
    """Draw a run's loss and, where they were measured, its accuracies over the epochs.

    Args:
        rows: The rows of `metrics.csv`.
    """
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    _draw_losses(left, [row for row in rows if "loss" in row])
    right.set(xlabel="epoch", ylabel="accuracy on the test split, %", title="representation")
    for name, label in reversed(MEASURES.items()):
        measured = [row for row in rows if row.get(name) is not None]
        if measured:
            epochs = [row["epoch"] for row in measured]
            values = [100 * row[name] for row in measured]
            (line,) = right.plot(epochs, values, marker="o", label=label)
            right.axhline(values[0], color=line.get_color(), linewidth=0.8, linestyle=":")
    if right.lines:
        right.legend(frameon=False, title="dotted: untrained")
    for axis in (left, right):
        finish_curves(axis)
    return figure


def figure_comparison(
    curves: Mapping[str, Mapping[str, Points]], *, title: str = "", kind: str = "se"
) -> Figure:
    """Draw the losses and accuracies of several runs: a colour per setting, a band over seeds.

    Args:
        curves: Name of a setting -> column of `metrics.csv` -> epoch -> one value per seed.
        title: What the settings have in common.
        kind: What the band is, see `band`.
    """
    figure = new_figure(9, 6.8)
    axes = figure.subplots(2, 2)
    for axis, (column, heading) in zip(axes.flat, _PANELS.items(), strict=True):
        accuracy = column in MEASURES
        axis.set(xlabel="epoch", title=heading, ylabel="accuracy, %" if accuracy else "loss")
        for i, (name, columns) in enumerate(curves.items()):
            points = columns.get(column, {})
            if any(any(values) for values in points.values()):  # No mixed term is no curve of 0.
                _draw(axis, points, i, _with_seeds(name, columns), kind, 100 if accuracy else 1)
        finish_curves(axis)
    add_legend(figure, axes.flat)
    drawn = [points for columns in curves.values() for points in columns.values()]
    _caption(figure, title, drawn, kind)
    return figure


def figure_factors(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    *,
    untrained: Mapping[str, float],
    title: str = "",
) -> Figure:
    """Draw a study of one factor at a time: one panel per factor, one mark per value.

    Args:
        panels: Factor -> value -> measure ("knn", "linear") -> one accuracy per seed, 0 ... 1.
        untrained: Measure -> accuracy before training.
        title: What holds in all panels.
    """
    widths = [1 + len(values) for values in panels.values()]
    figure = new_figure(2 + 0.75 * sum(widths), 4)
    axes = figure.subplots(
        1, len(panels), sharey=True, squeeze=False, gridspec_kw={"width_ratios": widths}
    )[0]
    for axis, (factor, values) in zip(axes, panels.items(), strict=True):
        for i, (measure, label) in enumerate(MEASURES.items()):
            for x, accuracies in enumerate(values.values()):
                _mark(axis, x + 0.2 * (i - 0.5), accuracies.get(measure, ()), i, label)
            if measure in untrained:
                axis.axhline(
                    100 * untrained[measure], color=COLOURS[i], linewidth=0.8, linestyle=":",
                    label=f"{label}, untrained",
                )  # fmt: skip
        axis.set(title=factor, xlim=(-0.6, len(values) - 0.4))
        axis.set_xticks(range(len(values)), list(values))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, %")
    add_legend(figure, axes)
    add_caption(figure, title, "dot: one seed, bar: mean ± standard deviation")
    return figure


def figure_budgets(
    panels: Mapping[str, Mapping[str, Mapping[str, Points]]], *, title: str = "", kind: str = "sd"
) -> Figure:
    """Draw accuracy over training budgets: one column per method, one row per measure.

    Args:
        panels: Method -> measure -> name of a setting -> epochs -> one accuracy per seed, 0 ... 1.
        title: What holds in all panels.
        kind: What the band is, see `band`.
    """
    figure = new_figure(1.2 + 3.2 * len(panels), 6)
    axes = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for column, (method, measures) in zip(axes.T, panels.items(), strict=True):
        column[0].set_title(method)
        for axis, (measure, label) in zip(column, MEASURES.items(), strict=True):
            for i, (name, points) in enumerate(measures.get(measure, {}).items()):
                measured = {epochs: values for epochs, values in points.items() if values}
                if measured:
                    _draw(axis, measured, i, name, kind, 100)
            if axis in axes[:, 0]:
                axis.set_ylabel(f"{label}, %")
            finish_curves(axis)
        column[-1].set_xlabel("epochs of the whole run")
    add_legend(figure, axes.flat)
    drawn = [
        points
        for measures in panels.values()
        for settings in measures.values()
        for points in settings.values()
    ]
    _caption(figure, title, drawn, kind)
    return figure


def _draw(axis: Axes, points: Points, i: int, name: str, kind: str, scale: float) -> None:
    """Draw a line with its band; seeds may differ in number from one point to the next."""
    epochs = sorted(points)
    seeds = (scale * torch.tensor([points[epoch]], dtype=torch.float64).T for epoch in epochs)
    bounds = torch.stack([torch.cat(band(values, kind)) for values in seeds])  # (E, 3)
    mean, low, high = bounds.T.numpy()
    colour, line = COLOURS[i % len(COLOURS)], _STYLES[i // len(COLOURS) % len(_STYLES)]
    marker = "o" if len(epochs) < 16 else ""
    axis.plot(epochs, mean, label=name, marker=marker, markersize=4, color=colour, linestyle=line)
    if (low < high).any():
        # The edges tell bands apart where several lie on each other.
        axis.fill_between(
            epochs, low, high, facecolor=(colour, 0.12), edgecolor=(colour, 0.6), linewidth=0.7
        )


def _mark(axis: Axes, x: float, accuracies: Sequence[float], i: int, label: str) -> None:
    if not accuracies:
        return
    values = 100 * torch.tensor(accuracies, dtype=torch.float64)[:, None]
    mean, low, high = (float(bound) for bound in band(values, "sd"))
    colour, marker = COLOURS[i], "os"[i]
    axis.plot([x] * len(values), values[:, 0], marker, color=colour, alpha=0.4, markersize=4)
    axis.errorbar(
        x, mean, [[mean - low], [high - mean]], fmt="_", color=colour, capsize=3, markersize=12,
        label=label,
    )  # fmt: skip


def _with_seeds(name: str, columns: Mapping[str, Points]) -> str:
    count = max((len(v) for points in columns.values() for v in points.values()), default=0)
    return f"{name} ({plural(count, 'seed')})"


def _caption(figure: Figure, title: str, drawn: Sequence[Points], kind: str) -> None:
    """Say above the panels what they share, and what the band is, where there is one."""
    banded = any(len(values) > 1 for points in drawn for values in points.values())
    caption = f"line: mean, band: {BANDS[kind]}" if banded else "one seed each: no band"
    add_caption(figure, title, caption)


def _draw_losses(axis: Axes, rows: Sequence[dict[str, float]]) -> None:
    epochs = [row["epoch"] for row in rows]
    axis.plot(epochs, [row["loss_clean"] for row in rows], label="clean term", marker=".")
    if any(row["loss_mixed"] for row in rows):
        axis.plot(epochs, [row["loss_mixed"] for row in rows], label="mixed term", marker=".")
    axis.set(xlabel="epoch", ylabel="loss", title="training")
    axis.legend(frameon=False)
