"""The page of the evidence, and the data that its cells read."""

import argparse
import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evidence import BENCHMARKS, BUDGETS, RATES, record_of, write_plan


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evidence_cells")


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
    (tmp_path / "E.md").write_text(
        "# Mine\n\n<!-- plan p: written by evidence_page.py -->old<!-- end of p -->\nBelow.",
        encoding="utf-8",
    )
    page.main()
    text = (tmp_path / "E.md").read_text(encoding="utf-8")
    assert text.startswith("# Mine\n\n<!-- plan p: ")
    assert text.endswith("\n<!-- end of p -->\n\nBelow.\n")
    assert "old" not in text
    assert "| moco-v2, none | 30.0 / 40.0 | 20.0 / 30.0 |" in text
    # Differences 1, 1, 4: mean 2, standard error 1, and t = 4.303 with two degrees of freedom.
    row = "| mixmask, clothing64 | 1 | 0.01 | 3 | 23.0 ± 1.5 | +2.0 [-2.3, +6.3] |"
    assert row + " -9.0 [-9.0, -9.0] (2 seeds) |" in text
    two = "| none, clothing64 | 2 | 0.01 | **2 of 3**, fewer than 3 | 30.5 ± 0.5 (1 failed) |"
    assert two in text
    assert "| mixmask, clothing64 | 2 | 0.01 | **0 of 3**, fewer than 3 | missing |" in text
    assert "**Missing: 3 of 12 runs.**" in text
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


def test_a_baseline_that_is_planned_is_missing_and_a_part_without_own_results_is_not_drawn(
    cells: Any, tmp_path: Path
) -> None:
    page = importlib.import_module("evidence_page")
    budgets = BUDGETS | {"lr": [0.01]}
    again = budgets | {"name": "again", "epochs": [1, 2, 3], "plots": ["differences"]}
    plan = cells.load_plan(str(write_plan(tmp_path / "p.json", budgets, again)))
    results = {
        cell.name: record_of(cells, cell, 0.3, 2.0 if cell.mixes else 1.0)
        for cell in plan.parts[0].cells
        if cell.epochs == 1
    }
    options = argparse.Namespace(results=tmp_path, page=tmp_path / "E.md")
    assert {path.name for path in page.draw(plan, results, tmp_path)} == {
        "budgets-budgets.png", "budgets-curves.png", "budgets-differences.png",
    }  # fmt: skip
    text = page.page(plan, results, options)
    row = "| mixmask, clothing64 | 1 | 0.01 | 3 | 30.0 ± 0.0 | +0.0 [+0.0, +0.0] | {} |"
    assert row.format("missing") in text
    # Nobody has planned 2 epochs without mixing here.
    short = cells.load_plan(str(write_plan(tmp_path / "s.json", budgets | {"epochs": [1]})))
    assert row.format("–") in page.page(short, results, options)


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


def test_a_baseline_differs_in_mixing_alone(cells: Any, tmp_path: Path) -> None:
    stats = importlib.import_module("evidence_stats")
    one = {"epochs": [1], "seeds": [0], "lr": [0.01]}
    path = write_plan(
        tmp_path / "p.json",
        {"name": "all", "arms": ["none", "mixmask"], **one},
        {"name": "warm", "arms": ["none warm", "mixmask warm"], **one},
        {"name": "few", "images": 32, "arms": ["none few", "mask"], **one},
        **{
            "none warm": {"mix": "none", "temperature": 0.3}, "none few": {"mix": "none"},
            "mixmask warm": {"mix": "mixmask", "temperature": 0.3, "grid_size": 4},
            "mask": {"mix": "mixmask", "per_sample": True},
        },
    )  # fmt: skip
    plan = cells.load_plan(str(path))
    results = {name: record_of(cells, cell, 0.2) for name, cell in plan.cells.items()}
    known = stats.baselines(plan, results)
    found = {
        row.cell.arm: other.cell.arm
        for part in plan.parts
        for row in stats.rows_of(part, results)
        if (other := stats.at_equal_epochs(row, known))
    }
    assert found == {"mixmask": "none", "mixmask warm": "none warm", "mask": "none few"}
