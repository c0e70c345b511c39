"""The command line: one module a command."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from mixmask._version import __version__
from mixmask.cli._console import OneLineParser, refuse, say
from mixmask.cli.ablate import add_ablate
from mixmask.cli.compare import add_compare
from mixmask.cli.detect import add_detect
from mixmask.cli.embed import add_embed
from mixmask.cli.evaluate import add_evaluate
from mixmask.cli.export import add_export
from mixmask.cli.features import add_map, add_neighbours
from mixmask.cli.options import set_threads
from mixmask.cli.pretrain import add_pretrain, add_recipes
from mixmask.cli.show import add_show

_EXTRA = ("accelerate", "kornia", "matplotlib", "timm", "torchvision", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name. Default: those of this process.

    Returns:
        0, 2 for input that is refused, 130 when interrupted.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return refuse(f"this command needs {', '.join(missing)}: pip install '.[train]'")
    warnings.showwarning = lambda message, *_: say(f"mixmask: {message}", sys.stderr)
    warnings.filterwarnings("always", category=UserWarning, module="mixmask")
    try:
        options = vars(_parser().parse_args(arguments))
        command: Callable[..., None] = options.pop("command")
        set_threads(options.pop("threads", None))
        command(**options)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        return refuse(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        return refuse(
            "out of memory: --accumulate 2 halves what a step holds, --checkpointing and "
            "--precision bf16 help too"
        )
    except KeyboardInterrupt:
        say("\nmixmask: interrupted", sys.stderr)
        return 130
    except SystemExit as stop:  # argparse, which has said why
        return int(stop.code or 0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="mixmask", description="MixMask for self-supervised training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_pretrain(commands)
    add_recipes(commands)
    add_evaluate(commands)
    add_detect(commands)
    add_export(commands)
    add_show(commands)
    add_compare(commands)
    add_map(commands)
    add_neighbours(commands)
    add_embed(commands)
    add_ablate(commands)
    return parser
