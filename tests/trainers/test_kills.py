"""Kills while a run saves for the last time: what a resume leaves is what was to be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY

from mixmask import cli
from mixmask.runs.folder import read_rows

MACHINE = {"images_per_s", "seconds", "wait", "memory_gib"}
WRITERS = ("replace", "hardlink_to", "unlink")


class KilledError(BaseException):
    """Ends a command where SIGKILL would: what comes after it changes no file."""


def train(two_classes: Path, out: Path) -> list[str]:
    options = ["--grid-size", "2", "--epochs", "1", "--save-every", "1", "--keep", "1"]
    return ["pretrain", "--data", str(two_classes), *TINY, *options, "--out", str(out)]


def kill_at(call: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Kill at a call that changes the names of files; return the calls so far."""
    calls: list[str] = []

    def wrap(name: str) -> None:
        change = getattr(Path, name)

        def counting(path: Path, *arguments: Any, **options: Any) -> Any:
            calls.append(f"{name} {path.name}")
            if len(calls) > call:
                raise KilledError
            return change(path, *arguments, **options)

        patch.setattr(Path, name, counting)

    for name in WRITERS:
        wrap(name)
    return calls


def content(folder: Path) -> dict[str, Any]:
    """Return what a run has left: names, weights and measurements, without those of the machine."""
    rows = [{k: v for k, v in row.items() if k not in MACHINE} for row in read_rows(folder)]
    weights = {
        path.name: torch.load(path, weights_only=True)["model"]
        for path in sorted(folder.glob("*.pt"))
    }
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return {"names": names, "rows": rows, "weights": weights}


@pytest.mark.slow
def test_a_run_is_whole_after_a_kill_at_any_moment_of_its_last_save(
    two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        calls = kill_at(10**9, patch)
        assert cli.main(train(two_classes, whole)) == 0
    expected, total = content(whole), len(calls)
    last_save = max(i for i, call in enumerate(calls) if call == "replace last.pt")
    for call in range(last_save, total):
        out = tmp_path / f"killed-{call}"
        with monkeypatch.context() as patch:
            kill_at(call, patch)
            with pytest.raises(KilledError):
                cli.main(train(two_classes, out))
        assert cli.main(["pretrain", "--resume", str(out)]) == 0
        left = content(out)
        assert left["names"] == expected["names"], calls[call]
        assert left["rows"] == expected["rows"], calls[call]
        for name, weights in expected["weights"].items():
            torch.testing.assert_close(left["weights"][name], weights, rtol=0, atol=0)
