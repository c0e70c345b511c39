"""What the pages show is true: their code runs, their options exist, their links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import recipes_page

from mixmask import cli

ROOT = Path(__file__).parent.parent
SOLO_LEARNS = {"--config-path", "--config-name"}
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]+"
LAUNCHERS = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
# Of accelerate, with its underscores cut off; and of pip.
OTHERS = SOLO_LEARNS | LAUNCHERS | {"--multi", "--num"}
COMMANDS = {
    *("pretrain", "show", "recipes", "detect", "export", "compare", "map", "neighbours", "embed"),
    "ablate",
    *("evaluate knn", "evaluate linear", "evaluate finetune"),
}
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "mixmask/evaluation/README.md",
    "mixmask/integrations/README.md",
    "mixmask/trainers/README.md",
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Return what a page's headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 220


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", read("README.md"), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:  # Each goes on where the last one ended.
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text


def test_every_recipe_is_linked() -> None:
    linked = set(re.findall(r"mixmask/integrations/README\.md#([\w-]+)", read("README.md")))
    for row in recipes_page.table("codebase", "lines"):
        assert row["codebase"].rpartition("#")[2].rstrip(")") in linked, row["codebase"]


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Return every option that a command's help names."""
    known: set[str] = set()
    for command in COMMANDS:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert cli.main([*command.split(), "--help"]) == 0
        known |= set(re.findall(FLAG, shown.getvalue()))
    return known


# Recipes name the options of other programs, and have a test of their own.
@pytest.mark.parametrize(
    "page", ["README.md", "mixmask/evaluation/README.md", "mixmask/trainers/README.md"]
)
def test_commands_and_options_exist(page: str, options: set[str]) -> None:
    text = read(page)
    used = set(re.findall(r"^mixmask ([a-z]+(?: (?:knn|linear|finetune)\b)?)", text, re.MULTILINE))
    assert used <= COMMANDS
    assert set(re.findall(FLAG, text)) - OTHERS - options == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.read_text(encoding="utf-8")), target
