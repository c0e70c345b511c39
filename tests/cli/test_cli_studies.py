"""`compare`, `map`, `neighbours` and `ablate` as a user meets them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import cli
from mixmask.checkpoints.load import load_backbone
from mixmask.data.sets import load_data
from mixmask.evaluation import extract_features, gallery
from mixmask.figures.features import figure_neighbours
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.studies import StudyRun

TINY = ["--arch", "narrow", "--batch-size", "8", "--image-size", "16", "--queue-size", "16"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of two classes, whose noise has a mean of its own."""
    root, rng = tmp_path_factory.mktemp("data") / "photographs", np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(100 * label, 100 * label + 150, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def runs(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train two seeds with MixMask and one without."""
    root = tmp_path_factory.mktemp("runs")
    made = {"a": ["--seed", "0"], "b": ["--seed", "1"], "none": ["--mix", "none", "--lr", "0.06"]}
    common = ["pretrain", "--data", str(photographs), *TINY, "--epochs", "2"]
    common += ["--measure-every", "1"]
    for name, more in made.items():
        assert cli.main([*common, *more, "--out", str(root / name)]) == 0
    return {name: root / name for name in made}


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def copy_of(run: Path, to: Path, **options: Any) -> Path:
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text()) | options
    (to / "config.json").write_text(json.dumps(config))
    return to


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and image.width > 300


def test_compare_draws_and_prints_means_over_seeds(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.png"
    capsys.readouterr()
    named = [str(runs["a"]), str(runs["none"] / "last.pt"), str(runs["b"])]
    assert cli.main(["compare", *named, "--out", str(out), "--band", "range"]) == 0
    assert is_png(out)
    printed = capsys.readouterr().out
    last = {name: (run / "metrics.csv").read_text().splitlines() for name, run in runs.items()}
    columns = last["a"][0].split(",")
    knn = {
        name: 100 * float(text[-1].split(",")[columns.index("knn")]) for name, text in last.items()
    }
    both = np.array([knn["a"], knn["b"]])
    (line,) = (text for text in printed.splitlines() if text.startswith("mixmask "))
    assert line.split()[1:3] == ["2", "2"]
    assert f" {both.mean():.1f} ± {both.std(ddof=1):.1f} " in line
    (line,) = (text for text in printed.splitlines() if text.startswith("no mixing "))
    assert line.split()[2:5] == ["1", "2", f"{knn['none']:.1f}"]
    assert "they differ in lr too (mixmask: 0.03; no mixing: 0.06)" in printed
    assert "bands in the figure: smallest to largest seed" in printed


def test_compare_names_a_switch_that_is_on(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_of(runs["none"], tmp_path / "other", switch=False)
    capsys.readouterr()
    out = ["--out", str(tmp_path / "x.png")]
    assert cli.main(["compare", str(runs["a"]), str(other), *out]) == 0
    assert "they differ in switch too (mixmask: on; no mixing: off)" in capsys.readouterr().out


def test_compare_of_runs_without_accuracies_draws_their_losses(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for grid in (2, 4):  # As if without labels.
        copy = copy_of(runs["a"], tmp_path / str(grid), grid_size=grid)
        with (copy / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))[1:]
        with (copy / "metrics.csv").open("w") as file:
            writer = csv.DictWriter(file, [n for n in rows[0] if n not in ("knn", "linear")])
            writer.writeheader()
            writer.writerows([{n: row[n] for n in writer.fieldnames} for row in rows])
    out = tmp_path / "compare.png"
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "2"), str(tmp_path / "4"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.startswith("grid size ")]
    assert [line[3:] for line in lines] == [["1", "–", "–", "–"]] * 2
    assert "–: not measured" in printed
    assert is_png(out)


def test_compare_says_that_a_run_is_too_early_for_a_linear_probe(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = copy_of(runs["b"], tmp_path / "early")
    lines = (early / "metrics.csv").read_text().splitlines()
    (early / "metrics.csv").write_text("\n".join(lines[:-1]) + "\n")  # Without the last epoch.
    capsys.readouterr()
    out = ["--out", str(tmp_path / "x.png")]
    assert cli.main(["compare", str(runs["a"]), str(early), *out]) == 0
    printed = capsys.readouterr().out
    (line,) = (text for text in printed.splitlines() if text.startswith("moco-v2, mixmask  "))
    assert line.split()[-1] == "–"
    assert "–: not measured" in printed


def test_compare_refuses_what_is_no_comparison(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    a, b = runs["a"], runs["b"]
    assert "compare needs two runs or more" in refused(["compare", a, "--out", out], capsys)
    line = refused(["compare", a, tmp_path, "--out", out], capsys)
    assert f"{tmp_path} is no run (FileNotFoundError" in line
    line = refused(["compare", a, a / "last.pt", "--out", out], capsys)
    assert "the same seed, 0, so they are one run" in line
    images = {"train": 1, "test": 1, "classes": ["cat"], "sum": ""}
    other = copy_of(b, tmp_path / "other", data="cifar10", fingerprint=images)
    assert "do not compare" in refused(["compare", a, other, "--out", out], capsys)
    assert not out.exists()
    nowhere = tmp_path / "no" / "x.png"
    assert "which is no folder" in refused(["compare", a, b, "--out", nowhere], capsys)
    out.write_text("mine")
    line = refused(["compare", a, b, "--out", out], capsys)
    assert line == f"mixmask: {out} exists; name another --out, or overwrite it with --force"
    assert out.read_text() == "mine"
    assert cli.main(["compare", str(a), str(b), "--out", str(out), "--force"]) == 0
    assert is_png(out)
    assert "--out" in refused(["compare", a, b, "--out", tmp_path], capsys)


@pytest.mark.parametrize("more", [[], ["--projection", "tsne"], ["--classes", "dog"]])
def test_map_draws_a_panel_a_run(
    more: list[str], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "map.png"
    capsys.readouterr()
    named = [str(runs["a"]), str(runs["none"] / "last.pt")]
    assert cli.main(["map", *named, "--out", str(out), *more]) == 0
    assert is_png(out)
    shown = 4 if "--classes" in more else 8
    assert f"{shown} of 8 test images" in capsys.readouterr().out


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return what figures of neighbours are given: arguments, and names."""
    noted: list[tuple[Any, ...]] = []

    def noting(*given: Any, **named: Any) -> Any:
        noted.append((*given, named["names"]))
        return figure_neighbours(*given, **named)

    monkeypatch.setattr(gallery, "figure_neighbours", noting)
    return noted


def test_neighbours_are_the_nearest_by_brute_force(
    runs: dict[str, Path], photographs: Path, tmp_path: Path, drawn: list[tuple[Any, ...]]
) -> None:
    out = tmp_path / "sheet.png"
    words = ["neighbours", str(runs["a"]), "--out", str(out), "--queries", "3", "--k", "4"]
    assert cli.main(words) == 0
    assert is_png(out)
    queries, neighbours, similarity, names = drawn[0]
    data = load_data(str(photographs), 16)
    assert data.test is not None
    assert data.train.labels is not None
    assert data.test.labels is not None
    backbone = load_backbone(runs["a"]).backbone
    bank = extract_features(backbone, data.train.images, size=16).double().numpy()
    shown = data.test.images[:]
    for i in range(3):
        (place,) = (j for j, image in enumerate(shown) if torch.equal(image, queries[i]))
        x = extract_features(backbone, queries[i][None], size=16)[0].double().numpy()
        cosines = bank @ x / np.linalg.norm(bank, axis=1) / np.linalg.norm(x)
        best = np.argsort(-cosines)[:4]
        assert torch.equal(neighbours[i], data.train.images[torch.from_numpy(best)])
        np.testing.assert_allclose(similarity[i].numpy(), cosines[best], atol=1e-5)
        assert names[i] == (
            data.classes[int(data.test.labels[place])],
            [data.classes[int(data.train.labels[j])] for j in best],
        )
    assert {name for name, _ in names} == {"cat", "dog"}  # One of each before a second.


def test_unlabelled_images_have_neighbours_too_but_not_themselves(
    runs: dict[str, Path], photographs: Path, tmp_path: Path, drawn: list[tuple[Any, ...]]
) -> None:
    flat = str(photographs / "train" / "cat")
    words = ["neighbours", str(runs["a"]), "--data", flat, "--out", str(tmp_path / "x.png")]
    assert cli.main(words) == 0
    queries, neighbours, *_ = drawn[0]
    assert neighbours.shape[:2] == (8, 8)
    for query, row in zip(queries, neighbours, strict=True):
        assert not any(torch.equal(query, other) for other in row)


def test_map_of_unlabelled_images_is_drawn_without_classes(
    runs: dict[str, Path], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, out = photographs / "train" / "cat", tmp_path / "map.png"
    words = ["map", str(runs["a"]), "--data", str(flat), "--out", str(out)]
    assert cli.main(words) == 0
    assert is_png(out)
    assert "--classes needs labels" in refused([*words, "--force", "--classes", "cat"], capsys)


def test_features_that_cannot_be_drawn_are_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, out = runs["a"], ["--out", tmp_path / "x.png"]
    line = refused(["neighbours", a, *out, "--queries", "9"], capsys)
    assert "--queries must be within 1 ... 8" in line
    line = refused(["neighbours", a, *out, "--k", "21"], capsys)
    assert "--k must be within 1 ... 20" in line
    line = refused(["map", a, *out, "--classes", "cow"], capsys)
    assert "--classes must be among cat, dog; got cow" in line
    other = copy_of(runs["b"], tmp_path / "other", data="clothing64")
    line = refused(["map", a, other, *out], capsys)
    assert "name the data to look at with --data" in line
    assert str(tmp_path) in refused(["map", tmp_path / "nothing", *out], capsys)
    assert not (tmp_path / "x.png").exists()


def test_a_map_of_many_images_draws_some(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gallery, "_MOST_POINTS", 5)
    capsys.readouterr()
    assert cli.main(["map", str(runs["a"]), "--out", str(tmp_path / "map.png")]) == 0
    assert "5 of 8 test images" in capsys.readouterr().out


def study(photographs: Path, out: Path, *more: str) -> list[str]:
    return [
        "ablate", "--data", str(photographs), *TINY, "--grid-size", "2", "--grid-sizes", "2", "4",
        "--ratio", "0.5", "--epochs", "1", "--out", str(out), *more,
    ]  # fmt: skip


def test_ablate_is_interrupted_with_130_goes_on_and_adds_seeds(
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "study"
    words = study(photographs, out, "--epochs", "2", "--measure-every", "0")
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
    photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    words = [
        "ablate", "--study", "budgets", "--data", str(photographs), *TINY, "--grid-size", "2",
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
    photographs: Path,
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
    assert cli.main(study(photographs, out, "--seeds", "1")) == 2
    captured = capsys.readouterr()
    assert len(tried) == 4
    assert "seed 0 … failed: the loss became nan" in captured.out
    assert captured.err.startswith("mixmask: 1 of 4 runs failed, grid-4_block_ratio-0.5_switch")
    assert "Failed: grid-4" in (out / "masks.md").read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
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
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "study"
    assert message in refused(study(photographs, out, *more), capsys)
    assert not out.exists()


def test_ablate_needs_labels_and_one_process(
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "study"
    line = refused(study(photographs / "train" / "cat", out), capsys)
    assert "has no labels on both splits" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "ablate trains in one process" in refused(study(photographs, out), capsys)
    assert not out.exists()
