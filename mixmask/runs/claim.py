"""The folder of a new run: chosen, held against other processes, taken back if the start fails."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixmask._distributed import launched, rank
from mixmask.runs.files import LAST
from mixmask.runs.folder import CONFIG, has_checkpoint

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there.
    fcntl = None  # type: ignore[assignment]

# Worker processes of a killed run hold its folder for some seconds more.
_PATIENCE, _PAUSE = 15.0, 0.2


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
    if out.exists() and not _is_free(out):
        raise ValueError(
            f"{out} exists and is not empty; continue it with --resume {out}, or choose another "
            "--out"
        )
    return out


def _is_free(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what a killed start left under temporary names."""
    left = {f"{CONFIG}.tmp", f"{LAST}.tmp"}
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= left


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder, and take back what a run writes that fails before its first checkpoint.

    So the same command can be repeated. After an interruption everything stays, for --resume.

    Raises:
        ValueError: If another process is using the folder, or did until now; or a folder lies
            where a run's file belongs.
        FileNotFoundError: If it was moved or deleted meanwhile, and could not be written.
    """
    # A launcher tells the rank before the processes have joined.
    if rank() != 0 or (launched() > 1 and os.environ.get("RANK", "0") != "0"):
        yield
        return
    before = set(folder.iterdir()) if folder.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    with _hold(folder):
        if set(folder.iterdir()) != (before or set()):
            raise ValueError(f"another process has used {folder}; choose another --out")
        _check_places(folder)
        try:
            yield
        except BaseException as error:
            if not folder.is_dir():
                if not isinstance(error, OSError):
                    raise
                raise FileNotFoundError(
                    f"{folder} was moved or deleted during the run; if it was moved, continue the "
                    "run in its new place with --resume"
                ) from error
            # Whose reader has gone was not refused, and can go on.
            failed = isinstance(error, Exception) and not isinstance(error, BrokenPipeError)
            if failed and not has_checkpoint(folder):
                for path in set(folder.iterdir()) - (before or set()):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if before is None and not any(folder.iterdir()):
                folder.rmdir()
            raise


def _check_places(folder: Path) -> None:
    """Check that no folder lies in the place of a file, which could never be written."""
    for path in folder.iterdir():
        if path.suffix in (".csv", ".json", ".png", ".pt", ".tmp") and path.is_dir():
            raise ValueError(f"{path} must be a file, got a folder; move it out of {folder}")


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder, until the end of the block or the process."""
    if fcntl is None:
        yield
        return
    held, until = os.open(folder, os.O_RDONLY), time.monotonic() + _PATIENCE
    try:
        while not _lock(held):
            if time.monotonic() > until:
                raise ValueError(
                    f"another process is using {folder}; wait until it finishes, or choose "
                    "another --out"
                )
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(held)


def _lock(held: int) -> bool:
    """Lock a file, and tell whether that is so; file systems without locks need none."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
