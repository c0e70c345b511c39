"""Draw the ratios of results/*.json with their spread, each file's beside it as a PNG.

What has a bound is gathered in results/ratios.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import ROOT

from mixmask.runs.files import atomic_write

_REACHED, _MISSED, _BOUND = "#1f6f8b", "#c2452d", "#555555"


Named = tuple[str, dict[str, Any]]


def labelled(record: dict[str, Any]) -> list[Named]:
    """Return a record's ratios, each with its label."""
    machine = "GPU" if record["hardware"]["gpu"] else "CPU"
    return [
        (f"{case['name']}, {case['quantity']} ({machine})\nbeside {case['against']}", case)
        for case in record.get("cases", ())
        if case["ratio"] is not None
    ]


def bounded(cases: Sequence[Named]) -> list[Named]:
    """Return those that have a bound."""
    return [(name, case) for name, case in cases if case["bound"] is not None]


def draw(cases: Sequence[Named], out: Path) -> None:
    """Draw one row per figure: median, quartiles and bound on one logarithmic axis.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not cases:
        raise ValueError("no ratio to draw; run a script of benchmarks/ first")
    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(9.5, 1.0 + 0.46 * len(cases)), layout="constrained")
    axes.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
    for place, (_, case) in enumerate(cases):
        ratio, missed = case["ratio"], case["reached"] is False
        color = _MISSED if missed else _REACHED
        axes.plot([ratio["q1"], ratio["q3"]], [place] * 2, color=color, linewidth=4, alpha=0.4)
        axes.plot(ratio["median"], place, "o", color=color, markersize=6)
        if case["bound"] is not None:
            axes.plot([case["bound"]] * 2, [place - 0.33, place + 0.33], color=_BOUND, linewidth=2)
        number = f"{ratio['median']:.2g}" if ratio["median"] < 0.1 else f"{ratio['median']:.2f}"
        axes.annotate(
            f"{number} missed" if missed else number,
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=color,
        )
    axes.set_yticks(range(len(cases)), [name for name, _ in cases], fontsize=7.5)
    axes.set_ylim(len(cases) - 0.4, -0.7)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.45), max(high, 2.2))  # So that there are ticks to read by.
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ratio, ours by theirs: dot median, bar quartiles, upright line bound")
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as (temporary,):
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main() -> None:
    """Draw all results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder to draw into")
    out: Path = parser.parse_args().out
    gathered: list[Named] = []
    for path in sorted((ROOT / "results").glob("*.json")):
        cases = labelled(json.loads(path.read_text(encoding="utf-8")))
        if cases:
            draw(cases, out / f"{path.stem}.png")
        gathered += bounded(cases)
    draw(gathered, out / "ratios.png")


if __name__ == "__main__":
    main()
