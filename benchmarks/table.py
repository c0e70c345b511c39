"""Write the figures of results/*.json into README.md, with their circumstances.

`--check` only says whether the page is up to date; `--summary` prints a short table, of the
figures that have a bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common import ROOT, amount, figure_line, throughput
from methods import table
from scaling import tables
from time_to_accuracy import line, outcome

PARTS = {
    "kills": "runs killed at random moments and resumed end in the same weights, to the bit",
    "flips": "one bit of `last.pt` flipped: told, and `previous.pt` used",
    "torn": "`last.pt` cut or its end zeroed: told, and `previous.pt` used",
    "disk": "a full disk: one line, no temporary file, the same weights when there is room",
    "ranks": "one of two processes killed: the other ends in one line, and both go on exactly",
    "commands": "random command lines run or are refused in one line, and write nothing elsewhere",
    "configurations": "edited and damaged `config.json`: the same",
    "drift": "one long run",
}
_BEGIN, _END = "<!-- results: written by table.py -->", "<!-- end of results -->"
_HEAD = (
    "| what | against | quantity | ours | theirs | ratio (quartiles) | n | bound | reached |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def section(record: dict[str, Any]) -> str:
    """Return one run: its circumstances and one row per figure."""
    hardware, versions = record["hardware"], record["versions"]
    machine = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    title = f"### `{record['script']}.py` on {'GPU' if hardware['gpu'] else 'CPU'}"
    circumstances = (
        f"{machine}; Python {versions['python']}, torch {versions['torch']}, "
        f"mixmask {versions['mixmask']}; commit {record['commit']}; {record['date']}."
    )
    if "soak" in record:
        return "\n".join([title, "", circumstances, "", reliability(record["soak"])])
    if "scaling" in record:
        return "\n".join([title, "", circumstances, "", tables(record["scaling"])])
    if "runs" in record:
        return "\n".join([title, "", circumstances, "", table(record["runs"])])
    if "curve" in record:
        rows = (f"- {line(point)}" for point in record["curve"])
        return "\n".join([title, "", circumstances, "", outcome(record) + ".", "", *rows])
    figures = [f"- {figure_line(figure)}" for figure in record.get("figures", ())]
    if not record["cases"]:
        return "\n".join([title, "", circumstances, "", *figures])
    sizes = []
    for case in record["cases"]:
        text = ", ".join(f"{name} {value}" for name, value in case["sizes"].items())
        if text not in sizes:
            sizes.append(text)
    listed = f"Sizes: {'; '.join(sizes)}."
    rows = (row(case) for case in record["cases"])
    lines = [title, "", circumstances, listed, "", *_HEAD, *rows]
    return "\n".join([*lines, "", *figures] if figures else lines)


def reliability(soak: dict[str, dict[str, Any]]) -> str:
    """Return a row for each part: its trials with all seeds, and how many failed."""
    rows = ["| what was done | trials | of which | failed | commit, date |", "| --- " * 5 + "|"]
    for name, by_seed in soak.items():
        kinds: Counter[str] = Counter()
        for run in by_seed.values():
            kinds.update(run["kinds"])
        cells = [
            f"`{name}`: {PARTS[name]}",
            f"{sum(kinds.values()):,}",
            _kinds(kinds, [run["growth"] for run in by_seed.values() if run["growth"]]),
            f"{sum(len(run['failures']) for run in by_seed.values()):,}",
            "; ".join(sorted({f"{run['commit']}, {run['date'][:10]}" for run in by_seed.values()})),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _kinds(kinds: Mapping[str, int], growths: Iterable[dict[str, float]]) -> str:
    parts = [f"{count:,} {kind}" if count > 1 else kind for kind, count in kinds.items()]
    for growth in growths:
        memory = growth["bytes of memory"] / 2**20
        parts.append(
            f"second half against first: {memory:+.1f} MiB, {growth['file handles']:+.0f} file "
            f"handles, {growth['threads']:+.0f} threads, "
            f"{growth['time per step, second half by first']:.2f} of the time per step"
        )
    return "; ".join(parts)


def row(case: dict[str, Any]) -> str:
    """Return a figure as a row of the table."""
    ratio, bound, reached = case["ratio"], case["bound"], case["reached"]
    if ratio is None:
        ratios = "–"
    elif case["n"] == 1:
        ratios = f"{ratio['median']:.3f}"
    else:
        ratios = f"{ratio['median']:.3f} ({ratio['q1']:.3f} … {ratio['q3']:.3f})"
    cells = [
        case["name"],
        case["against"].replace("|", "\\|"),
        case["quantity"],
        cell(case, "ours"),
        cell(case, "theirs"),
        ratios,
        str(case["n"]),
        "–" if bound is None else f"{bound:.3g}",
        "–" if reached is None else "yes" if reached else "**no**",
    ]
    return f"| {' | '.join(cells)} |"


def cell(case: dict[str, Any], side: str) -> str:
    """Return the median of a side, and the images per second that follow from it."""
    text = amount(case[side]["median"], case["unit"])
    if case.get("images") and case["unit"] == "s":
        text += f" ({throughput(case, side)})"
    return text


def read_records(results: Path) -> list[dict[str, Any]]:
    """Read all records, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]


def summary(records: Iterable[dict[str, Any]]) -> str:
    """Return a row for each figure that has a bound."""
    rows = ["| what | beside | machine | ratio | bound | reached |", "| --- " * 6 + "|"]
    for record in records:
        machine = "GPU" if record["hardware"]["gpu"] else "CPU"
        for case in record.get("cases", ()):
            if case["bound"] is None or case["ratio"] is None:
                continue
            cells = [
                f"{case['name']}, {case['quantity']}",
                case["against"].replace("|", "\\|"),
                machine,
                f"{case['ratio']['median']:.2f}",
                f"{case['bound']:.2f}",
                "yes" if case["reached"] else "**no**",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def rendered(page: str, results: Path) -> str:
    """Return the page with the part between the markers replaced."""
    # Detectors have a record of their own form, and are told about in words.
    records = (
        r for r in read_records(results) if {"cases", "runs", "curve", "scaling", "soak"} & r.keys()
    )
    sections = "\n\n".join(section(record) for record in records)
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n\n{sections}\n\n{_END}{after}"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--summary", action="store_true", help="print a short table, no page")
    options = parser.parse_args()
    if options.summary:
        print(summary(read_records(ROOT / "results")))
        return 0
    page = ROOT / "README.md"
    old = page.read_text(encoding="utf-8")
    new = rendered(old, ROOT / "results")
    if options.check:
        return int(old != new)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
