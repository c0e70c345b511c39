"""Run folders: files that are whole at any moment, and the newest whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixmask import __version__
from mixmask.runs.folder import (
    FORMAT,
    atomic_write,
    check_files,
    has_checkpoint,
    load_checkpoint,
    new_folder,
    read_config,
    read_rows,
    save_checkpoint,
    write_config,
    write_json,
    write_rows,
    write_text,
)


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_that_could_not_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"λ": 1})
    old = path.read_text(encoding="utf-8")
    assert old == '{\n  "λ": 1\n}\n'
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == [
        ("x.json", old)
    ]


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(*paths) as (first, _):
        first.write_text("new")  # The other is not written.
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["old", "old"]
    with atomic_write(*paths) as temporary:
        for file in temporary:
            file.write_text("new")
        assert [path.read_text() for path in paths] == ["old", "old"]
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["new", "new"]


def test_rows_and_configuration_come_back(tmp_path: Path) -> None:
    rows = [{"epoch": 0.0, "knn": 0.5}, {"epoch": 1.0, "loss": 2.0}]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    write_config(tmp_path, {"ratio": (0.25, 0.75)})
    written = read_config(tmp_path)
    assert written == {"format": FORMAT, "version": __version__, "ratio": [0.25, 0.75]}


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    for step in range(3):
        save_checkpoint(tmp_path, {"step": step, "w": torch.full((2,), float(step))})
    file, content = load_checkpoint(tmp_path)
    assert (file.name, content["step"]) == ("last.pt", 2)
    file.unlink()
    file, content = load_checkpoint(tmp_path)
    assert (file.name, content["step"]) == ("previous.pt", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["previous.pt"]


def test_a_crash_while_saving_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    save_checkpoint(tmp_path, {"step": 2})
    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, {"step": 3})
    assert load_checkpoint(tmp_path)[1] == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize(
    "damage", [b"", b"nothing", b"PK\x03\x04cut"], ids=["empty", "text", "cut short"]
)
def test_a_damaged_checkpoint_is_named_in_a_warning(damage: bytes, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    save_checkpoint(tmp_path, {"step": 2})
    (tmp_path / "last.pt").write_bytes(damage)
    with pytest.warns(UserWarning, match=r"last\.pt is .*; looking for an older one"):
        assert load_checkpoint(tmp_path)[1] == {"step": 1}
    (tmp_path / "previous.pt").unlink()
    with (
        pytest.warns(UserWarning, match=r"last\.pt is"),
        pytest.raises(ValueError, match="holds no whole checkpoint; train it again"),
    ):
        load_checkpoint(tmp_path)


def test_a_folder_without_checkpoints_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run folder: it holds neither last\.pt nor prev"):
        load_checkpoint(tmp_path)


def test_files_that_cannot_be_written_are_refused_before(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.touch()
    check_files(there, tmp_path / "new.png")
    for path, message in (
        (tmp_path / "no" / "x.png", "no, which is no folder; make it first"),
        (tmp_path, "is a folder; name a file in it"),
    ):
        with pytest.raises(ValueError, match=message):
            check_files(there, path)
    with pytest.raises(ValueError, match=r"there\.png exists; name another --out, or overwrite it"):
        check_files(tmp_path / "new.png", there, force=False)


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
