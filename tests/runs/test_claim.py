"""A run folder belongs to one process, which takes it back if its start fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixmask.runs import claim
from mixmask.runs.claim import claim_folder, new_folder

HOLD = """
import sys
from pathlib import Path
from mixmask.runs.claim import claim_folder
with claim_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `run` until it is killed."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_new_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        folder = new_folder(None, "photos-moco")
        folder.mkdir(parents=True)
        names.append(folder.as_posix())
    assert names == ["runs/photos-moco", "runs/photos-moco-2", "runs/photos-moco-3"]
    assert new_folder(Path("elsewhere"), "x") == Path("elsewhere")
    assert new_folder(folder, "x") == folder
    (folder / "config.json").touch()
    for taken in (folder, folder / "config.json"):
        with pytest.raises(ValueError, match="exists and is not empty; continue it with --resume"):
            new_folder(taken, "x")


def start(folder: Path, *names: str, error: type[BaseException] | None = None) -> None:
    """Write files into a run folder, and fail."""
    with claim_folder(folder):
        for name in names:
            (folder / name).touch()
        if error:
            raise error


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt, FileNotFoundError])
def test_a_folder_that_was_moved_is_told_and_hides_no_other_error(
    error: type[BaseException], tmp_path: Path
) -> None:
    told = "was moved or deleted during the run" if error is FileNotFoundError else "as it was"

    def move() -> None:
        with claim_folder(tmp_path / "run"):
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            raise error("as it was")

    with pytest.raises(error, match=told):
        move()


def test_a_rank_that_no_launcher_set_takes_its_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FloatingPointError):
        start(tmp_path / "run", "config.json", error=FloatingPointError)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_holds_is_refused_and_left(
    other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(claim, "_PATIENCE", 0)
    with pytest.raises(ValueError, match=r"another process is using .*run; wait until it finishes"):
        start(folder)
    assert folder.is_dir()
    monkeypatch.setattr(claim, "_PATIENCE", 60)
    other.kill()  # A process that dies holds nothing.
    start(folder, "config.json")


def test_a_folder_that_was_filled_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def fill(_: int) -> bool:  # The other process ends while this one waits.
        (folder / "last.pt").touch()
        return True

    monkeypatch.setattr(claim, "_lock", fill)
    with pytest.raises(ValueError, match=r"another process has used .*run; choose another"):
        start(folder)
    assert (folder / "last.pt").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BrokenPipeError])
@pytest.mark.parametrize("there", [True, False])
def test_a_start_that_fails_leaves_what_was_there(
    error: type[BaseException], there: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
        (folder / "mine.txt").touch()
    with pytest.raises(error):
        start(folder, error=error)
    assert folder.exists() == there
    with pytest.raises(error):
        start(folder, "config.json", "views.png", error=error)
    names = {"mine.txt"} if there else set()
    # What was interrupted can go on, and what lost its reader.
    goes_on = (KeyboardInterrupt, BrokenPipeError)
    names |= {"config.json", "views.png"} if error in goes_on else set()
    assert {path.name for path in folder.iterdir()} == names if names else not folder.exists()
