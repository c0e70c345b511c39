"""A folder, or a zip file of one, to read from."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any


class Tree:
    """A read-only folder, or a zip file of one, which is read in place: nothing is extracted.

    Args:
        root: A folder or a zip file.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, root: Path) -> None:
        """Look at what there is."""
        self.root = root
        self._zips: dict[int, zipfile.ZipFile] = {}
        self._names: frozenset[str] | None = None
        if root.is_file():
            try:
                self._names = frozenset(self._zip().namelist())
            except zipfile.BadZipFile as error:
                raise ValueError(
                    f"{root} is no whole zip file ({error}); pass a folder or a zip of it"
                ) from None
        elif not root.is_dir():
            raise ValueError(f"--data must be a folder or a zip file, got {root}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when a worker is started."""
        return {**self.__dict__, "_zips": {}}

    def has(self, name: str) -> bool:
        """Tell whether there is such a file; names that lead out of the tree are refused."""
        inside = _inside(name)
        if self._names is not None:
            return inside in self._names
        return (self.root / inside).is_file()

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        inside = _inside(name)
        if self._names is not None:
            return self._zip().read(inside)
        return (self.root / inside).read_bytes()

    def above(self, folder: str) -> str | None:
        """Return the path of what holds a folder, "" or ending in "/": the top, or a nested one."""
        if self._names is None:
            found = [
                path.relative_to(self.root).as_posix().removesuffix(folder)
                for depth in ("", "*/", "*/*/")
                for path in sorted(self.root.glob(depth + folder))
                if path.is_dir()
            ]
        else:
            parts = (name.partition(folder + "/") for name in self._names)
            found = [before for before, middle, _ in parts if middle and before[-1:] in ("", "/")]
        return min(found, key=lambda path: (path.count("/"), path), default=None)

    def names(self, folder: str, suffix: str) -> list[str]:
        """Return the names of the files right in a folder that end in a suffix, sorted."""
        if self._names is None:
            files: Iterable[str] = (p.name for p in (self.root / folder).iterdir() if p.is_file())
        else:
            inside = (name.removeprefix(folder + "/") for name in self._names if folder in name)
            files = (name for name in inside if "/" not in name)
        return sorted(name for name in files if name.endswith(suffix))

    def _zip(self) -> zipfile.ZipFile:
        # Forked workers would share the place in one open file.
        process = os.getpid()
        if process not in self._zips:
            self._zips[process] = zipfile.ZipFile(self.root)
        return self._zips[process]


def _inside(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the data names a file outside of it, {name!r}; correct its annotations")
    return str(path)
