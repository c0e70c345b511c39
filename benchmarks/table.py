"""Write the figures of results/*.json into README.md, with their circumstances.

`--check` only says whether the page is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import ROOT, amount
from methods import table

_BEGIN, _END = "<!-- results: written by table.py -->", "<!-- end of results -->"
_HEAD = (
    "| what | against | quantity | ours | theirs | ratio (quartiles) | n | bound | reached |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def section(record: dict[str, Any]) -> str:
    """Return one run: its circumstances and a row a figure."""
    hardware, versions = record["hardware"], record["versions"]
    machine = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    title = f"### `{record['script']}.py` on {'GPU' if hardware['gpu'] else 'CPU'}"
    circumstances = (
        f"{machine}; Python {versions['python']}, torch {versions['torch']}, "
        f"mixmask {versions['mixmask']}; commit {record['commit']}; {record['date']}."
    )
    if "runs" in record:
        return "\n".join([title, "", circumstances, "", table(record["runs"])])
    sizes = []
    for case in record["cases"]:
        text = ", ".join(f"{name} {value}" for name, value in case["sizes"].items())
        if text not in sizes:
            sizes.append(text)
    listed = f"Sizes: {'; '.join(sizes)}."
    rows = (row(case) for case in record["cases"])
    return "\n".join([title, "", circumstances, listed, "", *_HEAD, *rows])


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
        amount(case["ours"]["median"], case["unit"]),
        amount(case["theirs"]["median"], case["unit"]),
        ratios,
        str(case["n"]),
        "–" if bound is None else f"{bound:.3g}",
        "–" if reached is None else "yes" if reached else "**no**",
    ]
    return f"| {' | '.join(cells)} |"


def rendered(page: str, results: Path) -> str:
    """Return the page with the part between the markers written anew."""
    records = (
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))
    )
    # Accuracies have records of their own form, and are told about in words.
    sections = "\n\n".join(section(record) for record in records if "cases" in record)
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n\n{sections}\n\n{_END}{after}"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    page = ROOT / "README.md"
    old = page.read_text(encoding="utf-8")
    new = rendered(old, ROOT / "results")
    if options.check:
        return int(old != new)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
