"""`compare`, `map` and `neighbours` as a user meets them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import TINY, is_png, refused

from mixmask import cli
from mixmask.checkpoints.load import load_backbone
from mixmask.data.sets import load_data
from mixmask.evaluation import extract_features, gallery
from mixmask.figures.features import figure_neighbours


@pytest.fixture(scope="module")
def runs(two_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train two seeds with MixMask and one without."""
    root = tmp_path_factory.mktemp("runs")
    made = {"a": ["--seed", "0"], "b": ["--seed", "1"], "none": ["--mix", "none", "--lr", "0.12"]}
    common = ["pretrain", "--data", str(two_classes), *TINY, "--epochs", "2"]
    common += ["--measure-every", "1"]
    for name, more in made.items():
        assert cli.main([*common, *more, "--out", str(root / name)]) == 0
    return {name: root / name for name in made}


def copy_of(run: Path, to: Path, **options: Any) -> Path:
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text()) | options
    (to / "config.json").write_text(json.dumps(config))
    return to


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
    assert "they differ in lr too (mixmask: 0.0009375; no mixing: 0.12)" in printed
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
    assert f"{tmp_path} is not a run (FileNotFoundError" in line
    line = refused(["compare", a, a / "last.pt", "--out", out], capsys)
    assert "the same seed, 0, so they are one run" in line
    images = {"train": 1, "test": 1, "classes": ["cat"], "sum": ""}
    other = copy_of(b, tmp_path / "other", data="cifar10", fingerprint=images)
    line = refused(["compare", a, other, b, "--out", out], capsys)
    where = json.loads((a / "config.json").read_text())["data"]
    assert f"do not compare: {a}, {b} used {where}; {other} used cifar10; name the" in line
    mark = json.loads((b / "config.json").read_text())["fingerprint"] | {"sum": "at another size"}
    relabelled = copy_of(b, tmp_path / "relabelled", fingerprint=mark | {"labels": "other"})
    line = refused(["compare", a, relabelled, "--out", out], capsys)
    assert f"do not compare: {a} used {where}; {relabelled} used other images of {where};" in line
    smaller = copy_of(b, tmp_path / "smaller", fingerprint=mark)
    assert cli.main(["compare", str(a), str(smaller), "--out", str(tmp_path / "y.png")]) == 0
    capsys.readouterr()
    odd = copy_of(b, tmp_path / "odd")
    (odd / "metrics.csv").write_text("epoch,knn\n1,nan\n")
    line = refused(["compare", a, odd, "--out", out], capsys)
    assert "odd/metrics.csv, line 2 must hold one finite number per column, got knn='nan'" in line
    assert not out.exists()
    nowhere = tmp_path / "no" / "x.png"
    assert "which is not a folder" in refused(["compare", a, b, "--out", nowhere], capsys)
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
    runs: dict[str, Path], two_classes: Path, tmp_path: Path, drawn: list[tuple[Any, ...]]
) -> None:
    out = tmp_path / "sheet.png"
    words = ["neighbours", str(runs["a"]), "--out", str(out), "--queries", "3", "--k", "4"]
    assert cli.main(words) == 0
    assert is_png(out)
    queries, neighbours, similarity, names = drawn[0]
    data = load_data(str(two_classes), 16)
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
    runs: dict[str, Path], two_classes: Path, tmp_path: Path, drawn: list[tuple[Any, ...]]
) -> None:
    flat = str(two_classes / "train" / "cat")
    words = ["neighbours", str(runs["a"]), "--data", flat, "--out", str(tmp_path / "x.png")]
    assert cli.main(words) == 0
    queries, neighbours, *_ = drawn[0]
    assert neighbours.shape[:2] == (8, 8)
    for query, row in zip(queries, neighbours, strict=True):
        assert not any(torch.equal(query, other) for other in row)


def test_map_of_unlabelled_images_is_drawn_without_classes(
    runs: dict[str, Path], two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, out = two_classes / "train" / "cat", tmp_path / "map.png"
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
