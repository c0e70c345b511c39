"""Studies: their cells, what is run once, what is resumed, what fails, and their tables."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import assert_same, interrupt_at, tiny_images
from torch import Tensor

from mixmask.data.sets import ImageData, Split
from mixmask.runs.folder import read_config
from mixmask.trainers.loop import train_method
from mixmask.trainers.methods import build_method
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.studies import (
    BUDGET_METHODS,
    Cell,
    StudyRun,
    budget_cells,
    check_images,
    collect,
    mask_cells,
    plan_runs,
    table_csv,
    table_markdown,
)

TINY: dict[str, Any] = {
    "epochs": 2, "batch_size": 8, "queue_size": 16, "dim": 16, "image_size": 16, "grid_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(Split(tiny_images(16)), None, ())


def monitor(backbone: torch.nn.Module, thorough: bool) -> dict[str, float]:
    """Measure something that follows from the weights."""
    share = float(next(backbone.parameters()).detach().sigmoid().mean())
    return {"knn": share} | ({"linear": 1 - share} if thorough else {})


def tiny_cells(**options: Any) -> list[Cell]:
    return mask_cells(**(TINY | {"grid_sizes": [2, 4], "ratios": [0.5]} | options))


def test_masks_vary_one_factor_and_share_their_centre() -> None:
    cells = mask_cells(data="clothing64", grid_sizes=[2, 4, 8])
    assert [(cell.factor, cell.value) for cell in cells] == [
        ("grid size", "2"), ("grid size", "4"), ("grid size", "8"),
        ("pattern", "block"), ("pattern", "discrete"),
        ("ratio", "0.5"), ("ratio", "0.25–0.75"), ("ratio", "0–1"),
        ("switch", "on"), ("switch", "off"),
    ]  # fmt: skip
    centre = cells[0].config
    assert (centre.mix, centre.pattern, centre.ratio, centre.switch) == (
        "mixmask", "block", 0.5, True,
    )  # fmt: skip
    fields = {"grid size": "grid_size", "pattern": "pattern", "ratio": "ratio", "switch": "switch"}
    for cell in cells:
        changed = {
            field.name
            for field in dataclasses.fields(centre)
            if getattr(cell.config, field.name) != getattr(centre, field.name)
        }
        assert changed <= {fields[cell.factor]}
    assert len({cell.name for cell in cells}) == len({cell.config for cell in cells}) == 7


@pytest.mark.parametrize(
    "options, sizes",
    [
        ({"data": "cifar100"}, ["2", "4", "8"]),
        ({"data": "photographs", "recipe": "tiny-imagenet"}, ["2", "4", "8", "16"]),
        ({"data": "photographs"}, ["2", "4", "8", "16", "32", "48"]),
        ({"data": "photographs", "image_size": 8, "grid_size": 4}, ["2", "4"]),
    ],
)
def test_grids_are_the_papers_for_the_size_of_a_view(
    options: dict[str, Any], sizes: list[str]
) -> None:
    cells = mask_cells(**options)
    assert [cell.value for cell in cells if cell.factor == "grid size"] == sizes


def test_budgets_are_whole_runs_of_each_method_without_and_with_mixmask() -> None:
    cells = budget_cells(data="cifar100", baseline_lr=0.5)
    assert list(dict.fromkeys(cell.factor for cell in cells)) == list(BUDGET_METHODS)
    assert len(cells) == len({cell.name for cell in cells}) == 3 * 2 * 5
    for cell in cells:
        config = cell.config
        assert cell.factor == config.method
        assert config.epochs in (200, 400, 600, 800, 1000)
        assert (config.lr == 0.5) == (config.mix == "none")
    chosen = budget_cells(methods=["byol"], budgets=[4, 2, 4], epochs=100)
    assert [(cell.config.mix, cell.config.epochs) for cell in chosen] == [
        ("none", 2), ("none", 4), ("mixmask", 2), ("mixmask", 4),
    ]  # fmt: skip


def test_bad_options_of_a_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--grid-sizes must lie within 2 ... 16, .* got 64"):
        tiny_cells(grid_sizes=[2, 64])
    with pytest.raises(ValueError, match=r"--grid-sizes must lie within 2 ... 16, .* got 1"):
        tiny_cells(grid_sizes=[1])
    with pytest.raises(ValueError, match="ratio needs 0 <= low <= high <= 1"):
        tiny_cells(ratios=[(0.8, 0.2)])
    with pytest.raises(ValueError, match="--epochs must be at least 1, got 0"):
        budget_cells(budgets=[0])
    with pytest.raises(ValueError, match="--queue-size is not supported by simclr"):
        budget_cells(queue_size=16)
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        plan_runs(tiny_cells(), 0, tmp_path)


def test_plans_go_through_the_table_seed_by_seed_each_run_once(tmp_path: Path) -> None:
    runs = plan_runs(tiny_cells(), 2, tmp_path)
    assert len(runs) == len({run.folder for run in runs}) == 2 * 4
    assert [run.config.seed for run in runs] == [0] * 4 + [1] * 4
    assert runs[0].folder == tmp_path / "grid-2_block_ratio-0.5_switch" / "seed-0"


def test_a_study_goes_on_where_it_was_interrupted(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan_runs(tiny_cells(), 1, tmp_path)[1]
    with monkeypatch.context() as patch:
        interrupt_at(3, MoCo, patch)
        with pytest.raises(KeyboardInterrupt):
            run.train(data, monitor)
    resumed = plan_runs(tiny_cells(), 1, tmp_path)[1]
    assert not resumed.rows
    resumed.train(data, monitor)
    whole, rows = train_method(
        run.config, data.train.images, tmp_path / "whole", progress=False, monitor=monitor
    )
    assert resumed.last("knn") == pytest.approx(rows[-1]["knn"], abs=0)
    model = torch.load(run.folder / "last.pt", weights_only=True)["model"]
    twin = build_method(run.config)
    twin.load_state_dict(model)
    assert_same(twin, whole)

    finished = plan_runs(tiny_cells(), 1, tmp_path)[1]
    for measure in ("knn", "linear"):
        assert finished.last(measure) == pytest.approx(rows[-1][measure])


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    data: ImageData, tmp_path: Path
) -> None:
    run = plan_runs(tiny_cells(epochs=1), 1, tmp_path)[0]
    run.train(data, monitor)
    assert not run.error
    for file in ("last.pt", "metrics.csv"):
        (run.folder / file).unlink()
    again = plan_runs(tiny_cells(epochs=1), 1, tmp_path)[0]
    assert (again.folder, again.config, again.rows) == (run.folder, run.config, [])
    again.train(data, monitor)
    assert again.last("knn") is not None


def test_a_folder_of_another_run_is_refused(data: ImageData, tmp_path: Path) -> None:
    plan_runs(tiny_cells(epochs=1), 1, tmp_path)[0].train(data, monitor)
    with pytest.raises(ValueError, match=r"holds a run with lr 0.03, this study has lr 0.1;"):
        plan_runs(tiny_cells(epochs=1, lr=0.1), 1, tmp_path)
    (tmp_path / "grid-4_block_ratio-0.5_switch" / "seed-0").mkdir(parents=True)
    (tmp_path / "grid-4_block_ratio-0.5_switch" / "seed-0" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="seed-0 is not a run that can be resumed"):
        plan_runs(tiny_cells(epochs=1), 1, tmp_path)


def test_runs_that_saw_other_images_are_refused(data: ImageData, tmp_path: Path) -> None:
    runs = plan_runs(tiny_cells(epochs=1), 1, tmp_path)
    check_images(runs, data)  # None is there.
    runs[0].train(data, monitor)
    recorded = read_config(runs[0].folder)
    assert (recorded["stream"], recorded["fingerprint"]["train"]) == ("never", 16)
    check_images(runs, data)
    other = ImageData(Split(tiny_images(17)), None, ())
    with pytest.raises(
        ValueError, match=r"seed-0 was started on: 17 training images instead of 16"
    ):
        check_images(runs, other)


def test_a_study_of_greyscale_images_goes_on(data: ImageData, tmp_path: Path) -> None:
    assert isinstance(data.train.images, Tensor)
    grey = ImageData(Split(data.train.images[:, :1]), None, ())  # (N, 1, H, W)
    plan_runs(tiny_cells(epochs=1), 1, tmp_path)[0].train(grey, monitor)
    again = plan_runs(tiny_cells(epochs=1), 1, tmp_path)[0]
    assert again.last("knn") is not None
    assert read_config(again.folder)["channels"] == 1


def test_a_run_that_fails_says_why_and_is_no_number(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = tiny_cells(epochs=1)
    runs = plan_runs(cells, 1, tmp_path)
    encode = MoCo.encode

    def broken(self: MoCo, x: Tensor) -> Tensor:
        return encode(self, x) * (float("nan") if self.config.grid_size == 4 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(MoCo, "encode", broken)
        for run in runs:
            run.train(data, monitor)
    assert [bool(run.error) for run in runs] == [False, True, False, False]
    lines = collect(cells, runs)
    assert [len(line.accuracies["knn"]) for line in lines] == [1, 0, 1, 1, 1, 1, 1]
    text = table_markdown(lines, title="t", test_images=372)
    assert text.count("Failed: grid-4_block_ratio-0.5_switch, seed 0: the loss became nan") == 1
    again = plan_runs(cells, 1, tmp_path)
    assert [bool(run.rows) for run in again] == [True, False, True, True]  # To be tried again.
    again[1].train(data, monitor)
    assert not again[1].error


def test_tables_hold_mean_and_deviation_of_the_last_epoch(tmp_path: Path) -> None:
    cells = tiny_cells()
    rng = np.random.default_rng(0)
    runs: list[StudyRun] = []
    numbers: dict[str, list[tuple[float, float]]] = {}
    for run in plan_runs(cells, 3, tmp_path)[:-2]:  # The last two are not there yet.
        knn, linear = rng.random(2).tolist()
        run.rows = [{"epoch": 0, "knn": 0.9, "linear": 0.9}, {"knn": knn, "linear": linear}]
        runs.append(run)
        numbers.setdefault(run.folder.parent.name, []).append((knn, linear))
    lines = collect(cells, runs)
    read = list(csv.DictReader(io.StringIO(table_csv(lines))))
    text = table_markdown(lines, title="title", test_images=400).splitlines()
    assert len(read) == len(cells) == len(text) - 6
    assert text[0] == "title"
    for cell, row, shown in zip(cells, read, text[4:], strict=False):
        own = np.array(numbers[cell.name])
        mean, sd = own.mean(axis=0), own.std(axis=0, ddof=1)
        assert (row["factor"], row["value"], row["seeds"]) == (
            cell.factor, cell.value, str(len(own)),
        )  # fmt: skip
        for i, measure in enumerate(("knn", "linear")):
            assert float(row[f"{measure}_mean"]) == pytest.approx(mean[i])
            assert float(row[f"{measure}_sd"]) == pytest.approx(sd[i])
            assert f" {100 * mean[i]:.1f} ± {100 * sd[i]:.1f} |" in shown
    every = [knn for cell in cells for knn, _ in numbers[cell.name]]
    error = 100 * np.sqrt(np.mean(every) * (1 - np.mean(every)) / 400)
    assert f"standard error of a single accuracy is about {error:.1f} points" in text[-1]


def test_a_study_without_outcomes_has_a_table_too() -> None:
    lines = collect(tiny_cells(), [])
    assert "| grid size | 2 | 0 | – | – |" in table_markdown(lines, title="", test_images=10)
    assert [row["knn_mean"] for row in csv.DictReader(io.StringIO(table_csv(lines)))] == [""] * 7
