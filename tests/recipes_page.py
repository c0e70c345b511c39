"""Read the recipes page: its sections, its code blocks, and its diffs as patches."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent / "mixmask" / "integrations" / "README.md"
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: the heading above it, its language and its text."""

    section: str
    language: str
    text: str


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def blocks(language: str, section: str | None = None) -> list[Block]:
    """Return the page's blocks of a language, of one section or of all."""
    found = []
    for part in re.split(r"^(?=#{2,4} )", text(), flags=re.MULTILINE):
        heading = part.splitlines()[0].lstrip("# ") if part.startswith("#") else ""
        found += [Block(heading, *match.groups()) for match in _FENCE.finditer(part)]
    return [b for b in found if b.language == language and section in (None, b.section)]


def apply(section: str, number: int, folder: Path, replaced: Mapping[str, str]) -> list[str]:
    """Apply one of a section's diffs to a copy of its codebase; return the names of its files.

    Args:
        section: The heading.
        number: Which diff.
        folder: Where the copy is.
        replaced: What to replace in the changed files, with what.
    """
    patch = blocks("diff", section)[number].text
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=folder, check=True)
    names = re.findall(r"^\+\+\+ b/(\S+)$", patch, flags=re.MULTILINE)
    assert names, f"no file is named in section {section!r}"
    for name in names:
        file = folder / name
        code = file.read_text()
        for old, new in replaced.items():
            code = code.replace(old, new)
        file.write_text(code)
    return names


def hunks(diff: str) -> list[tuple[str, str]]:
    """Return what a diff without line numbers replaces, and with what, hunk by hunk."""
    found = []
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        found.append((old, new))
    return found


def table(*columns: str) -> list[dict[str, str]]:
    """Return the rows of the first table that has these columns, by column."""
    for match in re.finditer(r"(?:^\|.*\|\n)+", text(), flags=re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in match[0].splitlines()
        )
        if {*columns} <= {*head}:
            return [dict(zip(head, row, strict=True)) for row in rows]
    raise AssertionError(f"no table with the columns {columns}")
