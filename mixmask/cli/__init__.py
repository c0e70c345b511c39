"""The command line: one module per command, imported only when its command is given."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from mixmask._devices import is_out_of_memory
from mixmask._distributed import launched
from mixmask._signals import interruptible
from mixmask._version import __version__
from mixmask.cli._console import OneLineParser, open_streams, refuse, say
from mixmask.runs.options import set_threads

_EXTRA = ("accelerate", "matplotlib", "timm", "torchvision", "tqdm")

# Name: the module with its `add_NAME`, and its line in `mixmask --help`.
_COMMANDS = {
    "pretrain": ("pretrain", "train a backbone"),
    "recipes": ("pretrain", "list the named settings"),
    "evaluate": ("evaluate", "measure a backbone"),
    "detect": ("detect", "train and test an object detector on a backbone"),
    "export": ("export", "write a backbone for another library"),
    "show": ("show", "draw masks and mixes of images"),
    "compare": ("compare", "draw the curves of several runs in one figure"),
    "map": ("features", "draw features in two dimensions, coloured by class"),
    "neighbours": ("features", "draw images and those that a backbone finds nearest"),
    "embed": ("features", "write features of images, with the images' names"),
    "ablate": ("ablate", "run a study: many small runs, their table and figure"),
}

# Commands that several processes may run together; those of others would write the same files.
_TOGETHER = ("pretrain", "recipes")

# What helps a command whose memory ran out.
_SMALLER = {
    "pretrain": "--accumulate 2 halves what a step holds, --checkpointing and --precision bf16 "
    "help too",
    "ablate": "use a smaller --batch-size or --precision bf16",
    "evaluate": "use a smaller --batch-size or --image-size",
    "detect": "use a smaller --batch-size, --size or --rois, in this order",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name. Default: those of this process.

    Returns:
        0, 2 for input that is refused, 130 when interrupted.
    """
    open_streams()
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return refuse(
            f"this command needs {', '.join(missing)}; run pip install '.[train]' in the checkout "
            "of mixmask"
        )
    # Python's own form shows a line of code, which does not help at a command line.
    warnings.showwarning = lambda message, *_: say(f"mixmask: {message}", sys.stderr)
    warnings.filterwarnings("always", category=UserWarning, module="mixmask")
    words = [_spell(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if words in ([], ["evaluate"]):  # What needs another word says which ones there are.
        words.append("--help")
    try:
        code = _run(words)
    finally:
        say("", end="")  # Flush what argparse has printed; `say` handles a closed stdout.
    return code


def _run(words: Sequence[str]) -> int:
    """Run the command that the words name, and say in one line why it is refused or ends."""
    try:
        with interruptible():
            options = vars(_parser(words).parse_args(words))
            command: Callable[..., None] = options.pop("command")
            _check_alone(words[0])
            set_threads(options.pop("threads", None))
            command(**options)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        return refuse(str(error))
    except (RuntimeError, MemoryError) as error:
        if getattr(error.__context__, "errno", None) == errno.ELOOP:  # `Path.resolve` says so.
            return refuse(f"{error}; name another path")
        if not is_out_of_memory(error):
            raise
        return refuse(f"out of memory: {_SMALLER.get(words[0], 'use a smaller --image-size')}")
    except KeyboardInterrupt as interruption:  # Its text says how to go on, where one can.
        say("\n" + "; ".join(["mixmask: interrupted", *interruption.args]), sys.stderr)
        return 130
    except SystemExit as stop:  # argparse, which has said why
        return int(stop.code or 0)
    return 0


def _check_alone(name: str) -> None:
    if name not in _TOGETHER and launched() > 1:
        raise ValueError(f"{name} runs in one process; start it without a launcher")


def _spell(word: str) -> str:
    """Write an option with hyphens: --grid_size is --grid-size."""
    return re.sub(r"^--\w[\w-]*", lambda option: option[0].replace("_", "-"), word)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Build a parser that knows all commands, and the options of the one that is given."""
    parser = OneLineParser(prog="mixmask", description="MixMask for self-supervised training.")
    version = f"mixmask {__version__}, torch {torch.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, argument_default=argparse.SUPPRESS)
        if words[:1] == [name]:  # Importing the modules of all commands takes seconds.
            add_options = getattr(importlib.import_module(f"mixmask.cli.{module}"), f"add_{name}")
            add_options(command)
    return parser
