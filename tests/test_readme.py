"""What the README shows is true: its code runs, its options exist, its picture is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixmask import cli

ROOT = Path(__file__).parent.parent
SOLO_LEARNS = {"--config-path", "--config-name"}
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]+"
LAUNCHERS = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
# Of accelerate, with its underscores cut off; and of pip.
OTHERS = SOLO_LEARNS | LAUNCHERS | {"--multi", "--num"}
COMMANDS = {
    *("pretrain", "show", "recipes", "detect", "export", "compare", "map", "neighbours", "ablate"),
    *("evaluate knn", "evaluate linear", "evaluate finetune"),
}
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:  # Each goes on where the last one ended.
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text


def test_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known: set[str] = set()
    for command in COMMANDS:
        assert cli.main([*command.split(), "--help"]) == 0
        known |= set(re.findall(FLAG, capsys.readouterr().out))
    used = set(re.findall(r"^mixmask ([a-z]+(?: (?:knn|linear|finetune)\b)?)", TEXT, re.MULTILINE))
    assert used <= COMMANDS
    flags = set(re.findall(FLAG, TEXT))
    assert {"--grid-size", "--resume"} <= flags
    assert flags - OTHERS - known == set()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
