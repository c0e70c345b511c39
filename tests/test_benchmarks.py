"""The benchmark scripts run at tiny sizes and write whole records; no timing is judged."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SPREAD = ("min", "q1", "median", "q3", "max")


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def check_case(case: dict[str, Any], repeats: int) -> None:
    assert case["quantity"] in ("time", "peak memory")
    assert case["n"] == (repeats if case["quantity"] == "time" else 1)
    assert case["calls"] >= 1
    assert case["sizes"]
    for name in ("ours", "theirs", "ratio"):
        values = [case[name][key] for key in SPREAD]
        assert values == sorted(values)
        assert all(value > 0 and math.isfinite(value) for value in values)
    if case["bound"] is None:
        assert case["reached"] is None
    else:
        assert case["reached"] == (case["ratio"]["median"] <= case["bound"])


@pytest.mark.parametrize(
    ("script", "bounds"),
    [
        ("masks", [0.10, None, None, None, None]),
        ("mixing", [0.55, 0.55]),
        ("loss", [0.30, 1 / 6, 0.85, None]),
        ("step", [1.80, 1.10, 1.00, None]),
        ("knn", [0.5, 0.1, None, None]),
        ("wrapper", [1.05, None, 1.05, None, 1.05, None]),
        ("loader", [None, None]),
    ],
)
def test_script_writes_a_whole_record(
    script: str, bounds: list[float | None], tmp_path: Path
) -> None:
    out = tmp_path / "record.json"
    done = run(f"{script}.py", "--small", "--repeats", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["script"] == script
    assert record["small"] is True
    assert record["hardware"]["cpu"]
    assert record["hardware"]["gpu"] is None
    assert record["hardware"]["threads"] >= 1
    assert set(record["versions"]) == {"python", "torch", "mixmask"}
    assert record["commit"]
    assert record["date"]
    assert [case["bound"] for case in record["cases"]] == bounds
    for case in record["cases"]:
        check_case(case, repeats=2)
        assert case["name"] in done.stdout


def test_detection_writes_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    done = run("detection.py", "--small", "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["small"] is True
    assert record["commit"]
    assert record["recipe"]["epochs"] == record["n"] == 1
    assert record["sides"]["pretrained"]["pretraining"]["method"] == "moco-v2"
    for side in record["sides"].values():
        assert 0 <= side["ap"]["median"] <= side["ap50"]["median"] <= 1
        assert len(side["epochs"][0]) == 1


def test_peak_memory_counts_live_bytes_above_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common = importlib.import_module("common")
    kept = torch.zeros(10_000)

    def side() -> None:
        nonlocal kept
        first = torch.zeros(1000)
        del first
        kept = torch.zeros(10_000)  # The old one lives until the new one is there.
        torch.zeros(500)

    assert common.peak_bytes(side, "cpu") == 40_000


def test_page_shows_the_recorded_results() -> None:
    assert run("table.py", "--check").returncode == 0, "run python benchmarks/table.py"


def test_table_says_what_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = importlib.import_module("table")
    spread = dict.fromkeys(SPREAD, 2.0)
    case = {
        "name": "a", "against": "b", "quantity": "time", "unit": "s", "n": 3,
        "ours": spread, "theirs": spread, "ratio": spread, "bound": 1.0, "reached": False,
    }  # fmt: skip
    assert (
        table.row(case) == "| a | b | time | 2 s | 2 s | 2.000 (2.000 … 2.000) | 3 | 1 | **no** |"
    )
