"""The runner of the evidence: plans, cells that are cut and go on, learning rates, the page."""

import argparse
import dataclasses
import importlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mixmask.trainers.methods import make_config

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = {"batch_size": 16, "queue_size": 32, "image_size": 16}


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evidence_cells")


def write_plan(path: Path, *parts: dict[str, Any], **arms: Any) -> Path:
    """Write a plan on 48 photographs, each part of which is one group."""
    content = {
        "about": "Tiny.",
        "images": {"clothing64": 48},
        "settings": {"clothing64/moco-v2": TINY},
        "arms": {"none": {"mix": "none"}, "mixmask": {"mix": "mixmask"}, **arms},
        "parts": [
            {
                "name": group.pop("name"),
                "about": "Question.",
                "plots": group.pop("plots", []),
                "groups": [{"data": "clothing64", **group}],
            }
            for group in (dict(part) for part in parts)
        ],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


RATES = {
    "name": "rates", "split": "validation", "epochs": [1], "seeds": [0], "lr": [0.01, 0.02],
    "arms": ["none", "mixmask"], "plots": ["rates"],
}  # fmt: skip
BUDGETS = {
    "name": "budgets", "epochs": [1, 2], "seeds": [0, 1, 2], "arms": ["none", "mixmask"],
    "plots": ["budgets", "curves", "differences"],
}  # fmt: skip


def record_of(cells: Any, cell: Any, knn: float | None, passes: float = 4 / 3) -> dict[str, Any]:
    """Make up a result of a cell; None stands for a run that failed."""
    accuracies = {"knn": knn, "knn_error": 0.01, "linear": knn and knn + 0.1, "linear_error": 0.02}
    return {
        "name": cell.name,
        "recipe_version": cells.RECIPE_VERSION,
        "cell": dataclasses.asdict(cell),
        "hardware": {"cpu": "a processor"},
        "commit": "abc",
        "command": f"python benchmarks/evidence.py --cell {cell.name}",
        "untrained": {"knn": 0.05, "linear": 0.06},
        "curve": [{"epoch": epoch, "knn": knn} for epoch in range(1, cell.epochs + 1)],
        "final": None if knn is None else accuracies,
        "failed": None if knn is not None else "the run has collapsed",
        "passes_per_image": passes,
        "busy_seconds": 60.0,
    }


def test_the_cpu_plan_has_valid_cells_that_parts_share(cells: Any) -> None:
    plan = cells.load_plan("cpu")
    parts = {part.name: {cell.name for cell in part.cells} for part in plan.parts}
    assert list(parts)[:3] == ["rates", "budgets", "views"]
    assert [len(parts[name]) for name in ("rates", "budgets", "views")] == [8, 30, 30]
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
    with pytest.raises(ValueError, match="--part must be one of 1 \\(rates\\)"):
        plan.select("9")
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
    assert evidence.epochs_behind(state, cell.name) == 1
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
    group = {**RATES, "lr": [0.01], "epochs": [100_000], "arms": ["none"]}
    path = write_plan(tmp_path / "p.json", group)
    plan, state = cells.load_plan(str(path)), tmp_path / "s"
    (name,) = plan.cells
    options = argparse.Namespace(state=state, results=tmp_path / "r", jobs=1, minutes=1)
    given = ("--plan", path, "--state", state, "--results", tmp_path / "r")
    runner = subprocess.Popen(command(*given), stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: evidence.epochs_behind(state, name) > 0)
        (job,) = psutil.Process(runner.pid).children()
        assert f"running: {name}, epoch " in evidence.status(plan, plan, options)
        evidence.set_pause(state, True)
        assert capsys.readouterr().out == "paused\n"
        assert job.status() == psutil.STATUS_STOPPED
        assert f"paused: {name}, epoch " in evidence.status(plan, plan, options)
        with pytest.raises(ValueError, match="another runner works in"):
            evidence.work_through(plan, plan, options)
        evidence.set_pause(state, False)
        assert capsys.readouterr().out == "resumed\n"
        assert job.status() != psutil.STATUS_STOPPED
        runner.send_signal(signal.SIGTERM)
        out, _ = runner.communicate(timeout=120)
    finally:
        runner.kill()
    assert runner.returncode == 0
    assert f" saved {name}" in out
    assert "No runner works." in out
    assert not job.is_running()
    before = evidence.epochs_behind(state, name)

    # Another window ends by itself, and loses nothing.
    assert f"saved {name}" in run(*given, "--minutes", 0.3).stdout
    assert evidence.epochs_behind(state, name) >= before


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_page_has_means_differences_and_what_is_missing(
    cells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = importlib.import_module("evidence_page")
    path = write_plan(tmp_path / "p.json", RATES, BUDGETS)
    results = tmp_path / "results"
    results.mkdir()

    def keep(cell: Any, knn: float | None) -> None:
        # With one pass, 2 epochs of the baseline cost as much as 1 with mixed views.
        record = record_of(cells, cell, knn, 2.0 if cell.mixes else 1.0)
        (results / f"{cell.name}.json").write_text(json.dumps(record), encoding="utf-8")

    for cell in cells.load_plan(str(path)).parts[0].cells:
        keep(cell, 0.3 if cell.lr == 0.01 else 0.2)
    plan = cells.resolve(cells.load_plan(str(path)), cells.read_results(results))
    known: dict[tuple[str, int], list[float | None]] = {
        ("none", 1): [0.20, 0.21, 0.22], ("mixmask", 1): [0.21, 0.22, 0.26],
        ("none", 2): [0.30, 0.31, None],
    }  # fmt: skip
    for cell in plan.parts[1].cells:
        if (cell.arm, cell.epochs) in known:
            keep(cell, known[cell.arm, cell.epochs][cell.seed])
    words = ["evidence_page", "--plan", path, "--results", results, "--page", tmp_path / "E.md"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    (tmp_path / "E.md").write_text("# Mine\n\n", encoding="utf-8")
    page.main()
    text = (tmp_path / "E.md").read_text(encoding="utf-8")
    assert text.startswith("# Mine\n\n<!-- below")
    assert "| moco-v2, none | 30.0 / 40.0 | 20.0 / 30.0 |" in text
    # Differences 1, 1, 4: mean 2, standard error 1, and t = 4.303 with two degrees of freedom.
    row = "| mixmask, clothing64 | 1 | 0.01 | 3 | 23.0 ± 1.5 | +2.0 [-2.3, +6.3] |"
    assert row + " -9.0 [-9.0, -9.0] (2 seeds) |" in text
    two = "| none, clothing64 | 2 | 0.01 | **2 of 3**, fewer than 3 | 30.5 ± 0.5 (1 failed) |"
    assert two in text
    assert "| mixmask, clothing64 | 2 | 0.01 | **0 of 3**, fewer than 3 | missing |" in text
    assert "**3 of 12 runs are missing.**" in text
    for cell in plan.parts[1].cells[:2]:
        assert f"`python benchmarks/evidence.py --cell {cell.name}`" in text
    plots = {p.name for p in results.glob("*.png")}
    assert plots == {
        "rates-rates.png", "budgets-budgets.png", "budgets-curves.png", "budgets-differences.png",
    }  # fmt: skip
    for name in plots:
        assert f"(results/{name})" in text
        with Image.open(results / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10

    for changed, code in (("", 0), ("x", "E.md is not what its results say")):
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--check"])
        (tmp_path / "E.md").write_text(text + changed, encoding="utf-8")
        with pytest.raises(SystemExit) as ended:
            page.main()
        assert ended.value.code == code


def test_the_page_of_the_repository_shows_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    page = importlib.import_module("evidence_page")
    monkeypatch.setattr(sys, "argv", ["evidence_page", "--check"])
    with pytest.raises(SystemExit) as ended:
        page.main()
    assert ended.value.code == 0, "run python benchmarks/evidence_page.py"


def stacks(path: Path, images: Any, labels: Any) -> None:
    file = io.BytesIO()
    Image.fromarray(images.reshape(-1, images.shape[2], 3)).save(file, "webp", lossless=True)
    body = np.frombuffer(file.getvalue(), dtype=np.uint8)
    np.savez(path, webp=body, offsets=np.array([0, len(body)]), fine=labels)


def test_cifar_is_validated_on_images_behind_those_of_training(
    cells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module("evidence_train")
    cell = next(iter(cells.load_plan("cpu").cells.values()))
    cell = dataclasses.replace(cell, images=3)
    images = np.random.default_rng(0).integers(256, size=(15, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(15)
    for first, name in ((0, "train0"), (4, "train1"), (8, "train2"), (12, "test")):
        part = slice(first, min(first + 4, 15))
        stacks(tmp_path / f"cifar100_{name}.npz", images[part], labels[part])
    splits = script.read_splits(cell, tmp_path)
    assert (splits.labels.tolist(), splits.test_labels.tolist()) == ([0, 1, 2], [3, 4, 5])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(splits.test, pixels[3:6])
    splits = script.read_splits(dataclasses.replace(cell, split="test"), tmp_path)
    assert (splits.labels.tolist(), splits.test_labels.tolist()) == ([0, 1, 2], [12, 13, 14])

    # The same from torchvision's folder, without a download.
    def official(root: Path, *, train: bool, download: bool) -> Any:
        assert (root, download) == (tmp_path, False)
        part = slice(0, 12) if train else slice(12, 15)
        return type("Data", (), {"data": images[part], "targets": labels[part].tolist()})

    (tmp_path / "cifar-100-python").mkdir()
    monkeypatch.setattr("torchvision.datasets.CIFAR100", official)
    splits = script.read_splits(cell, tmp_path)
    assert torch.equal(splits.images, pixels[:3])
    assert splits.test_labels.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="imagenette must lie in --data-root"):
        script.read_splits(dataclasses.replace(cell, data="imagenette"), tmp_path)


def test_jpegs_that_share_a_header_are_read_and_resized(cells: Any, tmp_path: Path) -> None:
    script = importlib.import_module("evidence_train")
    cell = next(c for c in cells.load_plan("cpu").cells.values() if c.data == "imagenette")
    rng = np.random.default_rng(0)
    whole = []
    for colour in rng.integers(256, size=(3, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(np.tile(colour, (80, 80, 1))).save(file, "jpeg", quality=95)
        whole.append(file.getvalue())
    shared = 300  # Bytes of tables, which are the same at one quality.
    assert len({content[:shared] for content in whole}) == 1
    bodies = [content[shared:] for content in whole]
    arrays: dict[str, Any] = {
        "body": np.frombuffer(b"".join(bodies), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, bodies)]),
        "header": np.frombuffer(whole[0][:shared], dtype=np.uint8),
        "header_offsets": np.array([0, shared]),
        "header_id": np.zeros(3, dtype=np.uint16),
        "label": np.array([2, 0, 1], dtype=np.uint8),
    }
    for name in ("train", "val"):
        np.savez(tmp_path / f"imagenette112_{name}.npz", **arrays)
    splits = script.read_splits(cell, tmp_path)
    assert splits.images.shape == (3, 3, 73, 73)  # 8/7 of the views' size.
    assert splits.labels.tolist() == splits.test_labels.tolist() == [2, 0, 1]
    with Image.open(io.BytesIO(whole[1])) as image:
        middle = torch.from_numpy(np.asarray(image)[40, 40].astype(np.float32))
    assert torch.allclose(splits.images[1, :, 36, 36].float(), middle, atol=1)
