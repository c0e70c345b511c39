"""A folder, or a zip file of one, to read from, with one-line errors for broken files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from mixmask.data.folders import open_archive, read_file, walk_folder
from mixmask.data.images import open_image


@contextmanager
def explain(problem: str) -> Iterator[None]:
    """Turn any error from reading foreign bytes into a ValueError of one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # zipfile alone raises nine kinds, and a codec may raise any.
        raise ValueError(f"{problem} ({type(error).__name__}: {error}); replace it") from None


@dataclass(frozen=True)
class Tree:
    """A read-only folder, or a zip file of one, which is read in place: nothing is extracted."""

    root: Path
    names: frozenset[str]  # Of all files, relative to the root.

    @classmethod
    def of(cls, root: Path) -> Tree:
        """List the files; anything but a folder or a zip file is refused."""
        if root.is_file():
            with explain(f"{root} is not a whole zip file"):
                return cls(root, frozenset(open_archive(root).namelist()))
        if not root.is_dir():
            raise ValueError(f"--data must be a folder or a zip file, got {root}")
        return cls(root, frozenset(name for name, kind in walk_folder(root) if kind == "file"))

    def has(self, name: str) -> bool:
        """Tell whether there is such a file; names that lead out of the tree are refused."""
        return _inside(name) in self.names

    def read(self, name: str) -> bytes:
        """Return a file's bytes, or refuse one that is damaged, encrypted or of unknown codec."""
        path = self.root / _inside(name)
        with explain(f"{name} in {self.root} cannot be read"):
            return read_file(path, self.root if self.root.is_file() else None)

    @contextmanager
    def open_image(self, name: str) -> Iterator[Image.Image]:
        """Open an image; only its header is read yet."""
        content = self.read(name)
        with explain(f"{name} is not a readable image"), open_image(content) as image:
            yield image

    def find(self, folder: str, pattern: str) -> tuple[str, dict[str, str]]:
        """Find the files of a folder, at any depth, whose names match a pattern with one group.

        Returns:
            What holds the folder, "" or ending in "/", the outermost one; and the paths of the
            files by what the group matches, sorted.
        """
        whole = re.compile(rf"((?:.*/)?){re.escape(folder)}/{pattern}")
        matches = [match for path in sorted(self.names) if (match := whole.fullmatch(path))]
        parents = {match[1] for match in matches}
        base = min(parents, key=lambda parent: (parent.count("/"), parent), default="")
        return base, {match[2]: match[0] for match in matches if match[1] == base}


def _inside(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the annotations name a file outside of the data, {name!r}; correct them")
    return str(path)
