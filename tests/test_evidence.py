"""The runner of the evidence: plans, cells that are cut and go on, learning rates, the page."""

import argparse
import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_evidence import BENCHMARKS, BUDGETS, RATES, record_of, write_plan

from mixmask.trainers.methods import make_config


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evidence_cells")


def test_the_cpu_plan_has_valid_cells_that_parts_share(cells: Any) -> None:
    plan = cells.load_plan("cpu")
    parts = {part.name: {cell.name for cell in part.cells} for part in plan.parts}
    assert list(parts)[:3] == ["rates", "budgets", "views"]
    assert [len(parts[name]) for name in ("rates", "budgets", "views")] == [10, 30, 30]
    assert len(parts["budgets"] & parts["views"]) == 6
    assert len(parts["fair"] - parts["budgets"]) == 3  # lightly's; ours are there already.
    for name, cell in plan.cells.items():
        resolved = cell if cell.resolved else dataclasses.replace(cell, lr=0.03)
        config = make_config(**resolved.config_options())
        assert config.seed == cell.seed
        assert (config.mix != "none") == cell.mixes
        assert Path(name).name == name
        assert cell.estimate() > 0
        assert (cell.split == "validation") == (cell.name in parts["rates"] | parts["methods"]) or (
            cell.split == "test"
        )
    for cell in cells.load_plan("gpu").cells.values():
        resolved = cell if cell.resolved else dataclasses.replace(cell, lr=0.06)
        config = make_config(**resolved.config_options())
        assert (config.arch, config.precision) == ("resnet18", "bf16")
    with pytest.raises(ValueError, match="--part must be one of 1 \\(rates\\)"):
        plan.select("99")
    with pytest.raises(ValueError, match="nearest names: cifar100-32px"):
        plan.find("cifar100-32px-narrow_moco-v2")


def test_rates_are_chosen_by_side_when_all_are_known(cells: Any, tmp_path: Path) -> None:
    plan = cells.load_plan(str(write_plan(tmp_path / "p.json", RATES, BUDGETS)))
    rates = {(cell.mixes, cell.lr): cell for cell in plan.parts[0].cells}
    results = {}

    def learn(mixes: bool, lr: float, knn: float | None) -> None:
        cell = rates[mixes, lr]
        results[cell.name] = record_of(cells, cell, knn)

    learn(False, 0.01, 0.3)
    assert all(not cell.resolved for cell in cells.resolve(plan, results).parts[1].cells)
    assert [c.name for c in cells.next_cells(plan, results, [], [])] == [
        rates[True, 0.01].name, rates[True, 0.02].name, rates[False, 0.02].name,
    ]  # fmt: skip
    learn(False, 0.02, 0.2)
    learn(True, 0.01, None)  # It failed, and loses.
    found = cells.resolve(plan, results).parts[1].cells
    assert {cell.lr for cell in found if not cell.mixes} == {0.01}
    assert {cell.lr for cell in found if cell.mixes} == {"best"}
    learn(True, 0.02, 0.1)
    resolved = cells.resolve(plan, results)
    assert {cell.lr for cell in resolved.parts[1].cells if cell.mixes} == {0.02}
    # What was begun comes first, then what takes longest.
    first, second, *_ = cells.next_cells(resolved, results, [], ["another"])
    assert first.mixes
    assert first.epochs == 2
    begun = resolved.parts[1].cells[0].name
    assert next(cells.next_cells(resolved, results, [begun], [])).name == begun
    assert next(cells.next_cells(resolved, results, [], [first.name])).name == second.name


def test_results_of_other_options_or_an_older_recipe_count_as_missing(
    cells: Any, tmp_path: Path
) -> None:
    plan = cells.load_plan(str(write_plan(tmp_path / "p.json", RATES)))
    cell, *_ = plan.parts[0].cells
    record = record_of(cells, cell, 0.3)
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / f"{cell.name}.json"
    for changes, done in (
        ({}, True),
        ({"recipe_version": cells.RECIPE_VERSION - 1}, False),
        ({"cell": {**record["cell"], "options": {}}}, False),
    ):
        path.write_text(json.dumps(record | changes), encoding="utf-8")
        results = cells.read_results(tmp_path / "results")
        assert cells.is_done(cell, results) == done
        assert len(cells.missing(plan.parts[0], results)) == 4 - done


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", ["mixmask", "lightly"])
def test_a_cell_that_was_cut_ends_as_one_that_was_not(
    code: str, cells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = importlib.import_module("evidence")
    status = importlib.import_module("evidence_status")
    script = importlib.import_module("evidence_train")
    group = {**BUDGETS, "code": code, "epochs": [3], "seeds": [0], "lr": [0.02]}
    plan = cells.load_plan(str(write_plan(tmp_path / "p.json", group)))
    cell = next(cell for cell in plan.cells.values() if cell.mixes == (code == "mixmask"))
    trainer = evidence._TRAINERS[code]

    def carry_out(place: str) -> Any:
        folders = tmp_path / place / "state", tmp_path / place / "results"
        return script.run_cell(cell, trainer, None, *folders, "python")

    whole = carry_out("whole")
    measure = script.Watch.measure

    def cut(self: Any, *given: Any) -> Any:
        found = measure(self, *given)
        if self.epoch == 2:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patched:
        patched.setattr(script.Watch, "measure", cut)
        with pytest.raises(KeyboardInterrupt):
            carry_out("cut")
    state = tmp_path / "cut" / "state"
    assert status.epochs_behind(state, cell.name) == 1
    again = carry_out("cut")
    for key in ("curve", "final", "untrained", "images_seen", "passes"):
        assert again[key] == whole[key], key
    assert not list(state.glob(f"*/{cell.name}"))

    assert json.loads((tmp_path / "cut" / "results" / f"{cell.name}.json").read_text()) == again
    assert [point["epoch"] for point in again["curve"]] == [1, 2, 3]
    assert again["images_seen"] == 3 * 48
    # The clean pass, the mixed one, and the keys' forward pass.
    assert again["passes"] == pytest.approx(3 * 48 * (7 if code == "mixmask" else 4) / 3)
    error = (again["final"]["knn"] * (1 - again["final"]["knn"]) / again["test_images"]) ** 0.5
    assert again["final"]["knn_error"] == pytest.approx(error)
    assert ("lightly" in again["versions"]) == (code == "lightly")
    assert all(again[key] > 0 for key in ("seconds", "busy_seconds"))


@pytest.mark.filterwarnings("ignore")
def test_lightlys_moco_goes_the_same_way_as_ours(cells: Any, tmp_path: Path) -> None:
    script = importlib.import_module("evidence_train")
    lightly = importlib.import_module("evidence_lightly")
    group = {**BUDGETS, "epochs": [2], "seeds": [0], "lr": [0.02], "arms": ["none"]}
    (cell,) = cells.load_plan(str(write_plan(tmp_path / "p.json", group))).cells.values()
    splits = script.read_splits(cell, None)
    rows = script.train(cell, splits, tmp_path / "ours")
    theirs = lightly.train_lightly(cell, splits, tmp_path / "theirs")
    assert rows[0]["knn"] == theirs[0]["knn"]  # The same weights at the start.
    # The queues start with different directions, so losses agree but roughly.
    for ours, other in zip(rows[1:], theirs[1:], strict=True):
        assert other["loss"] == pytest.approx(ours["loss"], rel=0.1)


def test_a_run_that_collapses_is_a_result(cells: Any, tmp_path: Path) -> None:
    script = importlib.import_module("evidence_train")
    plan = cells.load_plan(str(write_plan(tmp_path / "p.json", RATES)))
    cell, *_ = plan.cells.values()

    def collapse(*given: Any) -> Any:
        assert given[0] is cell
        raise FloatingPointError("the run has collapsed: all is one; lower --lr")

    record = script.run_cell(cell, collapse, None, tmp_path / "s", tmp_path / "r", "python")
    assert record["failed"] == "the run has collapsed: all is one"
    assert record["final"] is None
    assert cells.is_done(cell, cells.read_results(tmp_path / "r"))


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "evidence.py"), *map(str, arguments)]


@pytest.mark.slow
def test_runner_finishes_what_it_can_and_names_what_crashes(tmp_path: Path) -> None:
    one = {**RATES, "lr": [0.01]}
    later = {"name": "later", "epochs": [1], "seeds": [0], "arms": ["none", "broken"]}
    broken = {"mix": "none", "grid_size": 1000}
    plan = write_plan(tmp_path / "p.json", one, later, broken=broken)
    given = ("--plan", plan, "--state", tmp_path / "s", "--results", tmp_path / "r")
    first = run(*given, "--minutes", 5)
    assert first.returncode == 0, first.stderr
    assert len(list((tmp_path / "r").glob("*.json"))) == 3
    assert first.stdout.count("CRASHED") == 1
    assert "--grid-size must be within" in first.stdout
    lines = {line.split()[0]: line.split()[1:4] for line in first.stdout.splitlines()[-8:]}
    assert lines["rates"] == ["2", "0", "0"]
    assert lines["later"] == ["1", "0", "1"]
    (path,) = (tmp_path / "s" / "crashes").glob("*.json")
    crash = json.loads(path.read_text(encoding="utf-8"))
    assert crash["times"] == 1
    path.write_text(json.dumps(crash | {"times": 2}), encoding="utf-8")
    last = run(*given, "--minutes", 5)  # Twice was enough.
    assert "CRASHED" not in last.stdout
    assert "crashed 2 times" in last.stdout


@pytest.mark.slow
def test_runner_can_be_paused_and_stopped_and_goes_on(
    cells: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = importlib.import_module("evidence")
    status = importlib.import_module("evidence_status")
    group = {**RATES, "lr": [0.01], "epochs": [100_000], "arms": ["none"]}
    path = write_plan(tmp_path / "p.json", group)
    plan, state = cells.load_plan(str(path)), tmp_path / "s"
    (name,) = plan.cells
    options = argparse.Namespace(state=state, results=tmp_path / "r", jobs=1, minutes=1)
    given = ("--plan", path, "--state", state, "--results", tmp_path / "r")
    runner = subprocess.Popen(command(*given), stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: status.epochs_behind(state, name) > 0)
        (job,) = psutil.Process(runner.pid).children()
        assert f"running: {name}, epoch " in status.status(plan, plan, options.results, state)
        evidence.set_pause(state, True)
        assert capsys.readouterr().out == "paused\n"
        wait_for(lambda: job.status() == psutil.STATUS_STOPPED)  # Once the job is scheduled.
        assert f"paused: {name}, epoch " in status.status(plan, plan, options.results, state)
        with pytest.raises(ValueError, match="another runner works in"):
            evidence.work_through(plan, plan, options)
        evidence.set_pause(state, False)
        assert capsys.readouterr().out == "resumed\n"
        wait_for(lambda: job.status() != psutil.STATUS_STOPPED)
        runner.send_signal(signal.SIGTERM)
        out, _ = runner.communicate(timeout=120)
    finally:
        runner.kill()
    assert runner.returncode == 0
    assert f" saved {name}" in out
    assert "No runner works." in out
    assert not job.is_running()
    before = status.epochs_behind(state, name)

    # Another window ends by itself, and loses nothing.
    assert f"saved {name}" in run(*given, "--minutes", 0.3).stdout
    assert status.epochs_behind(state, name) >= before


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
