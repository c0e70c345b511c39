"""`ablate` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, is_png, refused

from mixmask import cli
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.studies import StudyRun


def study(two_classes: Path, out: Path, *more: str) -> list[str]:
    return [
        "ablate", "--data", str(two_classes), *TINY, "--grid-size", "2", "--grid-sizes", "2", "4",
        "--ratio", "0.5", "--epochs", "1", "--out", str(out), *more,
    ]  # fmt: skip


def test_ablate_is_interrupted_with_130_goes_on_and_adds_seeds(
    two_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "study"
    words = study(two_classes, out, "--epochs", "2", "--measure-every", "0")
    after_step, steps = MoCo.after_step, [0]

    def interrupted(self: Any, done: float) -> None:
        steps[0] += 1
        if steps[0] == 7:  # The third of four steps of the second run; Ctrl-C is this signal.
            os.kill(os.getpid(), signal.SIGINT)
        after_step(self, done)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(MoCo, "after_step", interrupted)
        assert cli.main([*words, "--seeds", "1"]) == 130
    captured = capsys.readouterr()
    assert captured.err.strip().endswith("interrupted; the same command continues the study")
    assert "[1/4] grid-2_block_ratio-0.5_switch, seed 0 … kNN" in captured.out
    assert "| grid size | 2 | 1 |" in (out / "masks.md").read_text()
    first = out / "grid-2_block_ratio-0.5_switch" / "seed-0" / "last.pt"
    written = first.stat().st_mtime_ns

    with monkeypatch.context() as patch:  # Seven steps are behind it: the others are counted.
        steps[0] = 8
        patch.setattr(MoCo, "after_step", interrupted)
        assert cli.main([*words, "--seeds", "1"]) == 0
    assert steps[0] == 8 + 4 * 4 - 7
    printed = capsys.readouterr().out
    assert "4 runs (1 finished)" in printed
    assert [line[:5] for line in printed.splitlines() if line.startswith("[")] == [
        "[2/4]", "[3/4]", "[4/4]",
    ]  # fmt: skip
    assert (out / "masks.md").read_text() in printed
    assert len((out / "masks.csv").read_text().splitlines()) == 1 + 7
    assert is_png(out / "masks.png")

    assert cli.main([*words, "--seeds", "2", "--grid-sizes", "2"]) == 0
    assert "6 runs (3 finished)" in capsys.readouterr().out
    assert "| grid size | 2 | 2 |" in (out / "masks.md").read_text()
    assert first.stat().st_mtime_ns == written
    line = refused([*words, "--lr", "0.1"], capsys)
    assert "holds a run with lr 0.03, this study has lr 0.1" in line


def test_ablate_budgets_compares_without_and_with_mixmask(
    two_classes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    words = [
        "ablate", "--study", "budgets", "--data", str(two_classes), *TINY, "--grid-size", "2",
        "--methods", "moco-v2", "--budgets", "1", "2", "--baseline-lr", "0.06", "--seeds", "1",
        "--out", str(out),
    ]  # fmt: skip
    assert cli.main(words) == 0
    assert is_png(out / "budgets.png")
    table = (out / "budgets.md").read_text()
    assert table.index("| moco-v2 | no mixing, 1 epoch | 1 |") < table.index("mixmask, 2 epochs")
    rates = {
        path.parent.parent.name: json.loads(path.read_text())["lr"]
        for path in out.glob("*/seed-0/config.json")
    }
    assert rates == {
        f"moco-v2_{mix}_{epochs}-epochs": lr
        for mix, lr in (("none", 0.06), ("mixmask", 0.03))
        for epochs in (1, 2)
    }


def test_ablate_reports_a_failed_run_and_goes_on(
    two_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried: list[str] = []

    def train(run: StudyRun, *_: Any) -> None:
        tried.append(run.label)
        if run.config.grid_size == 4:
            run.error = "the loss became nan"
        else:
            run.rows = [{"epoch": 0, "knn": 0.1}, {"epoch": 1, "knn": 0.5, "linear": 0.5}]

    monkeypatch.setattr(StudyRun, "train", train)
    out = tmp_path / "study"
    capsys.readouterr()
    assert cli.main(study(two_classes, out, "--seeds", "1")) == 2
    captured = capsys.readouterr()
    assert len(tried) == 4
    assert "seed 0 … failed: the loss became nan" in captured.out
    assert captured.err.startswith("mixmask: 1 of 4 runs failed, grid-4_block_ratio-0.5_switch")
    assert "Failed: grid-4" in (out / "masks.md").read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--seeds", str(2**63)], "--seeds must be at most 10,000, got 9223372036854775808"),
        (["--grid-sizes", "2", "32"], "--grid-sizes must lie within 2 ... 16"),
        (["--grid-size", "32"], "--grid-size must be within 2 ... 16"),
        (["--ratio", "half"], "argument --ratio: invalid float value: 'half'"),
        (["--ratio", "0.2", "0.4", "0.6"], "--ratio takes one or two numbers, got 3"),
        (["--ratio", "1.5"], "ratio must lie strictly between 0 and 1"),
        (["--budgets", "4"], "--budgets belongs to --study budgets, got --study masks"),
        (["--study", "budgets"], "--grid-sizes belongs to --study masks, got --study budgets"),
        (["--methods", "moco-v2", "byol"], "--study masks takes one of --methods"),
        (["--methods", "byol"], "--queue-size is not supported by byol"),
        (["--data", "nowhere"], "--data must be a folder or one of"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_ablate_refuses_bad_options_before_it_writes(
    more: list[str],
    message: str,
    two_classes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "study"
    assert message in refused(study(two_classes, out, *more), capsys)
    assert not out.exists()


def test_ablate_needs_labels(
    two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    line = refused(study(two_classes / "train" / "cat", out), capsys)
    assert "has no labels on both splits" in line
    assert not out.exists()
