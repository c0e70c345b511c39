"""Figures of runs: one run's curves, comparisons with bands over seeds, studies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmask._checks import check_choice
from mixmask.figures.style import COLOURS, LINES, MEASURES, add_legend, finish_curves, new_figure
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
    half = values.std(dim=0, correction=1)  # (seeds, E) -> (E,)
    if kind == "se":
        half = half / len(values) ** 0.5
    return mean, mean - half, mean + half


def figure_curves(
    rows: Sequence[dict[str, float]], *, title: str = "", queue_steps: int = 0
) -> Figure:
    """Draw a run's losses and, where they were measured, its accuracies over the epochs.

    Each term of the loss has a panel, since their scales may differ.

    Args:
        rows: The rows of `metrics.csv`; epoch 0 is before training.
        title: The run's name.
        queue_steps: Steps in which a queue fills, which are shaded; 0 without a queue.
    """
    columns = {
        name: {int(row["epoch"]): [row[name]] for row in rows if row.get(name) is not None}
        for name in _PANELS
    }
    losses = [name for name in _PANELS if name not in MEASURES and _is_drawn(columns[name])]
    count = len(losses) + any(columns[name] for name in MEASURES)
    figure = new_figure(max(3.6 * count, 5), 3.4)
    axes = figure.subplots(1, max(count, 1), squeeze=False)[0]
    for axis, name in zip(axes, losses, strict=False):
        _draw(axis, columns[name], 0, "", "se", 1)
        axis.set(xlabel="epoch", ylabel="loss, mean over the epoch", title=_PANELS[name])
        low, high = axis.get_ylim()
        # No zoom into noise: a flat curve looks flat.
        room = max(0.025 * abs(low + high) - (high - low), 0) / 2
        axis.set_ylim(low - room, high + room)
        if queue_steps:
            epochs = min(1, queue_steps / rows[-1]["step"]) * rows[-1]["epoch"]
            label = f"steps 1 to {queue_steps:,}: random keys, left in the queue, lower the loss"
            axis.axvspan(0, epochs, facecolor="0.85", edgecolor="0.4", linestyle=":", label=label)
    for i, (name, label) in enumerate(MEASURES.items()):
        if columns[name]:
            _draw(axes[-1], columns[name], i, label, "se", 100)
            axes[-1].set(xlabel="epoch", ylabel="accuracy, %", title="accuracy on the test split")
        if 0 in columns[name]:
            _draw_untrained(axes[-1], columns[name][0][0], f"{label}, untrained", i)
    for axis in axes:
        finish_curves(axis)
    add_legend(figure, axes, title)
    return figure


def figure_comparison(
    curves: Mapping[str, Mapping[str, Points]], *, title: str = "", kind: str = "se"
) -> Figure:
    """Draw the losses and accuracies of several runs: a colour per setting, a band over seeds.

    Losses of different scale, as different methods have them, are drawn in panels of their own.

    Args:
        curves: Name of a setting -> column of `metrics.csv` -> epoch -> one value per seed.
        title: What the settings have in common.
        kind: What the band is, see `band`.
    """
    panels = []  # (column, heading, settings), where losses of one column may take several.
    for column, heading in _PANELS.items():
        points = {name: columns.get(column, {}) for name, columns in curves.items()}
        names = [name for name in points if _is_drawn(points[name])]
        scales = [names] if column in MEASURES else _group_scales({n: points[n] for n in names})
        panels += [(column, heading, names) for names in scales]
    figure = new_figure(9, 3.4 * ((len(panels) + 1) // 2))
    axes = figure.subplots((len(panels) + 1) // 2, 2).flatten()
    axes[-1].axis("on" if len(panels) % 2 == 0 else "off")
    for axis, (column, heading, names) in zip(axes, panels, strict=False):
        accuracy = column in MEASURES
        axis.set(xlabel="epoch", title=heading, ylabel="accuracy, %" if accuracy else "loss")
        for i, (name, columns) in enumerate(curves.items()):
            if name in names:
                label = _with_seeds(name, columns)
                _draw(axis, columns[column], i, label, kind, 100 if accuracy else 1)
        finish_curves(axis)
    add_legend(figure, axes, title, _explain_band(figure, kind))
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
        title: What all panels have in common.
    """
    widths = [1 + len(values) for values in panels.values()]
    figure = new_figure(1.2 + 0.55 * sum(widths), 3.6)
    axes = figure.subplots(
        1, len(panels), sharey=True, squeeze=False, gridspec_kw={"width_ratios": widths}
    )[0]
    for axis, (factor, values) in zip(axes, panels.items(), strict=True):
        for i, (measure, label) in enumerate(MEASURES.items()):
            for x, accuracies in enumerate(values.values()):
                _mark(axis, x + 0.2 * (i - 0.5), accuracies.get(measure, ()), i, label)
            if measure in untrained:
                _draw_untrained(axis, untrained[measure], f"{label}, untrained", i)
        axis.set(title=factor, xlim=(-0.6, len(values) - 0.4))
        axis.set_xticks(range(len(values)), list(values), fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, %")
    add_legend(figure, axes, title, "dot: one seed, bar: mean ± standard deviation")
    return figure


def figure_budgets(
    panels: Mapping[str, Mapping[str, Mapping[str, Points]]],
    *,
    untrained: Mapping[str, float] = MappingProxyType({}),
    title: str = "",
) -> Figure:
    """Draw accuracy over training budgets: one column per method, one row per measure.

    Args:
        panels: Method -> measure -> name of a setting -> epochs -> one accuracy per seed, 0 ... 1.
        untrained: Measure -> accuracy before training.
        title: What all panels have in common.
    """
    figure = new_figure(1.2 + 3.2 * len(panels), 6)
    axes = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for column, (method, measures) in zip(axes.T, panels.items(), strict=True):
        column[0].set_title(method)
        for axis, (measure, label) in zip(column, MEASURES.items(), strict=True):
            for i, (name, points) in enumerate(measures.get(measure, {}).items()):
                measured = {epochs: values for epochs, values in points.items() if values}
                if measured:
                    _draw(axis, measured, i, name, "sd", 100)
            if axis.lines and measure in untrained:
                _draw_untrained(axis, untrained[measure], "untrained")
            if axis in axes[:, 0]:
                axis.set_ylabel(f"{label}, %")
            finish_curves(axis)
        column[-1].set_xlabel("epochs of the whole run")
    add_legend(figure, axes.flat, title, _explain_band(figure, "sd"))
    return figure


def _is_drawn(points: Points) -> bool:
    """Tell whether there is a curve: a run without mixing has a mixed term of zeros."""
    return any(any(values) for values in points.values())


def _group_scales(curves: Mapping[str, Points]) -> list[list[str]]:
    """Split settings whose losses differ in sign or by more than a factor of two throughout."""
    bounds = {name: sorted(v for each in curves[name].values() for v in each) for name in curves}
    groups: list[list[str]] = [[]]
    top = math.inf
    for name in sorted(bounds, key=lambda name: bounds[name]):
        if bounds[name][0] > top + abs(top):  # Twice a positive top; 0 for a negative one.
            groups.append([])
        top = max(bounds[name][-1], top if groups[-1] else -math.inf)
        groups[-1].append(name)
    order = list(curves)
    return sorted(groups, key=lambda names: min(map(order.index, names), default=0))


def _draw_untrained(axis: Axes, accuracy: float, label: str, i: int | None = None) -> None:
    colour = "grey" if i is None else COLOURS[i]
    axis.axhline(100 * accuracy, color=colour, linewidth=1, linestyle=":", label=label)


def _draw(axis: Axes, points: Points, i: int, name: str, kind: str, scale: float) -> None:
    """Draw a line with its band; seeds may differ in number from one point to the next."""
    epochs = sorted(points)
    seeds = (scale * torch.tensor([points[epoch]], dtype=torch.float64).T for epoch in epochs)
    bounds = torch.stack([torch.cat(band(values, kind)) for values in seeds])  # (E, 3)
    mean, low, high = bounds.T.numpy()
    colour, line = COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)]
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
    values = 100 * torch.tensor(accuracies, dtype=torch.float64)[:, None]  # (seeds, 1)
    mean, low, high = (float(bound) for bound in band(values, "sd"))
    colour, marker = COLOURS[i], "os"[i]
    # Pale dots for the seeds behind a bar for their mean.
    axis.plot([x] * len(values), values[:, 0], marker, color=colour, alpha=0.4, markersize=4)
    axis.errorbar(
        x, mean, [[mean - low], [high - mean]], fmt="_", color=colour, capsize=3, markersize=12,
        label=label,
    )  # fmt: skip


def _with_seeds(name: str, columns: Mapping[str, Points]) -> str:
    count = max((len(v) for points in columns.values() for v in points.values()), default=0)
    return f"{name} ({plural(count, 'seed')})"


def _explain_band(figure: Figure, kind: str) -> str:
    banded = any(axis.collections for axis in figure.axes)
    return f"line: mean, band: {BANDS[kind]}" if banded else "one seed each: no band"
