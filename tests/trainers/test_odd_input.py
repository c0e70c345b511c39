"""What a run is given that cannot be used: one line says what, before anything changes."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from started import TINY, start

from mixmask.checkpoints import load_backbone
from mixmask.trainers.processes import start_processes
from mixmask.trainers.run import Run

SHORT = TINY | {"epochs": 1}


@pytest.fixture(scope="module")
def finished(two_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("runs") / "run", data=two_classes, **SHORT).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, which a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text, message",
    [
        ("out: runs/a", "'out' is not part of a configuration; .* pass --out to the command"),
        ("threads: 2", "'threads' is not part of a configuration; .*pass --threads"),
        ("resume: a", "'resume' is not part of a configuration"),
        ("lr: {start: 1}", "'lr' must have one value, got {'start': 1}; write all options side"),
        ("data: {train: a}", "'data' must have one value, got {'train': 'a'}"),
        ("btach-size: 3", "'btach-size' is not an option; did you mean 'batch_size'"),
        ("colour: red", "'colour' is not an option; leave it out"),
        ("data: [a, b]", "--data must be the name of a data set, a path or .*, got list"),
        ("method: [byol]", r"--method must be one of .*, got \['byol'\]"),
        ("{method: dino, format: 4}", "--method must be one of .*, got 'dino'"),
        ("ratio: [a, b]", "ratio must be a number or a range"),
        ("lr:", "--lr must be a number, got None"),
        ("arch: ''", "--arch must not be empty; leave it out for 'resnet50'"),
    ],
)
def test_options_of_a_file_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="accelerate brings it")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises((ValueError, TypeError), match=message):
        start(tmp_path / "run", config=file)
    assert not (tmp_path / "run").exists()


def test_paths_are_taken_from_python(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["data"].endswith("photographs")  # Given as a path.


class Pictures:
    """A data set of one's own, which no command could name."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 20, 20), index, dtype=torch.uint8), index % 2


@pytest.mark.parametrize(
    "data",
    [Pictures(), (Pictures(),) * 2, {"train": Pictures()}, [Pictures()[i] for i in range(16)]],
    ids=["data set", "splits", "mapping", "list"],
)  # fmt: skip
def test_a_data_set_itself_is_trained_on_and_given_again(data: Any, tmp_path: Path) -> None:
    run = start(tmp_path / "run", data=data, **SHORT).folder
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == f"<{type(data).__name__}>"
    with pytest.raises(ValueError, match="was given from Python; give it again as data=, or pass"):
        start(None, resume=run)
    with pytest.raises(ValueError, match="the data set does not hold the images that"):
        start(None, resume=run, data=[torch.zeros(3, 20, 20)] * 24)
    again = start(None, resume=run, data=data)
    assert [row["epoch"] for row in again.rows] == [1]


@pytest.mark.parametrize("epochs, shown", [("3", "'3'"), (3.0, "3.0"), (True, "True")])
def test_epochs_of_another_type_are_refused_when_a_run_goes_on(
    epochs: Any, shown: str, run: Path
) -> None:
    before = state(run)
    with pytest.raises(TypeError, match=f"--epochs must be a whole number, got {shown}"):
        start(None, resume=run, epochs=epochs)
    assert state(run) == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"processes": 0}, r"'processes' must be within 1 \.\.\. 2147483647, got 0"),
        ({"data": ""}, "'data' must say which images are meant, got ''"),
        ({"arch": ""}, "--arch must not be empty"),
        ({"queue_size": 12}, r"trained with other options than .*\(queue_size was 16, is 12\)"),
        ({"arch": "medium"}, r"\(arch was 'narrow', is 'medium'\)"),
        ({"lr": 0.5}, r"\(lr was [0-9.]+, is 0.5\)"),
        ({"batch_size": 4}, r"\(images per step were 8, are 4\)"),
        ({"processes": 2}, r"\(images per step were 8, are 16\)"),
    ],
)
def test_a_configuration_that_does_not_fit_its_run_is_refused(
    changes: dict[str, Any], message: str, run: Path
) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))
    before = state(run)
    with pytest.raises(ValueError, match=message) as error:
        start(None, resume=run)
    assert "\n" not in str(error.value)
    assert state(run) == before


@pytest.mark.parametrize("options", [True, False])
def test_a_checkpoint_of_another_run_is_passed_over(
    options: bool, run: Path, two_classes: Path, tmp_path: Path
) -> None:
    shutil.copy(run / "last.pt", run / "previous.pt")
    other = start(tmp_path / "other", data=two_classes, **{**SHORT, "queue_size": 12}).folder
    content = torch.load(other / "last.pt", weights_only=True)
    if not options:  # As older versions wrote it.
        del content["options"]
    torch.save(content, run / "last.pt")
    told = "queue_size was 12, is 16" if options else r"queue.keys must be of shape \(16, 8\), got"
    with warnings.catch_warnings(record=True) as caught:  # Another one tells of the epochs.
        warnings.simplefilter("always")
        result = start(None, resume=run, epochs=2)
    texts = "\n".join(str(warning.message) for warning in caught)
    assert re.search(rf"last\.pt.*{told}.*previous\.pt is used instead", texts)
    assert [row["epoch"] for row in result.rows] == [1, 2]


def test_a_configuration_without_an_option_is_told(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    del config["epochs"]
    (run / "config.json").write_text(json.dumps(config))
    for path in (run, run / "last.pt"):
        with pytest.raises(ValueError, match=r"than its config.json says \(epochs is mis"):
            load_backbone(path)


@pytest.mark.parametrize("name", ["last.pt", "previous.pt", "curves.png", "metrics.csv"])
def test_a_folder_in_the_place_of_a_file_is_refused(name: str, run: Path) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    before = state(run)
    with pytest.raises(ValueError, match=f"{name} must be a file, got a folder; move it out of"):
        start(None, resume=run, epochs=2)
    assert state(run) == before


def test_accuracies_that_are_no_numbers_are_left_out_with_a_warning(
    two_classes: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"monitor returned .*nan.*; knn is left out"):
        result = start(
            tmp_path / "run",
            data=two_classes,
            monitor=lambda *_: lambda *_: {"knn": float("nan"), "mine": 1},
            **SHORT,
        )
    assert [row["mine"] for row in result.rows] == [1.0, 1.0]
    assert not any("knn" in row for row in result.rows)


@pytest.mark.parametrize("name", ["loss", "epoch", "spread"])
def test_a_monitor_does_not_replace_what_the_run_measures(
    name: str, two_classes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"monitor must not return {name}, which the run"):
        start(
            tmp_path / "run", data=two_classes, monitor=lambda *_: lambda *_: {name: 1.0}, **SHORT
        )


def test_a_class_in_place_of_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be a data set with __len__"):
        start(tmp_path / "run", data=Pictures, **SHORT)


def test_a_copy_that_was_interrupted_does_not_start_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    copy = tmp_path / "copy"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(copy, resume=run)
    assert not (copy / "config.json").exists()


def test_a_checkpoint_beside_the_configuration_of_another_library_is_read(
    run: Path, tmp_path: Path
) -> None:
    shutil.copy(run / "last.pt", tmp_path / "backbone.pt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    assert load_backbone(tmp_path / "backbone.pt").arch == "narrow"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_of_options_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=r"--config .* cannot be used \(it is not a file\)"):
            start(tmp_path / "run", config=file)


@pytest.mark.parametrize("text", ["inf", "nan", "-1", "0", "1e300", "soon"])
def test_a_timeout_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MIXMASK_TIMEOUT", text)
    message = rf"MIXMASK_TIMEOUT must be a number of seconds .*, got '{text}'; leave it out for"
    with pytest.raises(ValueError, match=message):
        start_processes("cpu")
