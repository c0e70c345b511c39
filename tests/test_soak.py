"""The short form of the soak: damage on purpose, by the commands that a user gives."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Two processes of which one dies are in tests/trainers/test_ranks.py.
SHORT = {"kills": 4, "flips": 6, "torn": 4, "disk": 2, "commands": 40, "configurations": 20}


@pytest.mark.slow
def test_damage_of_each_kind_is_survived(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    parts = [word for name in SHORT for word in ("--part", name)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "soak.py"), "--small", "--out", str(out), *parts],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))["soak"]
    assert list(record) == list(SHORT)
    for name, count in SHORT.items():
        (run,) = record[name].values()
        assert sum(run["kinds"].values()) == count + (name == "kills"), name
        assert run["failures"] == []
    assert len(record["flips"]["0"]["kinds"]) == 3


def test_failures_are_counted_and_end_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    soak = importlib.import_module("soak")

    def part(part: soak.Part, count: int) -> None:  # type: ignore[name-defined]
        for trial in range(count):
            part.count(trial != 1, f"trial {trial}", "even" if trial % 2 == 0 else "odd")

    out = tmp_path / "soak.json"
    monkeypatch.setattr(soak, "PARTS", {"torn": part})
    monkeypatch.setattr(soak, "import_everything", lambda: None)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # Set by the script: put back after.
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for seed in ("0", "5"):
        words = ["--part", "torn", "--count", "3", "--seed", seed, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["soak.py", *words])
        with pytest.raises(SystemExit, match="True"):
            soak.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [run["failures"] for run in record["soak"]["torn"].values()] == [["trial 1"]] * 2
    table = importlib.import_module("table")
    assert set(table.PARTS) == set(soak._COUNTS)
    text = table.section(record)
    assert "| `torn`: `last.pt` cut" in text
    assert "| 6 | 4 even; 2 odd | 2 |" in text


def test_same_weights_are_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    trials = importlib.import_module("soak_trials")
    one = {"model": {"w": torch.zeros(2)}, "step": 3}
    assert trials.same(one, {"model": {"w": torch.zeros(2)}, "step": 3})
    other = torch.tensor([0.0, 1e-45])
    assert not trials.same(one, {"model": {"w": other}, "step": 3})
    assert not trials.same(one, {"model": {}, "step": 3})
    assert not trials.Ended(2, "Traceback (most recent call last)", 1.0).clean
    part = trials.Part("x", random.Random(0), Path())
    part.count(True, "fine")
    assert (part.trials, part.failures) == (1, [])
