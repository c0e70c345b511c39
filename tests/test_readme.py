"""What the README shows is true: its code runs, its options exist, its picture is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixmask import cli

ROOT = Path(__file__).parent.parent
SOLO_LEARNS = {"--config-path", "--config-name"}
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:  # Each goes on where the last one ended.
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text


def test_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for command in ("pretrain", "show"):
        assert cli.main([command, "--help"]) == 0
        known += capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert {"--grid-size", "--resume"} <= flags
    assert {flag for flag in flags - SOLO_LEARNS if flag not in known} == set()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
