"""Plots of the evidence: accuracy over rates, epochs and compute; differences with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from evidence_cells import Cell, Part
from evidence_stats import (
    MEASURES,
    Estimate,
    Row,
    at_equal_compute,
    at_equal_epochs,
    difference,
    mean_error,
)

_PLAIN, _MIXED, _OTHER = "#555555", "#1f6f8b", "#c2452d"
_SHADES = {"knn": "#6a4c93", "linear": "#d97706"}
_NAMES = {"knn": "kNN", "linear": "linear probe"}
_LABELS = {"knn": "kNN accuracy, %", "linear": "linear probe, %"}
_PASSES = "forward-backward passes per image"
_FEW = 3

Draw = Callable[[Sequence[Row], Sequence[Row]], Any]


def label(cell: Cell) -> str:
    """Name a row: its mixture, and what is not as in most parts."""
    unusual = [
        cell.method if cell.method != "moco-v2" else "",
        cell.arch if cell.arch != "narrow" else "",
        cell.data if cell.data != "cifar100" else "",
        f"{cell.code}'s code" if cell.code != "mixmask" else "",
    ]
    return ", ".join([cell.arm, *filter(None, unusual)])


def draw_part(part: Part, rows: Iterable[Row], known: Sequence[Row], folder: Path) -> list[Path]:
    """Draw a part's plots, as far as there are results for them.

    Args:
        part: The part; its `plots` say which.
        rows: Its rows.
        known: The rows of runs without mixing.
        folder: Where the PNGs go.

    Returns:
        The files that were written.
    """
    mpl.use("agg")
    from matplotlib import pyplot as plt

    measured = [row for row in rows if row.records]
    found = []
    for name in part.plots:
        figure = _PLOTS[name](measured, known)
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{part.name}-{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        found.append(path)
    return found


def _rates(rows: Sequence[Row], known: Sequence[Row]) -> Any:
    """Draw accuracies over the learning rate, a panel per method."""
    del known
    rows = [row for row in rows if row.cell.split == "validation"]
    methods = list(dict.fromkeys(row.cell.method for row in rows))
    if not rows:
        return None
    figure, panels = _panels(len(methods), 1, sharey=True)
    for panel, method in zip(panels.flat, methods, strict=True):
        own = [row for row in rows if row.cell.method == method]
        for mixes in dict.fromkeys(row.cell.mixes for row in own):
            side = sorted((r for r in own if r.cell.mixes == mixes), key=lambda r: _rate(r.cell))
            for measure, style in zip(MEASURES, ("o-", "s--"), strict=True):
                means = [statistics.fmean(row.accuracies(measure).values()) for row in side]
                panel.plot(
                    [_rate(row.cell) for row in side],
                    means,
                    style,
                    color=_color(side[0].cell),
                    label=f"{side[0].cell.arm}, {_NAMES[measure]}",
                )
        _log_axis(panel, [_rate(row.cell) for row in own], "learning rate")
        panel.set_title(method)
    panels.flat[0].set_ylabel("validation accuracy, %")
    _legend(figure, panels.flat[0])
    return figure


def _budgets(rows: Sequence[Row], known: Sequence[Row]) -> Any:
    """Draw final accuracies over the budget: a row per measure, epochs beside passes."""
    del known
    if not rows:
        return None
    figure, panels = _panels(2, 2, sharey="row")
    for line, measure in zip(panels, MEASURES, strict=True):
        for panel, axis in zip(line, ("epochs", _PASSES), strict=True):
            budgets: set[float] = set()
            for arm in dict.fromkeys(row.cell.arm for row in rows):
                own = sorted((r for r in rows if r.cell.arm == arm), key=lambda r: r.cell.epochs)
                x = [row.cell.epochs if axis == "epochs" else row.compute or 0 for row in own]
                _band(panel, x, [row.mean(measure) for row in own], _color(own[0].cell), arm, "o-")
                budgets |= set(x)
            _log_axis(panel, list(budgets), axis)
        line[0].set_ylabel(_LABELS[measure])
    _legend(figure, panels.flat[0], band=True)
    return figure


def _curves(rows: Sequence[Row], known: Sequence[Row]) -> Any:
    """Draw kNN accuracies during runs of one budget that all arms have, beside equal compute."""
    arms = dict.fromkeys(label(row.cell) for row in rows)
    budgets = [{r.cell.epochs for r in rows if label(r.cell) == arm} for arm in arms]
    shared = sorted(set.intersection(*budgets)) if len(budgets) > 1 else []
    if not shared:
        return None
    choices = {epochs: _beside(rows, epochs, known) for epochs in shared}
    # The longest one with a baseline of equal compute, or else the longest.
    chosen = max(shared, key=lambda epochs: (bool(choices[epochs]), epochs))
    shown, longer = [row for row in rows if row.cell.epochs == chosen], choices[chosen]
    figure, panels = _panels(2, 1, sharey=True)
    for row in [*shown, *longer]:
        epochs, values = row.curve()
        n = len(row.records)
        name = f"{label(row.cell)}, {row.cell.epochs} epochs, {n} seed{'s' * (n != 1)}"
        style = "-" if row in shown else "--"
        for panel, scale in zip(panels.flat, (1, row.passes or 0), strict=True):
            points = [mean_error(at) for at in values]
            _band(panel, [scale * e for e in epochs], points, _color(row.cell), name, style)
    for panel, axis in zip(panels.flat, ("epochs", _PASSES), strict=True):
        panel.set_xlabel(axis)
    panels.flat[0].set_ylabel(_LABELS["knn"])
    _legend(figure, panels.flat[0], band=True)
    return figure


def _beside(rows: Sequence[Row], epochs: int, known: Sequence[Row]) -> list[Row]:
    """Return the baselines of the same compute as rows of a budget, and of another length."""
    found = [at_equal_compute(row, known) for row in rows if row.cell.epochs == epochs]
    return [row for row in found if row and row.records and row.cell.epochs != epochs]


def _differences(rows: Sequence[Row], known: Sequence[Row]) -> Any:
    """Draw differences to the baseline as dots with intervals, at equal epochs and compute."""
    kinds = {"epochs": at_equal_epochs, "compute": at_equal_compute}
    sides: dict[str, list[tuple[Row, Row]]] = {}
    for kind, find in kinds.items():
        found = [(row, find(row, known)) for row in rows if row.cell.split == "test"]
        pairs = [(row, other) for row, other in found if other and other.records]
        if pairs:
            sides[kind] = pairs
    compared = [row.cell.name for pairs in sides.values() for row, _ in pairs]
    shown = [row for row in rows if row.cell.name in compared]
    if not shown:
        return None
    height = 1.6 + 0.5 * len(shown)
    figure, panels = _panels(len(sides), 1, sharex=True, sharey=True, height=height)
    few = False
    for panel, (kind, pairs) in zip(panels.flat, sides.items(), strict=True):
        few |= _dots(panel, pairs, shown)
        panel.set_title(f"at equal {kind}")
        panel.set_xlabel("difference to no mixing, points")
    names = [f"{label(row.cell)}, {row.cell.epochs} epochs" for row in shown]
    panels.flat[0].set_yticks(range(len(shown)), names)
    panels.flat[0].set_ylim(len(shown) - 0.5, -0.5)
    for measure, color in _SHADES.items():
        name = f"{_NAMES[measure]}, 95 % interval"
        panels.flat[0].plot([], [], "o-", color=color, label=name)
    if few:
        panels.flat[0].plot([], [], "o", color="#999999", mfc="white", label="fewer than 3 seeds")
    _legend(figure, panels.flat[0])
    return figure


def _dots(panel: Any, pairs: Sequence[tuple[Row, Row]], shown: Sequence[Row]) -> bool:
    """Draw the differences of pairs, each on its row's line; say whether any has few seeds."""
    panel.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
    few = False
    for row, baseline in pairs:
        for shift, measure in zip((-0.14, 0.14), MEASURES, strict=True):
            gain = difference(row, baseline, measure)
            if gain is not None:
                _dot(panel, gain, shown.index(row) + shift, _SHADES[measure])
                few |= gain.n < _FEW
    for row in shown:
        if not any(row is own for own, _ in pairs):
            panel.text(0, shown.index(row), " not run", color=_PLAIN, va="center")
    return few


def _dot(panel: Any, found: Estimate, place: float, color: str) -> None:
    """Draw a dot with its interval; an interval of two seeds would hide all others."""
    enough = found.n >= _FEW and found.error is not None
    if enough:
        low, high = found.mean - found.error, found.mean + found.error  # type: ignore[operator]
        panel.plot([low, high], [place] * 2, color=color, linewidth=2)
    panel.plot(found.mean, place, "o", color=color, mfc=color if enough else "white", markersize=6)


def _band(
    panel: Any,
    x: Sequence[float],
    points: Sequence[Estimate | None],
    color: str,
    name: str,
    style: str,
) -> None:
    """Draw a line with a band of one standard error where there are several seeds."""
    known = [(at, point) for at, point in zip(x, points, strict=True) if point is not None]
    at = [a for a, _ in known]
    means = [point.mean for _, point in known]
    errors = [point.error or 0.0 for _, point in known]
    panel.plot(at, means, style, color=color, label=name, markersize=5)
    low, high = ([m + s * e for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
    panel.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)


def _panels(
    columns: int,
    lines: int,
    *,
    sharex: bool = False,
    sharey: Literal["row"] | bool,
    height: float | None = None,
) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    return plt.subplots(
        lines,
        columns,
        figsize=(max(6.0, 4.6 * columns), height or 3.6 * lines + 0.6),
        sharex=sharex,
        sharey=sharey,
        squeeze=False,
        layout="constrained",
    )


def _legend(figure: Any, panel: Any, *, band: bool = False) -> None:
    """Put one legend above all panels, where it covers nothing."""
    if band:
        panel.fill_between([], [], color=_PLAIN, alpha=0.2, label="band: one standard error")
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)


def _log_axis(panel: Any, values: Sequence[float], name: str) -> None:
    """Scale an axis so that doublings, from the smallest value on, are as far apart."""
    from matplotlib.ticker import NullLocator

    doublings = math.floor(math.log2(max(values) / min(values)) + 0.01)
    ticks = [min(values) * 2**i for i in range(doublings + 1)]
    panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(f"{name} (log scale)")


def _rate(cell: Cell) -> float:
    assert isinstance(cell.lr, float)
    return cell.lr


def _color(cell: Cell) -> str:
    if cell.code != "mixmask":
        return _OTHER
    return _MIXED if cell.mixes else _PLAIN


_PLOTS: dict[str, Draw] = {
    "rates": _rates,
    "budgets": _budgets,
    "curves": _curves,
    "differences": _differences,
}
