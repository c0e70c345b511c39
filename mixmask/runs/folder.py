"""The run folder: configuration, metrics and checkpoints, each whole whenever somebody reads it."""

from __future__ import annotations

import csv
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mixmask.runs.options import Options
from mixmask.runs.reading import is_sealed, read_checkpoint, seal

# The columns of `metrics.csv` that an epoch has measured.
Row = dict[str, float]

# The newest checkpoint, and the one before in case the newest is damaged.
LAST, PREVIOUS = "last.pt", "previous.pt"
_UNFINISHED = f"{LAST}.tmp"  # As `atomic_write` names it.
CONFIG = "config.json"
METRICS = "metrics.csv"


@contextmanager
def atomic_write(*paths: Path) -> Iterator[list[Path]]:
    """Replace files by what is written under temporary names, once all of them are on disk.

    A crash or an error leaves the old files. A reader never sees half a file.

    Args:
        *paths: The files to replace; their folders must exist.

    Yields:
        One temporary path per file, in the same order; each must be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with atomic_write(path) as (temporary,):
        ...     _ = temporary.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    temporary = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        yield temporary
        for written in temporary:
            _sync(written)
        for written, path in zip(temporary, paths, strict=True):
            written.replace(path)
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content is on disk: a rename may reach it before the content does."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file atomically, for people to read too."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_files(*paths: Path, force: bool = True) -> None:
    """Check that files can be written, before any work is done for them.

    Args:
        *paths: The files of `--out`.
        force: Whether files that are there already may be overwritten.

    Raises:
        ValueError: If a file's folder is missing, or a folder or a file is in its place.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"--out lies in {path.parent}, which is no folder; make it first")
        if path.is_dir():
            raise ValueError(f"--out {path} is a folder; name a file in it")
        if path.exists() and not force:
            raise ValueError(f"{path} exists; name another --out, or overwrite it with --force")


def new_folder(out: Path | None, name: str) -> Path:
    """Choose the folder of a new run, without making it.

    Args:
        out: The folder that was asked for. Default: `runs/NAME`, or `runs/NAME-2`, `-3`, ...
        name: Name of the run.

    Raises:
        ValueError: If `out` is a file or holds something.
    """
    if out is None:
        names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
        return next(folder for folder in map(Path("runs").joinpath, names) if not folder.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and is not empty; continue it with --resume {out}, or choose another "
            "--out"
        )
    return out


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write a run's configuration."""
    write_json(folder / CONFIG, config)


def read_config(folder: Path) -> Options:
    """Read a run's configuration.

    Raises:
        OSError: If there is none.
        ValueError: If it is no JSON object.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, got {type(config).__name__}")  # noqa: TRY004
    return config


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Write the metrics of all epochs anew, so that a resumed run repeats no row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (
        atomic_write(folder / METRICS) as (temporary,),
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(folder: Path) -> list[Row]:
    """Read the metrics, each row without the columns that were not measured.

    Raises:
        OSError: If there are none.
    """
    with (folder / METRICS).open(newline="", encoding="utf-8") as file:
        return [
            {name: float(text) for name, text in row.items() if text}
            for row in csv.DictReader(file)
        ]


def save_checkpoint(folder: Path, content: Mapping[str, object]) -> None:
    """Write `last.pt`, sealed with a checksum, and keep the one before as `previous.pt`.

    A crash at any moment leaves one whole checkpoint, and a damaged one replaces none.
    """
    last = folder / LAST
    if not last.exists() and is_sealed(folder / _UNFINISHED):
        (folder / _UNFINISHED).replace(last)  # A run was killed between the two renames below.
    with atomic_write(last) as (temporary,):
        with temporary.open("wb") as file:
            torch.save(content, file)
        seal(temporary)
        _sync(temporary)  # Before the old one is moved out of the way.
        if is_sealed(last):
            last.replace(folder / PREVIOUS)


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint, whole or damaged."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def is_run(content: object) -> bool:
    """Tell a checkpoint of our runs by its parts."""
    return isinstance(content, Mapping) and {"model", "step", "rows", "meter"} <= set(content)


def load_checkpoint(
    folder: Path, is_usable: Callable[[dict[str, Any]], bool] = bool
) -> tuple[Path, dict[str, Any]]:
    """Read the newest whole checkpoint on the CPU; a warning names it where it is not the last.

    Nothing in the file is executed; see `read_checkpoint`.

    Args:
        folder: The run folder.
        is_usable: Whether a content has the parts that the caller needs. Default: any at all.

    Returns:
        The file and its content.

    Raises:
        ValueError: If the folder holds no whole checkpoint.
    """
    problems = []
    for file in (folder / LAST, folder / _UNFINISHED, folder / PREVIOUS):
        if not file.exists() or (file.name == _UNFINISHED and not is_sealed(file)):
            continue
        try:
            content, _ = read_checkpoint(file)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        if not isinstance(content, dict) or not is_usable(content):
            problems.append(f"{file} is no checkpoint of such a run")
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}; {file} is used instead", stacklevel=2)
        return file, content
    if problems:
        raise ValueError(
            f"{folder} holds no whole checkpoint ({'; '.join(problems)}); train it again with a "
            "new --out"
        )
    raise ValueError(
        f"{folder} is no run folder: it holds neither {LAST} nor {PREVIOUS}; pass the folder that "
        "--out named"
    )
