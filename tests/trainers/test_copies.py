"""Runs that go on elsewhere, and run folders that come from elsewhere."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, refused, write_photographs

from mixmask import cli
from mixmask.trainers import run as run_module


class KilledError(BaseException):
    """Ends a command where SIGKILL would."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data, out = write_photographs(tmp_path / "data"), tmp_path / "run"
    words = ["pretrain", "--data", str(data), *TINY, "--grid-size", "2", "--epochs", "1"]
    assert cli.main([*words, "--measure-every", "0", "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)
    return out


def kill(*_: Any, **__: Any) -> None:
    raise KilledError


def weights(folder: Path) -> Any:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


@pytest.mark.parametrize("place", ["folder.seal", "folder.write_config", "folder.adopt", "beside"])
def test_a_copy_that_was_killed_is_repeated_or_goes_on(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    words = ["pretrain", "--resume", str(run), "--epochs", "2", "--out"]
    assert cli.main([*words, str(whole)]) == 0
    with monkeypatch.context() as patch:
        if place == "folder.adopt":  # Between the configuration and the rename.
            patch.setattr(Path, "replace", _kill_for("last.pt", Path.replace))
        elif place == "beside":
            patch.setattr(run_module, "write_rows", kill)
        else:
            patch.setattr(f"mixmask.runs.{place}", kill)
        # What follows a kill tidies nothing up.
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KilledError):
            cli.main([*words, str(copy)])
    begun = (copy / "config.json").exists()
    assert begun == (place in ("folder.adopt", "beside"))
    again = ["pretrain", "--resume", str(copy)] if begun else [*words, str(copy)]
    assert cli.main(again) == 0
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(copy)[name], tensor, rtol=0, atol=0)


def test_an_interrupted_copy_says_how_to_repeat_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "--resume", str(run), "--out", str(tmp_path / "a copy"), "--epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("mixmask.runs.folder.seal", interrupt)
        assert cli.main(words) == 130
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line == f"mixmask: interrupted; continue with mixmask {shlex.join(words)}"
    assert cli.main(words) == 0


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def _kill_for(name: str, replace: Callable[..., Path]) -> Callable[..., Path]:
    def killing(path: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise KilledError
        return replace(path, target)

    return killing


def test_a_copy_inside_of_the_data_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "data" / "train" / "cat" / "copy"
    line = refused(["pretrain", "--resume", run, "--out", inside, "--epochs", "2"], capsys)
    assert "lies inside of the data" in line
    assert not inside.exists()


def test_all_processes_have_read_a_checkpoint_before_it_is_renamed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = (run / "last.pt").rename(run / "last.pt.tmp")
    seen: list[tuple[dict[str, Any], bool]] = []
    monkeypatch.setattr(
        run_module, "agree", lambda facts: seen.append((facts, unfinished.exists()))
    )
    assert cli.main(["pretrain", "--resume", str(run)]) == 0
    assert seen == [({"checkpoint": "last.pt.tmp", "step of the checkpoint": 2}, True)]
    assert not unfinished.exists()


@pytest.mark.parametrize(
    "words",
    [["evaluate", "knn"], ["pretrain", "--resume"], ["pretrain", "--config"], ["map"]],
)
def test_code_that_a_run_folder_names_is_not_run(
    words: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of somebody else's may hold a module beside its weights."""
    foreign = tmp_path / f"foreign_{words[-1].strip('-')}"  # A module is imported once.
    code = f"{foreign.name}.evil:load"
    shutil.copytree(run, foreign)
    (foreign / "evil.py").write_text("open('ran', 'w').close()\ndef load(): return []\n")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"data": code}))
    content = torch.load(foreign / "last.pt", weights_only=True)
    content["options"]["data"] = code
    torch.save(content, foreign / "last.pt")
    given = foreign / "config.json" if "--config" in words else foreign
    line = refused([*words, given], capsys)
    assert f"{code}, which is not run because a file names it" in line
    assert f"--data {code}" in line
    assert not (tmp_path / "ran").exists()
    # Whoever names it means it.
    cli.main([*words, str(given), "--data", code])
    assert (tmp_path / "ran").exists()
