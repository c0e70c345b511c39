"""What commands share: words on the console, errors of one line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, TextIO


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Write a line to standard output, or to another file, at once."""
    (file or sys.stdout).write(text + end)
    (file or sys.stdout).flush()


def check_out(out: Path) -> None:
    """Refuse a file to write whose folder is not there, before any work is done for it."""
    if not out.parent.is_dir():
        raise ValueError(f"--out lies in {out.parent}, which is no folder; make it first")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, as {out / 'figure.png'}")


def refuse(message: str) -> int:
    """Say in one line why input is refused, and return the exit code for that."""
    say(f"mixmask: {' '.join(message.split())}", sys.stderr)
    return 2


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"mixmask: {message}; see {self.prog} --help\n")
