"""Write EVIDENCE.md from the results of evidence.py, and draw its plots.

What stands outside of a plan's marks is kept; between them, each part of the plan has its tables:
means over seeds, differences to the run without mixing, what is published, and the commands.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import ROOT
from evidence_cells import Part, Plan, Record, load_plan, read_results, resolve
from evidence_plots import draw_part, label
from evidence_stats import (
    MEASURES,
    Estimate,
    Row,
    at_equal_compute,
    at_equal_epochs,
    baselines,
    difference,
    rows_of,
)

_TITLES = {"knn": "kNN (k 20), %", "linear": "linear probe, %"}
_SEEDS = 3


def main() -> None:
    """Write page and plots, or say whether the page is up to date."""
    options = _options()
    results = read_results(options.results)
    plan = resolve(load_plan(options.plan), results)
    drawn = [] if options.check else draw(plan, results, options.results)
    old = options.page.read_text(encoding="utf-8") if options.page.exists() else "# Evidence\n"
    start, end = (
        f"<!-- plan {plan.name}: written by evidence_page.py -->",
        f"<!-- end of {plan.name} -->",
    )
    before, _, rest = old.partition(start)
    _, _, after = rest.partition(end)
    text = f"{before.rstrip()}\n\n{start}\n\n{page(plan, results, options)}\n{end}\n" + (
        f"\n{after.strip()}\n" if after.strip() else ""
    )
    if options.check:
        sys.exit(0 if text == old else f"{options.page.name} is not what its results say")
    options.page.write_text(text, encoding="utf-8")
    print(f"{options.page}: {len(results)} results; {len(drawn)} plots")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="cpu", help="name of a file in plans/, or its path")
    parser.add_argument("--results", type=Path, help="default: results/evidence/PLAN")
    parser.add_argument("--page", type=Path, default=ROOT / "EVIDENCE.md", help="page to write")
    parser.add_argument("--check", action="store_true", help="only compare the page")
    options = parser.parse_args()
    if options.results is None:
        options.results = ROOT / "results" / "evidence" / Path(options.plan).stem
    return options


def draw(plan: Plan, results: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw the parts with results of their own, and remove the plots of the others."""
    known = baselines(plan, results)
    drawn, seen = [], set[str]()
    for part in plan.parts:
        own = {cell.name for cell in part.cells} - seen
        seen |= own
        if own & results.keys():
            drawn += draw_part(part, rows_of(part, results), known, folder)
    for path in set(folder.glob("*.png")) - set(drawn):
        path.unlink()
    return drawn


def page(plan: Plan, results: Mapping[str, Record], options: argparse.Namespace) -> str:
    """Return all that stands below the mark."""
    known = baselines(plan, results)
    text = [plan.about, "", *_legend(results), ""]
    for number, part in enumerate(plan.parts, 1):
        rows = rows_of(part, results)
        names = {cell.name for cell in part.cells}
        done = sum(len(row.records) + row.failed for row in rows)
        text += [f"## {number}. {part.name.capitalize()}", "", part.about, ""]
        if done < len(names):
            text += [f"**Missing: {len(names) - done} of {len(names)} runs.**", ""]
        for plot in part.plots:
            path = options.results / f"{part.name}-{plot}.png"
            if path.exists():
                where = os.path.relpath(path, options.page.parent)
                text += [f"![{part.name}, {plot}]({Path(where).as_posix()})", ""]
        text += _tables(part, rows, known)
        text += _commands(part, results)
    return "\n".join(text).rstrip() + "\n"


def _legend(results: Mapping[str, Record]) -> list[str]:
    records = list(results.values())
    if not records:
        return ["There is no result yet."]
    machines = sorted({_cpu(record) for record in records})
    hours = sum(record["busy_seconds"] for record in records) / 3600
    text = (
        f"{len(records)} runs, {hours:.1f} hours of one process on {' and '.join(machines)}, "
        f"recipe version {records[0]['recipe_version']}. ± is the standard error over seeds; a "
        "difference is paired by seed, in points, with its 95 % interval (Student's t) in "
        "brackets. Equal compute is an equal number of forward-backward passes of the encoder, of "
        "which a forward pass alone is a third. A single run's accuracy has a standard error of "
        f"{_test_error(records):.1f} points from the choice of test images alone. The paper's "
        "figures, and those of Un-Mix, are of a ResNet-18 after 1000 epochs on all 50,000 images."
    )
    return [text]


def _cpu(record: Record) -> str:
    return re.sub(r"\((R|TM)\)| Processor", "", record["hardware"]["cpu"])


def _test_error(records: Sequence[Record]) -> float:
    whole = [record["final"]["linear_error"] for record in records if record["final"]]
    return 100 * sorted(whole)[len(whole) // 2] if whole else float("nan")


def _tables(part: Part, rows: Sequence[Row], known: Sequence[Row]) -> list[str]:
    validation = [row for row in rows if row.cell.split == "validation"]
    test = [row for row in rows if row.cell.split == "test"]
    text = []
    if validation:
        text += _rates_table(validation)
    for measure in MEASURES if test else ():
        text += _table(part, test, known, measure)
    return text


def _rates_table(rows: Sequence[Row]) -> list[str]:
    """Return the accuracies by learning rate, one seed each, on validation images."""
    rates = sorted({row.cell.lr for row in rows if isinstance(row.cell.lr, float)})
    head = ["kNN / linear on validation images, %", *(f"lr {rate:g}" for rate in rates)]
    text = _line(head) + _line(["---"] * len(head))
    for method, arm in dict.fromkeys((row.cell.method, row.cell.arm) for row in rows):
        own = {r.cell.lr: r for r in rows if (r.cell.method, r.cell.arm) == (method, arm)}
        text += _line([f"{method}, {arm}", *(_pair(own.get(rate)) for rate in rates)])
    return [*text, ""]


def _pair(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.failed:
        return "failed"
    means = [row.mean(measure) for measure in MEASURES]
    return " / ".join("missing" if m is None else f"{m.mean:.1f}" for m in means)


def _table(part: Part, rows: Sequence[Row], known: Sequence[Row], measure: str) -> list[str]:
    head = [
        "run", "epochs", "lr", "seeds", _TITLES[measure], "difference at equal epochs",
        "at equal compute",
    ]  # fmt: skip
    papers = bool(part.paper) and measure == "knn"
    head += ["published, kNN"] * papers
    text = _line(head) + _line(["---"] * len(head))
    for row in rows:
        cells = [
            label(row.cell),
            str(row.cell.epochs),
            {None: "its own", "best": "waits"}.get(row.cell.lr, str(row.cell.lr)),  # type: ignore[arg-type]
            _seeds(row),
            _mean(row, measure),
            _difference(row, at_equal_epochs(row, known), measure),
            _difference(row, at_equal_compute(row, known), measure),
        ]
        cells += [part.paper.get(row.cell.arm, "–")] * papers
        text += _line(cells)
    return [*text, ""]


def _seeds(row: Row) -> str:
    done, wanted = len(row.records), len(row.cells)
    text = str(done) if done == wanted else f"{done} of {wanted}"
    return f"**{text}**, fewer than {_SEEDS}" if done < _SEEDS else text


def _mean(row: Row, measure: str) -> str:
    failed = f" ({row.failed} failed)" if row.failed else ""
    found = row.mean(measure)
    if found is None:
        return ("missing" if not row.failed else "–") + failed
    return (
        f"{found.mean:.1f}" + (f" ± {found.error:.1f}" if found.error is not None else "") + failed
    )


def _difference(row: Row, baseline: Row | None, measure: str) -> str:
    if baseline is None:
        return "–"
    return interval(difference(row, baseline, measure))


def interval(found: Estimate | None) -> str:
    """Write a difference with its 95 % interval, and from how many pairs if those are few."""
    if found is None:
        return "missing"
    text = _signed(found.mean)
    if found.error is None:
        return f"{text} (1 seed)"
    low, high = found.mean - found.error, found.mean + found.error
    text += f" [{_signed(low)}, {_signed(high)}]"
    return text if found.n >= _SEEDS else f"{text} ({found.n} seeds)"


def _signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}"  # Without -0.0.


def _commands(part: Part, results: Mapping[str, Record]) -> list[str]:
    """List the commands that rerun what is done, each with where and when it was made."""
    done = [results[name] for name in dict.fromkeys(c.name for c in part.cells) if name in results]
    if not done:
        return []
    made = [
        f"- `{record['command']}` ({record['busy_seconds'] / 60:.0f} min on {_cpu(record)}, "
        f"commit {record['commit']})"
        for record in done
    ]
    return ["<details><summary>Commands</summary>", "", *made, "", "</details>", ""]


def _line(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


if __name__ == "__main__":
    main()
