"""The run folder: configuration, metrics and checkpoints, each whole whenever somebody reads it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from mixmask._version import __version__
from mixmask.runs.files import (
    LAST,
    METRICS,
    PREVIOUS,
    atomic_write,
    check_readable,
    sync,
    write_json,
)
from mixmask.runs.options import LARGEST, Options, describe_change
from mixmask.runs.reading import is_sealed, read_checkpoint, seal

# The columns of `metrics.csv` that an epoch has measured.
Row = dict[str, float]

_UNFINISHED = f"{LAST}.tmp"  # As `atomic_write` names it.
# With --keep: the one of the best kNN accuracy; those of epochs are epoch-0012.pt and so on.
BEST = "best.pt"
CONFIG = "config.json"
RESULTS = "results.json"

# Of `config.json`, and what every command uses of it: the types, and the least of counts.
FORMAT = 4
_USED: dict[str, type] = {
    "format": int, "processes": int, "method": str, "mix": str, "data": str, "arch": str,
    "small_stem": bool, "image_size": int, "channels": int, "seed": int, "epochs": int,
    "fingerprint": dict, "source": str,
}  # fmt: skip
_LEAST = {"processes": 1, "image_size": 1, "channels": 1}

# The last checkpoints that this process has written and sealed, as they were then.
_written: dict[Path, tuple[int, int, int] | None] = {}


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write a run's configuration, with the number of its format."""
    write_json(folder / CONFIG, {"format": FORMAT, "version": __version__, **config})


def read_config(folder: Path) -> Options:
    """Read a run's configuration.

    Raises:
        OSError: If there is none.
        ValueError: If it is not a JSON object, of another format, or what all commands use has
            another type. `restore_config` checks the rest.
    """
    content = read_options(folder / CONFIG)
    if "format" not in content:
        raise ValueError(f"{CONFIG} names no 'format', so it is not that of a run")
    return content


def read_options(path: Path) -> Options:
    """Read options by their names from a JSON file; see `read_config`."""
    check_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")  # noqa: TRY004
    for name, kind in _USED.items():
        if name not in content:
            continue
        value = content[name]
        if type(value) is not kind:  # Not `isinstance`, by which true is an int.
            raise ValueError(f"{name!r} must be of type {kind.__name__}, got {value!r}")
        least, most = _LEAST.get(name, 0), LARGEST
        if isinstance(value, int) and not least <= value <= most:
            raise ValueError(f"{name!r} must be within {least} ... {most}, got {value}")
    # Without a name they would be those of the folder where one happens to be; without a
    # fingerprint any others would pass for them.
    for name, value in (("data", ""), ("fingerprint", {})):
        if content.get(name) == value:
            raise ValueError(f"{name!r} must say which images are meant, got {value!r}")
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"it is in format {content['format']}, but this version, {__version__}, reads format "
            f"{FORMAT}; use the version that wrote it, {content.get('version')}"
        )
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not a JSON number")


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Rewrite the metrics of all epochs, so that a resumed run repeats no row."""
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
        ValueError: If they are no file, a row has no epoch, or a value is not a finite number.
    """
    path = folder / METRICS
    check_readable(path)
    with path.open(newline="", encoding="utf-8") as file:
        read = csv.DictReader(file, restkey="")  # Under which the values without a column come.
        try:
            return [_read_row(f"{path}, line {read.line_num}", row) for row in read]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); pretrain --resume writes it again from a "
                "checkpoint, where there is one"
            ) from None


def _read_row(where: str, texts: Mapping[str, str]) -> Row:
    """Return the numbers of a line of `metrics.csv`."""
    row: Row = {}
    for name, text in texts.items():
        try:
            number = float(text) if text else None
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and (not name or not math.isfinite(number)):
            raise ValueError(f"{where} must hold one finite number per column, got {name}={text!r}")
        if number is not None:
            row[name] = number
    if not row.get("epoch", math.nan).is_integer():
        raise ValueError(f"{where} must hold the number of an epoch, got {row.get('epoch')}")
    return row


def save_checkpoint(
    folder: Path, content: Mapping[str, object], config: Mapping[str, object] | None = None
) -> None:
    """Write `last.pt`, sealed with a checksum, and keep the one before as `previous.pt`.

    A crash at any moment leaves one whole checkpoint, and a damaged one replaces none.

    Args:
        folder: The run folder.
        content: What is saved.
        config: The configuration of a folder that has none yet. It is written once the checkpoint
            is on disk, so that a crash leaves a run that can go on, or nothing of use.
    """
    last = folder / LAST
    place = last.absolute()
    if not last.exists() and is_sealed(folder / _UNFINISHED):
        adopt_checkpoint(folder / _UNFINISHED)
    with atomic_write(last, needed=_count_bytes(content)) as (temporary,):
        with temporary.open("wb") as file:
            torch.save(content, file)
        seal(temporary)
        sync(temporary)  # Before the old one is moved out of the way.
        if config is not None:
            write_config(folder, config)
        # What this process has written, and nobody since, need not be read again.
        known, found = _written.pop(place, None), _identify(last)
        if (found and found == known) or is_sealed(last):
            last.replace(folder / PREVIOUS)
    _written[place] = _identify(last)


def adopt_checkpoint(file: Path) -> bool:
    """Name a checkpoint `last.pt` that a kill between two renames left unnamed; tell if it is."""
    if file.name == _UNFINISHED:
        file = file.replace(file.with_name(LAST))
    return file.name == LAST


def _identify(path: Path) -> tuple[int, int, int] | None:
    """Return what a file changes when it is written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def copy_checkpoint(folder: Path, name: str) -> None:
    """Keep `last.pt` under a further name, which takes no more room where the disk has links."""
    with atomic_write(folder / name) as (temporary,):
        try:
            temporary.hardlink_to(folder / LAST)
        except OSError:
            shutil.copyfile(folder / LAST, temporary)


def keep_checkpoint(folder: Path, epoch: int, keep: int) -> None:
    """Keep `last.pt` as the checkpoint of an epoch, and those of the `keep` last epochs only."""
    copy_checkpoint(folder, f"epoch-{epoch:04}.pt")
    for path in _kept(folder)[keep:]:
        path.unlink()


def _kept(folder: Path) -> list[Path]:
    """List the checkpoints of epochs, the newest first; a user's files may have names like them."""
    names = ((re.fullmatch(r"epoch-(\d+)\.pt", path.name), path) for path in folder.glob("*.pt"))
    numbers = [(int(match[1]), path) for match, path in names if match]
    return [path for _, path in sorted(numbers, reverse=True)]


def list_checkpoints(folder: Path) -> list[Path]:
    """List what there is to go on from, whole or damaged, the newest first."""
    last, unfinished, previous = (folder / name for name in (LAST, _UNFINISHED, PREVIOUS))
    left = [unfinished] if is_sealed(unfinished) else []  # By a kill between two renames.
    # The best is of any epoch, so it comes last.
    files = [last, *left, previous, *_kept(folder), folder / BEST]
    return [file for file in files if file.exists()]


def _count_bytes(content: object) -> int:
    """Count the bytes of all tensors in nested dictionaries, lists and tuples."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts: Iterable[object] = ()
    if isinstance(content, Mapping):
        parts = content.values()
    elif isinstance(content, list | tuple):
        parts = content
    return sum(map(_count_bytes, parts))


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint, whole or damaged."""
    return bool(list_checkpoints(folder))


def is_unstarted(folder: Path) -> bool:
    """Tell whether a run was stopped before its first checkpoint, so that it can start again."""
    # A run that has results had a checkpoint, too: to start again would replace them.
    if not (folder / CONFIG).exists() or has_checkpoint(folder) or (folder / RESULTS).exists():
        return False
    # Before the first epoch there is at most the row of the untrained backbone.
    return not (folder / METRICS).exists() or all(
        row.get("epoch") == 0 for row in read_rows(folder)
    )


def is_run(content: object) -> bool:
    """Tell a checkpoint of our runs by its parts."""
    return isinstance(content, Mapping) and {"model", "step", "rows", "meter"} <= set(content)


def describe_difference(file: Path, content: Mapping[str, object]) -> str:
    """Say how a checkpoint's options differ from the `config.json` beside it; "" if they do not."""
    try:
        written = read_config(file.parent)
    except (OSError, ValueError):  # Who needs it says so.
        return ""
    change = describe_change(content.get("options"), written)
    return f"it was trained with other options than its {CONFIG} says ({change})" * bool(change)


def load_checkpoint(
    folder: Path, find_misfit: Callable[[Options], str] = lambda _: ""
) -> tuple[Path, Options]:
    """Read the newest whole checkpoint on the CPU; a warning names it where it is not the last.

    Nothing in the file is executed; see `read_checkpoint`.

    Args:
        folder: The run folder.
        find_misfit: Says why the caller cannot use a content; "" if it can. Default: it can.

    Returns:
        The file and its content.

    Raises:
        ValueError: If the folder holds no checkpoint that can be used.
    """
    problems = []
    for file in list_checkpoints(folder):
        try:
            content, _ = read_checkpoint(file)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        misfit = "it is not a checkpoint"
        if isinstance(content, dict):
            misfit = describe_difference(file, content) or find_misfit(content)
        if misfit:
            problems.append(f"{file} cannot be used ({misfit})")
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}; {file} is used instead", stacklevel=2)
        return file, content
    if problems:
        raise ValueError(
            f"{folder} holds no whole checkpoint of its run ({'; '.join(problems)}); train it "
            "again with a new --out, or restore what was changed"
        )
    raise ValueError(
        f"{folder} is not a run folder: it holds neither {LAST} nor {PREVIOUS}; pass the folder "
        "that --out named"
    )
