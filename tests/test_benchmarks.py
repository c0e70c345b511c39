"""The benchmark scripts run at tiny sizes and write whole records; no timing is judged."""

import importlib
import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SPREAD = ("min", "q1", "median", "q3", "max")


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def call(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    """Run a script inside of this process, which has imported what takes most of its time."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    importlib.import_module(script).main()


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
        ("masks", [0.10, 0.10, None, None, 0.10, 1.0]),
        ("mixing", [0.55, 0.55, *[None] * 6]),
        ("loss", [0.30, 1 / 6, 0.85, *[None] * 15, 0.7, None, None, None, 0.7, None, None, None]),
        ("knn", [0.5, 0.1, None, None]),
        ("wrapper", [1.05, None, 1.05, None, 1.05, None]),
        ("loader", [None, None]),
        ("start", []),
        ("settings", [None]),
    ],
)
def test_script_writes_a_whole_record(
    script: str, bounds: list[float | None], tmp_path: Path
) -> None:
    out = tmp_path / "record.json"
    done = run(f"{script}.py", "--small", "--repeats", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    check_record(script, json.loads(out.read_text(encoding="utf-8")), bounds, done.stdout)


def test_scaling_is_measured_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    out = tmp_path / "record.json"
    done = run("scaling.py", "--small", "--repeats", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    check_circumstances("scaling", record)
    assert importlib.import_module("scaling").tables(record["scaling"]) in done.stdout
    for row in record["scaling"]["measured"]:
        assert len(row["sizes"]) == len(row["seconds"]) >= 2
        assert all(one["median"] > 0 for one in row["seconds"])
        assert math.isfinite(row.get("power", 0))
    rows = {(row["method"], row["gpus"]): row for row in record["scaling"]["counted"]}
    # Eight images of 32 px and keys of 128 numbers are exchanged, the keys of all are enqueued.
    images, keys = 8 * 3 * 32 * 32 * 4, 8 * 128 * 4
    for world in (8, 64, 512):
        share = (world - 1) / world
        expected = share * (images + keys + world * keys)
        assert rows["moco-v2", world]["method_bytes"] == pytest.approx(expected)
        assert rows["moco-v2", world]["mixed_bytes"] == 0
        assert rows["byol", world]["method_bytes"] == 0
        assert rows["simclr", world]["mixed_bytes"] > 0


def check_record(
    script: str, record: dict[str, Any], bounds: list[float | None], printed: str
) -> None:
    check_circumstances(script, record)
    assert [case["bound"] for case in record["cases"]] == bounds
    for case in record["cases"]:
        check_case(case, repeats=2)
        assert case["name"] in printed
    for figure in record["figures"]:
        assert math.isfinite(figure["value"])
        assert figure["name"] in printed


def check_circumstances(script: str, record: dict[str, Any]) -> None:
    assert record["script"] == script
    assert record["small"] is True
    assert record["hardware"]["cpu"]
    assert record["hardware"]["gpu"] is None
    assert record["hardware"]["threads"] >= 1
    assert set(record["versions"]) == {"python", "torch", "mixmask"}
    assert record["commit"]
    assert record["date"]


# Trainers, with the bounds of their figures and how many numbers stand by themselves. Where
# solo-learn can be imported, its step is one figure more.
STEP = [1.80, 1.10, 1.00, None, 1.80, 1.00, None, None]
STEP += [None] * (importlib.util.find_spec("solo") is not None)
VIEWS = [1.0, 1.0, *[None] * 5, 1.0, 1.0, *[None] * 6]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("script", "bounds", "figures"),
    [
        ("step", STEP, 11),
        ("views", VIEWS, 2),
        ("memory", [1.10, 1.10, 1.10], 0),
        ("epoch", [1 / 1.5, None], 2),
    ],
)
def test_script_of_the_trainers_writes_a_whole_record(
    script: str,
    bounds: list[float | None],
    figures: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "record.json"
    call(monkeypatch, script, "--small", "--repeats", "2", "--out", str(out))
    record = json.loads(out.read_text(encoding="utf-8"))
    check_record(script, record, bounds, capsys.readouterr().out)
    assert len(record["figures"]) == figures
    for case in record["cases"]:
        timed = case["quantity"] == "time"
        assert (case["images"] is not None) == (timed and script != "memory")


def test_time_to_accuracy_goes_on_and_says_what_it_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.json"
    arguments = ("--small", "--run", str(tmp_path / "run"), "--out", str(out))
    with monkeypatch.context() as patched:
        call(patched, "time_to_accuracy", *arguments)
    first = json.loads(out.read_text(encoding="utf-8"))
    check_circumstances("time_to_accuracy", first)
    plain, curve = first["plain"], first["curve"]
    assert [point["epoch"] for point in plain] == [0, 1, 2]
    assert first["target"] == plain[-1]["knn"]
    seconds = [point["seconds"] for point in curve]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert all(0 <= point["knn"] <= 1 for point in curve)
    over = [point for point in curve[1:] if point["knn"] >= first["target"]]
    if over:  # It stops there.
        assert first["reached"] == {"mix": "mixmask", **over[0]}
        assert curve[-1] == over[0]
    else:
        assert first["reached"] is None
        assert curve[-1]["epoch"] == 2
    capsys.readouterr()

    # A second start finds both runs finished, and a higher target goes on with the schedule.
    call(monkeypatch, "time_to_accuracy", *arguments)
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["curve"] == curve
    assert len(capsys.readouterr().out.splitlines()) == 1
    call(monkeypatch, "time_to_accuracy", *arguments, "--target", "1.0")
    further = json.loads(out.read_text(encoding="utf-8"))
    assert further["reached"] is None
    assert [point["epoch"] for point in further["curve"]] == [0, 1, 2]
    assert further["curve"][: len(curve)] == curve
    assert further["curve"][-1]["seconds"] >= seconds[-1]


def test_arrays_and_stacks_of_images_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("time_to_accuracy")
    images = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(6) % 2
    np.savez(tmp_path / "some_test.npz", images=images, labels=labels)
    bodies = []
    for part in (images[:2], images[2:]):
        file = io.BytesIO()
        Image.fromarray(part.reshape(-1, 8, 3)).save(file, "webp", lossless=True)
        bodies.append(file.getvalue())
    webp = np.frombuffer(b"".join(bodies), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, bodies)])
    np.savez(tmp_path / "some_train0.npz", webp=webp, offsets=offsets, fine=labels)
    data = script.read_data(str(tmp_path), None)
    assert torch.equal(data.train.images, data.test.images)
    assert torch.equal(data.train.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.equal(data.train.labels, data.test.labels)
    assert len(script.read_data(str(tmp_path), 3).train.images) == 3


@pytest.mark.slow
def test_methods_keep_earlier_runs_and_where_each_was_made(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = "--images", "64", "--epochs", "1", "--seeds", "1", "--out", str(out)
    first = run("methods.py", "--methods", "simsiam", "--mixes", "none", *options)
    assert first.returncode == 0, first.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    record["runs"][0]["cpu"] = "another processor"
    out.write_text(json.dumps(record), encoding="utf-8")
    second = run("methods.py", "--methods", "simsiam", "--mixes", "none", "erase", *options)
    assert second.returncode == 0, second.stderr
    later = json.loads(out.read_text(encoding="utf-8"))
    assert later["runs"][0] == record["runs"][0]
    assert [made["mix"] for made in later["runs"]] == ["none", "erase"]
    cpus = ["another processor", later["runs"][1]["cpu"]]
    assert later["hardware"]["cpu"] == " and ".join(cpus)
    assert "| simsiam | 1 | 1 |" in second.stdout


def test_cheaper_views_get_equal_compute_and_runs_are_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = "cheaper.py", "--small", "--repeats", "2", "--seeds", "1", "--out", str(out)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    check_record("cheaper", record | {"figures": []}, [None] * 4, done.stdout)
    epochs = {trial["arm"]: trial["epochs"] for trial in record["trials"]}
    # Four passes of the encoder without mixed views, seven with them.
    assert epochs["MixMask"] == 1
    assert epochs["without mixed views"] == round(7 / 4)
    assert len(record["figures"]) == 2 * len(epochs) == 10
    assert run(*command).returncode == 0
    assert json.loads(out.read_text(encoding="utf-8"))["trials"] == record["trials"]


def test_work_of_a_step_is_what_its_operations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    roofline = importlib.import_module("roofline")
    a, b = torch.rand(4, 5), torch.rand(5, 6)
    # Two operations a multiply-add; a view moves nothing, the product 20 + 30 + 24 numbers.
    assert roofline.work(lambda: torch.mm(a.view(4, 5), b)) == (2 * 4 * 5 * 6, 4 * 74)
    assert roofline.covered([(0, 4), (2, 5), (7, 8)]) == 6


def test_plot_draws_each_record_and_all_that_have_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, "plot", "--out", str(tmp_path))
    records = {path.stem for path in (BENCHMARKS / "results").glob("*.json")}
    drawn = {path.stem for path in tmp_path.iterdir()}
    assert {"ratios", "step-cpu", "views-cpu"} <= drawn <= records | {"ratios"}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    plot = importlib.import_module("plot")
    with pytest.raises(ValueError, match="no ratio"):
        plot.draw([], tmp_path / "none.png")


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
    short = table.summary([{"hardware": {"gpu": None}, "cases": [case]}])
    assert short.endswith("| a, time | b | CPU | 2.00 | 1.00 | **no** |")
    rated = table.row({**case, "images": 8})
    assert "| 2 s (4 images/s) | 2 s (4 images/s) |" in rated
    assert (
        table.row(case) == "| a | b | time | 2 s | 2 s | 2.000 (2.000 … 2.000) | 3 | 1 | **no** |"
    )
