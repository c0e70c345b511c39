"""Run folders: files that are whole at any moment, and the newest whole checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmask import __version__
from mixmask.runs.files import atomic_write, check_files, write_json, write_text
from mixmask.runs.folder import (
    FORMAT,
    copy_checkpoint,
    has_checkpoint,
    is_unstarted,
    load_checkpoint,
    read_config,
    read_rows,
    save_checkpoint,
    write_config,
    write_rows,
)
from mixmask.runs.reading import is_sealed


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


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_what_lies_under_a_temporary_name_is_not_written_through(
    link: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("precious")
    link(tmp_path / "last.pt.tmp", target)
    save_checkpoint(tmp_path, {"step": 1})
    assert target.read_text() == "precious"
    assert not (tmp_path / "last.pt").is_symlink()
    assert load_checkpoint(tmp_path)[1] == {"step": 1}


def test_a_check_makes_no_file_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "x.png.tmp").symlink_to(tmp_path / "elsewhere")
    check_files(tmp_path / "x.png", force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_under_a_temporary_name_is_not_waited_for(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom mixmask.runs.files import *\n"
        "path = Path(sys.argv[1]) / 'x'\n"
        "for call in (lambda: check_files(path, force=True), lambda: write_text(path, 'new')):\n"
        "    os.mkfifo(path.with_name('x.tmp'))\n    call()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "new")]


def test_rows_and_configuration_come_back(tmp_path: Path) -> None:
    rows = [{"epoch": 0.0, "knn": 0.5}, {"epoch": 1.0, "loss": 2.0}]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    write_config(tmp_path, {"ratio": (0.25, 0.75)})
    written = read_config(tmp_path)
    assert written == {"format": FORMAT, "version": __version__, "ratio": [0.25, 0.75]}


@pytest.mark.parametrize(
    "line, message",
    [
        ("1,nan", "line 3 must hold one finite number per column, got knn='nan'"),
        ("1,inf", "line 3 must hold one finite number per column, got knn='inf'"),
        ("1,high", "line 3 must hold one finite number per column, got knn='high'"),
        ("1,0.5,0.5", r"line 3 must hold one finite number per column, got =\['0.5'\]"),
        (",0.5", "line 3 must hold the number of an epoch, got None"),
        ("1.5,0.5", "line 3 must hold the number of an epoch, got 1.5"),
        ("1" * 200_000, r"is damaged \(field larger than"),
        ("\udcff", r"is damaged \('utf-8' codec can't decode"),
    ],
)
def test_metrics_that_are_no_numbers_are_told(line: str, message: str, tmp_path: Path) -> None:
    content = f"epoch,knn\n0,0.25\n{line}\n"
    (tmp_path / "metrics.csv").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"metrics.csv,? {message}"):
        read_rows(tmp_path)


def test_a_run_with_results_does_not_start_again(tmp_path: Path) -> None:
    assert not is_unstarted(tmp_path)
    write_config(tmp_path, {})
    assert is_unstarted(tmp_path)
    write_rows(tmp_path, [{"epoch": 0, "knn": 0.5}])
    assert is_unstarted(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    assert not is_unstarted(tmp_path)
    (tmp_path / "results.json").unlink()
    write_rows(tmp_path, [{"epoch": 0, "knn": 0.5}, {"epoch": 1, "loss": 2.0}])
    assert not is_unstarted(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    save_checkpoint(tmp_path, {"step": 1})
    assert not is_unstarted(tmp_path)


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


def test_what_a_process_wrote_is_not_read_again_unless_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def noting(path: Path) -> bool:
        if path.exists():
            read.append(path.name)
        return is_sealed(path)

    monkeypatch.setattr("mixmask.runs.folder.is_sealed", noting)
    for step in range(3):
        save_checkpoint(tmp_path, {"step": step})
        copy_checkpoint(tmp_path, "best.pt")  # A link, or a copy.
    assert not read
    last = tmp_path / "last.pt"
    damaged = bytearray(last.read_bytes())
    damaged[99] ^= 1
    last.write_bytes(damaged)  # As long as before.
    save_checkpoint(tmp_path, {"step": 3})
    assert read == ["last.pt"]
    assert torch.load(tmp_path / "previous.pt", weights_only=True) == {"step": 1}
    last.unlink()
    save_checkpoint(tmp_path, {"step": 4})
    assert torch.load(last, weights_only=True) == {"step": 4}


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
    with pytest.warns(UserWarning, match=r"last\.pt is .*previous\.pt is used instead"):
        assert load_checkpoint(tmp_path)[1] == {"step": 1}
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint .*last\.pt is .*; train it again"):
        load_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_in_a_run_are_not_waited_for(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    save_checkpoint(tmp_path, {"step": 2})
    (tmp_path / "last.pt").unlink()
    os.mkfifo(tmp_path / "last.pt")
    with pytest.warns(UserWarning, match=r"last\.pt is a pipe or a device.*previous\.pt is used"):
        assert load_checkpoint(tmp_path)[1] == {"step": 1}
    (tmp_path / "previous.pt").unlink()
    for name in ("previous.pt", "config.json", "metrics.csv"):
        (tmp_path / name).symlink_to("/dev/zero")
    for read, name in (
        (load_checkpoint, "previous.pt"), (read_config, "config.json"), (read_rows, "metrics.csv"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} is a pipe or a device"):
            read(tmp_path)


def test_a_folder_without_checkpoints_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: it holds neither last\.pt"):
        load_checkpoint(tmp_path)


def test_files_that_cannot_be_written_are_refused_before(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.touch()
    check_files(there, tmp_path / "new.png", force=True)
    for path, message in (
        (tmp_path / "no" / "x.png", "no, which is not a folder; make it first"),
        (tmp_path, "is a folder; name a file in it"),
        (Path("/dev/null"), "is a device or a pipe; name a file"),
    ):
        with pytest.raises(ValueError, match=message):
            check_files(there, path, force=True)
    with pytest.raises(ValueError, match=r"there\.png exists; name another --out, or overwrite it"):
        check_files(tmp_path / "new.png", there, force=False)


# Every kind of writer, where files may have 20,000 bytes: `path` is to hold more.
WRITERS = {
    "text": "files.write_text(path, 'x' * 100_000)",
    "rows": "folder.write_rows(path.parent, [{'epoch': i, 'loss': 0.1} for i in range(9999)])",
    "checkpoint": "folder.save_checkpoint(path.parent, {'w': torch.zeros(50_000)})",
    "safetensors": "write_safetensors(path)",
    "figure": "save_figure(Figure(figsize=(99, 99)), path.with_suffix('.png'))",
}
STARVED = """
import resource, signal, sys
from pathlib import Path
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from mixmask.figures.style import save_figure
from mixmask.runs import files, folder

def write_safetensors(path):
    with files.atomic_write(path) as (temporary,):
        save_file({"w": torch.zeros(50_000)}, temporary)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for name, code in WRITERS.items():
    path = Path(sys.argv[1]) / f"{name}.out"
    try:
        exec(code)
    except files.NoRoomError as error:
        print(f"{name}: {error}")
"""


def test_every_writer_says_in_one_line_that_there_is_no_room(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    script = f"WRITERS = {WRITERS!r}\n{STARVED}"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(WRITERS), done.stdout
    for name, line in zip(WRITERS, lines, strict=True):
        again = "resume" if name in ("checkpoint", "rows") else "try again"
        assert ": No space left for " in line
        assert (
            f"MB are free (a quota or a limit on the size of files counts too); {tmp_path}" in line
        )
        assert line.endswith("last.pt is kept: free some space, then " + again)
    assert "it takes 0.2 MB, " in lines[2]
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(tmp_path)[1] == {"step": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "Expecting property name"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"lr": NaN}', "it holds NaN, which is not a JSON number"),
        ('{"arch": []}', r"'arch' must be of type str, got \[\]"),
        ('{"image_size": -1}', r"'image_size' must be within 1 \.\.\. 2147483647, got -1"),
        ('{"seed": true}', "'seed' must be of type int, got True"),
        ('{"data": ""}', "'data' must say which images are meant, got ''"),
        ('{"fingerprint": {}}', "'fingerprint' must say which images are meant, got {}"),
        ('{"epochs": "9"}', "'epochs' must be of type int, got '9'"),
        ('{"small_stem": 1}', "'small_stem' must be of type bool, got 1"),
        ('{"format": 99, "version": "9.0"}', r"in format 99, but .* wrote it, 9\.0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_told(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
