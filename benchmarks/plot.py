"""Draw the ratios of results/*.json with their spread against their bounds: results/ratios.png."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import ROOT
from table import read_records

_REACHED, _MISSED, _BOUND = "#1f6f8b", "#c2452d", "#555555"


def bounded(records: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the figures that have a bound, each with its label, grouped by script."""
    found = []
    for record in records:
        machine = "GPU" if record["hardware"]["gpu"] else "CPU"
        for case in record.get("cases", ()):
            if case["bound"] is not None and case["ratio"] is not None:
                name = f"{case['name']}, {case['quantity']} ({machine})\nbeside {case['against']}"
                found.append((name, case))
    return found


def draw(cases: Sequence[tuple[str, dict[str, Any]]], out: Path) -> None:
    """Draw a row a figure: median, quartiles and bound on one logarithmic axis.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not cases:
        raise ValueError("no figure with a bound to draw; run a script of benchmarks/ first")
    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(9.5, 0.8 + 0.46 * len(cases)), layout="constrained")
    axes.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
    for place, (_, case) in enumerate(cases):
        ratio, color = case["ratio"], _REACHED if case["reached"] else _MISSED
        axes.plot([ratio["q1"], ratio["q3"]], [place] * 2, color=color, linewidth=4, alpha=0.4)
        axes.plot(ratio["median"], place, "o", color=color, markersize=6)
        axes.plot([case["bound"]] * 2, [place - 0.33, place + 0.33], color=_BOUND, linewidth=2)
        number = f"{ratio['median']:.2g}" if ratio["median"] < 0.1 else f"{ratio['median']:.2f}"
        axes.annotate(
            number if case["reached"] else f"{number} missed",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=color,
        )
    axes.set_yticks(range(len(cases)), [name for name, _ in cases], fontsize=7.5)
    axes.set_ylim(len(cases) - 0.4, -0.7)
    axes.set_xscale("log")
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ratio, ours by theirs: dot median, bar quartiles, upright line bound")
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    temporary.replace(out)


def main() -> None:
    """Draw all results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ratios.png")
    options = parser.parse_args()
    draw(bounded(read_records(ROOT / "results")), options.out)


if __name__ == "__main__":
    main()
