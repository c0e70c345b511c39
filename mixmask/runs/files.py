"""Files that are whole whenever somebody reads them, and what a full disk says."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# The newest checkpoint, and the one before in case the newest is damaged.
LAST, PREVIOUS, METRICS = "last.pt", "previous.pt", "metrics.csv"


class NoRoomError(OSError):
    """The disk is full, or a file may not grow as large as it has to."""


@contextmanager
def atomic_write(*paths: Path, needed: int = 0) -> Iterator[list[Path]]:
    """Replace files by what is written under temporary names, once all of them are on disk.

    A crash or an error leaves the old files. A reader never sees half a file.

    Args:
        *paths: The files to replace; their folders must exist.
        needed: About how many bytes they take, for the message where there is no room.

    Yields:
        One temporary path per file, in the same order; each must be written.

    Raises:
        NoRoomError: If the disk has no room for them; the temporary files are gone by then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with atomic_write(path) as (temporary,):
        ...     _ = temporary.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    temporary = [_temporary(path) for path in paths]
    try:
        for left in temporary:  # A link would lead elsewhere, a pipe would be waited for.
            left.unlink(missing_ok=True)
        yield temporary
        for written in temporary:  # All of them, before the first one replaces anything.
            sync(written)
        for written, path in zip(temporary, paths, strict=True):
            written.replace(path)
    except Exception as error:
        if not _is_full(error):
            raise
        begun = sum(written.stat().st_size for written in temporary if written.exists())
        for written in temporary:  # Their bytes are free again.
            written.unlink(missing_ok=True)
        raise NoRoomError(_describe_room(paths[0], begun, needed)) from None
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


def _is_full(error: BaseException) -> bool:
    """Tell whether a disk is full, or a quota or a limit is reached."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # torch and safetensors raise errors of their own, in C++ and Rust, for what the system said.
    texts = ("No space left", "File too large", "quota exceeded", "unexpected pos")
    before = error.__cause__ or error.__context__
    return any(text in str(error) for text in texts) or (before is not None and _is_full(before))


def _describe_room(path: Path, begun: int, needed: int) -> str:
    """Say what was needed, what is free, and what is kept."""
    free = shutil.disk_usage(path.parent).free
    amount = _megabytes(needed) if needed else f"more than {_megabytes(begun)}"
    kept = [name for name in (LAST, PREVIOUS) if (path.parent / name).exists()]
    # What a run writes while it trains, against what other commands write.
    again = "resume" if path.suffix == ".pt" or path.name == METRICS else "try again"
    return (
        f"No space left for {path}: it takes {amount}, {_megabytes(free)} are free (a quota or "
        "a limit on the size of files counts too); "
        + (f"{path.parent / kept[0]} is kept: " if kept else "")
        + f"free some space, then {again}"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def sync(path: Path) -> None:
    """Wait until a file's content is on disk: a rename may reach it before the content does."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as (temporary,):
        # A name that is not UTF-8 has surrogates, whose escapes are JSON's own.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file atomically, for people to read too."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_files(*paths: Path, force: bool) -> None:
    """Check that files can be written, before any work is done for them.

    Args:
        *paths: The files of `--out`.
        force: Whether files that are there already may be overwritten.

    Raises:
        ValueError: If a file's folder is missing or takes no file, or a folder, a device or a file
            is in its place.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"--out lies in {path.parent}, which is not a folder; make it first")
        if path.is_dir():
            raise ValueError(f"--out {path} is a folder; name a file in it")
        if path.exists() and not path.is_file():  # A rename would put a file in its place.
            raise ValueError(f"--out {path} is a device or a pipe; name a file")
        if path.exists() and not force:
            raise ValueError(f"{path} exists; name another --out, or overwrite it with --force")
        temporary = _temporary(path)
        try:
            temporary.unlink(missing_ok=True)
            temporary.open("xb").close()
            temporary.unlink()
        except OSError as error:
            raise ValueError(
                f"--out {path} cannot be written ({error.strerror}); name another place"
            ) from None


def check_readable(path: Path) -> None:
    """Refuse a pipe or a device: to read one may take forever, and all memory."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device; a file was expected there")


def make_folder(path: Path) -> None:
    """Make a folder of results if it is not there yet, with those above it.

    Raises:
        ValueError: If that cannot be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out must be a folder, got {path} ({error.strerror}); name another"
        ) from None


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")
