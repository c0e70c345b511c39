"""Runs read back: groups of seeds, their names, their means."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmask.runs.folder import FORMAT
from mixmask.runs.records import (
    Record,
    common_options,
    group_seeds,
    mean_sd,
    percent,
    read_record,
    unlabelled_differences,
)

CONFIG: dict[str, Any] = {
    "format": FORMAT, "method": "moco-v2", "mix": "mixmask", "data": "clothing64", "lr": 0.03,
    "ratio": 0.5, "switch": True, "seed": 0,
}  # fmt: skip


def record(name: str, rows: list[dict[str, float]] | None = None, **options: Any) -> Record:
    return Record(Path(name), CONFIG | options, rows or [])


def test_runs_that_differ_in_the_seed_alone_are_one_group_ordered_by_seed() -> None:
    runs = [record("a", seed=2), record("b", mix="none"), record("c"), record("d", seed=1)]
    mixmask, none = group_seeds(runs)
    assert [r.folder.name for r in mixmask.records] == ["c", "d", "a"]
    assert [r.folder.name for r in none.records] == ["b"]
    assert (mixmask.label, none.label) == ("mixmask", "no mixing")
    assert common_options([mixmask, none])["method"] == "moco-v2"


def test_labels_name_what_tells_groups_apart_and_the_rest_is_a_note() -> None:
    groups = group_seeds([record("a", mix="none", lr=0.06), record("b", temperature=0.2)])
    assert [group.label for group in groups] == ["no mixing", "mixmask"]
    assert unlabelled_differences(groups) == {"lr": [0.06, 0.03], "temperature": [None, 0.2]}
    groups = group_seeds(
        [record("a"), record("b", ratio=[0.25, 0.75]), record("c", switch=False)],
    )
    assert [group.label for group in groups] == [
        "ratio 0.5, switch", "ratio 0.25–0.75, switch", "ratio 0.5, no switch",
    ]  # fmt: skip
    assert unlabelled_differences(groups) == {}
    # How a run was made tells nothing, so it cannot stand for what does.
    groups = group_seeds([record("a", workers=2), record("b", workers=4, lr=0.06)])
    assert [group.label for group in groups] == ["lr 0.03", "lr 0.06"]
    (alone,) = group_seeds([record("a"), record("b", seed=1)])
    assert alone.label == "moco-v2, mixmask"


def test_options_of_one_version_alone_leave_the_folder_to_tell() -> None:
    groups = group_seeds([record("old"), record("new", roll=False)])
    assert [group.label for group in groups] == ["moco-v2, mixmask (old)", "moco-v2, mixmask (new)"]


def test_one_run_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a and b have the same options and the same seed, 0"):
        group_seeds([record("a"), record("b")])


def test_points_are_the_epochs_that_all_seeds_have_measured() -> None:
    rows = [
        [{"epoch": 0.0, "knn": 0.1, "linear": 0.2}, {"epoch": 1.0}, {"epoch": 2.0, "knn": 0.3}],
        [
            {"epoch": 0.0, "knn": 0.2, "linear": 0.4},
            {"epoch": 1.0, "knn": 0.9},
            {"epoch": 2.0, "knn": 0.5},
            {"epoch": 3.0, "knn": 0.6, "linear": 0.7},
        ],
    ]
    (group,) = group_seeds([record(str(i), rows[i], seed=i) for i in range(2)])
    assert group.points("knn") == {0: [0.1, 0.2], 2: [0.3, 0.5]}
    assert group.last("knn") == (2, [0.3, 0.5])
    assert group.last("linear") is None  # Before training is not at its end.
    assert group.last("loss") is None


def test_mean_and_deviation_equal_numpys() -> None:
    values = np.random.default_rng(0).random(7).tolist()
    assert mean_sd(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert percent(values) == f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"


def write_run(folder: Path, config: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "loss", "knn"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_a_run_is_read_from_its_folder_or_a_checkpoint_in_it(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", json.dumps(CONFIG), [{"epoch": 0, "knn": 0.5}, {"epoch": 1, "loss": 2}]
    )
    (folder / "last.pt").touch()
    read = read_record(folder)
    assert read.rows == [{"epoch": 0.0, "knn": 0.5}, {"epoch": 1.0, "loss": 2.0}]
    assert read == read_record(folder / "last.pt")


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", "is not a run .JSONDecodeError"),
        ("[]", "is not a run .ValueError: expected a JSON object, got list"),
        ('{"lr": 1}', "is not a run .ValueError: config.json names no 'format'"),
        (json.dumps({"format": FORMAT}), "is not a run .KeyError: 'method'"),
        (json.dumps(CONFIG), "has no epoch yet"),
    ],
)
def test_what_is_no_run_is_refused(config: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_record(write_run(tmp_path / "run", config, []))


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run .FileNotFoundError.*pass a folder that"):
        read_record(tmp_path)
