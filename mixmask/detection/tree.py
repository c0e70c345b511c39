"""A folder, or a zip file of one, to read from, with one-line errors for broken files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from PIL import Image

from mixmask.data.folders import open_archive
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


class Tree:
    """A read-only folder, or a zip file of one, which is read in place: nothing is extracted."""

    def __init__(self, root: Path) -> None:
        """List the members of a zip file; anything but a folder or a zip file is refused."""
        self.root = root
        self._members: frozenset[str] | None = None
        if root.is_file():
            with explain(f"{root} is not a whole zip file"):
                self._members = frozenset(open_archive(root).namelist())
        elif not root.is_dir():
            raise ValueError(f"--data must be a folder or a zip file, got {root}")

    def has(self, name: str) -> bool:
        """Tell whether there is such a file; names that lead out of the tree are refused."""
        inside = _inside(name)
        return (self.root / inside).is_file() if self._members is None else inside in self._members

    def read(self, name: str) -> bytes:
        """Return a file's bytes, or refuse one that is damaged, encrypted or of unknown codec."""
        inside = _inside(name)
        with explain(f"{name} in {self.root} cannot be read"):
            if self._members is None:
                return (self.root / inside).read_bytes()
            return open_archive(self.root).read(inside)

    @contextmanager
    def open_image(self, name: str) -> Iterator[Image.Image]:
        """Open an image; only its header is read yet."""
        content = self.read(name)
        with explain(f"{name} is not a readable image"), open_image(content) as image:
            yield image

    def find(self, folder: str, suffix: str) -> tuple[str, dict[str, str]]:
        """Find the files with a suffix in a folder, at any depth.

        Returns:
            What holds the folder, "" or ending in "/", the outermost one; and the paths of the
            files by their names without the suffix, sorted.
        """
        paths = self._members
        if paths is None:  # A search of all depths would walk through every image folder.
            globs = (self.root.glob(f"{top}{folder}/*{suffix}") for top in ("", "*/", "*/*/"))
            files = (path for found in globs for path in found if path.is_file())
            paths = frozenset(path.relative_to(self.root).as_posix() for path in files)
        pattern = re.compile(rf"((?:.*/)?){re.escape(folder)}/([^/]*){re.escape(suffix)}")
        matches = [match for path in sorted(paths) if (match := pattern.fullmatch(path))]
        parents = {match[1] for match in matches}
        base = min(parents, key=lambda parent: (parent.count("/"), parent), default="")
        return base, {match[2]: match[0] for match in matches if match[1] == base}


def _inside(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the annotations name a file outside of the data, {name!r}; correct them")
    return str(path)
