"""The recipes page is true: its code runs, its diffs parse and name what exists, its links lead."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import recipes_page
from recipes_page import Block

DIFFS = recipes_page.blocks("diff")
PATCHES = [block for block in DIFFS if block.text.startswith("---")]


def test_python_blocks_run() -> None:
    blocks = recipes_page.blocks("python")
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:  # Each goes on where the last one ended.
        exec(compile(block.text, block.section, "exec"), names)  # noqa: S102 - our own text


def _added(diff: str) -> Iterator[str]:
    """Yield the runs of added lines, each with a body if it ends in a colon."""
    run: list[str] = []
    for line in [*diff.splitlines(), ""]:
        if line.startswith("+") and not line.startswith("+++"):
            run.append(line[1:])
        elif run:
            if run[-1].rstrip().endswith(":"):
                run.append(re.sub(r"\S.*", "    pass", run[-1]))
            yield textwrap.dedent("\n".join(run)) + "\n"
            run = []


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield the longest dotted names."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in inner:
            yield ast.unparse(node)


def _resolve(name: str) -> None:
    """Import or look up a dotted name of ours."""
    module, *attributes = name.split(".")
    found = importlib.import_module(module)
    for i, attribute in enumerate(attributes):
        if not hasattr(found, attribute):
            importlib.import_module(".".join([module, *attributes[: i + 1]]))
        found = getattr(found, attribute)


@pytest.mark.parametrize("block", DIFFS, ids=lambda block: block.section)
def test_added_lines_parse_and_name_what_exists(block: Block) -> None:
    seen = 0
    for code in _added(block.text):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mixmask"):
                module = pytest.importorskip(
                    str(node.module), exc_type=ImportError, reason="needs a package that is missing"
                )
                assert all(hasattr(module, alias.name) for alias in node.names), code
                seen += 1
        for name in _names(tree):
            if re.fullmatch(r"mixmask(\.\w+)+", name):
                _resolve(name)
                seen += 1
    assert seen, "the lines name nothing of ours"


@pytest.mark.parametrize("block", PATCHES, ids=lambda block: block.section)
def test_patches_are_whole(block: Block) -> None:
    command = ["git", "apply", "--numstat", "-"]
    run = subprocess.run(command, input=block.text, text=True, capture_output=True, check=True)
    assert run.stdout


@pytest.mark.parametrize("block", PATCHES, ids=lambda block: block.section)
def test_patches_apply(block: Block) -> None:
    """To the checkouts that `MIXMASK_CODEBASES` holds, at the commits that the page names."""
    folder = os.environ.get("MIXMASK_CODEBASES")
    if folder is None:
        pytest.skip("MIXMASK_CODEBASES is not set; it names a folder with checkouts")
    checkout = Path(folder) / block.section.partition("/")[2]
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout.name} in MIXMASK_CODEBASES={folder}")
    command = ["git", "apply", "--check", "-"]
    subprocess.run(command, input=block.text, text=True, cwd=checkout, check=True)


def test_links_lead_somewhere() -> None:
    text = recipes_page.text()
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (recipes_page.PAGE.parent / file).exists(), target
        assert file or anchor in anchors, target


def test_every_row_of_the_contents_has_a_section_and_an_error() -> None:
    contents = recipes_page.table("codebase")
    errors = {row["codebase"]: row for row in recipes_page.table("codebase", "loss")}
    packages = {row["package"]: row for row in recipes_page.table("package", "worst error")}
    assert len(contents) >= 20
    for row in contents:
        name = re.sub(r"\[(.*)\]\(.*\)", r"\1", row["codebase"])
        if name in packages:
            assert row["tested at"] == packages[name]["tested at"]
            continue
        assert name in errors, name
        assert row["tested at"] == errors[name]["tested at"]
        assert row["lines"].split()[0] == errors[name]["lines"]
    for row in errors.values():
        assert all(float(row[column]) <= 1e-9 for column in ("loss", "gradients", "end state"))
