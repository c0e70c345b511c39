"""What commands share: words on the console, errors of one line."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from mixmask.runs.folder import has_checkpoint
from mixmask.runs.records import plural


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Write a line to standard output, or to another file, at once."""
    (file or sys.stdout).write(text + end)
    (file or sys.stdout).flush()


def refuse(message: str) -> int:
    """Say in one line why input is refused, and return the exit code for that."""
    say(f"mixmask: {' '.join(message.split())}", sys.stderr)
    return 2


def describe_device() -> str:
    """Name what a run computes on, for its first line."""
    if torch.cuda.is_available():
        return "GPU"
    return f"CPU, {plural(torch.get_num_threads(), 'thread')}"


def quote(path: Path) -> str:
    """Write a path as one would type it in a shell."""
    return shlex.quote(str(path))


@contextmanager
def resumable(command: str, folder: Path) -> Iterator[None]:
    """Let an interruption inside say how to continue a run, once it has a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        if not has_checkpoint(folder):
            raise
        advice = f"continue with mixmask {command} --resume {quote(folder)}"
        raise KeyboardInterrupt(advice) from None


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors take one line and suggest the option that was meant."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"mixmask: {message}; see {self.prog} --help\n")

    # Any: argparse's own signature has overloads.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown words here: argparse leaves a command's to the parser above it."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = get_close_matches(word, self._option_string_actions, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown
