"""What commands share: words on the console, errors of one line."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from mixmask.runs.files import NoRoomError
from mixmask.runs.folder import CONFIG, has_checkpoint
from mixmask.runs.records import plural


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Write a line to standard output, or to another file, at once.

    If the reader has gone, this continues silently.
    """
    try:
        (file or sys.stdout).write(text + end)
        (file or sys.stdout).flush()
    except OSError as error:
        if file is sys.stderr:
            sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
            return
        # What is buffered would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = error.strerror or type(error).__name__
        say(f"mixmask: standard output is gone ({reason}); going on without it", sys.stderr)


def open_streams() -> None:
    """Let the standard streams take every letter; where one is missing, one leads nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # ASCII has no λ, and UTF-8 not every file's name.


def refuse(message: str) -> int:
    """Say in one line why input is refused, and return the exit code for that."""
    say(f"mixmask: {' '.join(line.strip() for line in message.splitlines())}", sys.stderr)
    return 2


def describe_device(device: torch.device) -> str:
    """Name what a run computes on, for its first line."""
    if device.type != "cpu":
        return f"GPU {device.index}" if device.index else "GPU"
    return f"CPU, {plural(torch.get_num_threads(), 'thread')}"


def quote(value: object) -> str:
    """Write a path or a value as one would type it in a shell."""
    return shlex.quote(str(value))


@contextmanager
def resumable(command: str, folder: Path, options: str = "") -> Iterator[None]:
    """Let an interruption, a full disk or a dead worker say how to continue a run, if possible."""
    advice = f"continue with mixmask {command} --resume {quote(folder)}{options}"
    try:
        yield
    except KeyboardInterrupt:
        # A run starts again from its configuration, too.
        if (folder / CONFIG).exists() or has_checkpoint(folder):
            raise KeyboardInterrupt(advice) from None
        raise
    except (NoRoomError, ChildProcessError) as error:
        if has_checkpoint(folder):
            raise type(error)(f"{error}; {advice}") from None
        raise


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors take one line and suggest the option that was meant."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(refuse(f"{message}; see {self.prog} --help"))

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
