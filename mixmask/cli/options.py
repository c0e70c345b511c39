"""Command-line options: those of a configuration's fields, and those that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mixmask.runs.options import HELP, flag
from mixmask.runs.records import describe_value

_NOTHING: Mapping[str, Any] = MappingProxyType({})

# What several commands take, declared once. A default in brackets is the command's, unless said.
_SHARED: dict[str, dict[str, Any]] = {
    "run": {"type": Path, "metavar": "RUN", "help": "run folder or checkpoint file"},
    "runs": {
        "type": Path, "metavar": "RUN", "nargs": "+", "help": "run folders or checkpoint files",
    },
    "--data": {"metavar": "DATA", "help": "data set or folder of images [that of the run]"},
    "--image-size": {
        "type": int, "metavar": "N", "help": "image height and width in pixels [that of the run]",
    },
    "--arch": {"metavar": "ARCH", "help": f"{HELP['arch']} [that of the run]"},
    "--small-stem": {
        "action": argparse.BooleanOptionalAction,
        "help": f"{HELP['small_stem']} [as in the run]",
    },
    "--mean": {
        "type": float, "metavar": "X", "nargs": "+",
        "help": f"{HELP['mean']} [that of the checkpoint]",
    },
    "--std": {
        "type": float, "metavar": "X", "nargs": "+",
        "help": f"{HELP['std']} [that of the checkpoint]",
    },
    "--device": {"metavar": "DEVICE", "help": "cpu, cuda, cuda:N or mps [a GPU if there is one]"},
    "--threads": {"type": int, "metavar": "N", "help": "CPU threads [torch's choice]"},
    "--out": {"type": Path, "metavar": "PATH", "help": "file to write"},
    "--resume": {"type": Path, "metavar": "DIR", "help": "run folder to continue"},
    "--seed": {"type": int, "metavar": "N", "default": 0, "help": f"{HELP['seed']} [0]"},
    "--force": {"action": "store_true", "help": "replace existing files"},
}  # fmt: skip
# Which backbone is looked at, on which images, and where: the options of `load_task`.
SOURCE = (
    "--data", "--image-size", "--arch", "--small-stem", "--mean", "--std", "--device", "--threads",
)  # fmt: skip


def add_shared(parser: argparse._ActionsContainer, *names: str, **changes: object) -> None:
    """Add options that several commands share.

    Args:
        parser: The command's parser, or a group of it.
        *names: Keys of the table above: "run", "--out", ...
        **changes: What differs in this command, such as `help` and `default`.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_shared(parser, "run", "--threads")
        >>> add_shared(parser, "--out", default=Path("map.png"), help="PNG file to write [map.png]")
        >>> parser.parse_args(["runs/a"]).out.name
        'map.png'
    """
    for name in names:
        parser.add_argument(name, **(_SHARED[name] | changes))


def results_folder(run: Path) -> Path:
    """Return where results go without --out: into the run's folder, or beside the checkpoint."""
    if not run.exists():
        raise ValueError(f"RUN must be a run folder or a checkpoint file, got {run}: not found")
    return run if run.is_dir() else run.parent


def add_fields(
    parser: argparse._ActionsContainer,
    fields: Iterable[Field[Any]],
    *,
    defaults: Mapping[str, object] = _NOTHING,
    owners: Mapping[str, Sequence[str]] = _NOTHING,
    choices: Mapping[str, Sequence[str]] = _NOTHING,
) -> None:
    """Add an option for each field of a configuration; see `mixmask.runs.options.option`.

    Args:
        parser: A parser with `argument_default=argparse.SUPPRESS`, so that it returns what was
            given and nothing else; or a group of such a parser.
        fields: Fields of a dataclass.
        defaults: The values that `--help` shows, by field. Default: the field's own.
        owners: The methods that support a field, where not all do.
        choices: The words that are allowed, where the field does not say.
    """
    for field in fields:
        text = field.metadata["help"]
        if shown := describe_value(defaults.get(field.name, field.default)):
            text += f" [{shown}]"
        if field.name in owners:
            text += f" ({', '.join(owners[field.name])})"
        words = tuple(choices.get(field.name, field.metadata["choices"])) or None
        # No `default` here: the parser returns what was given, and the configuration the rest.
        kind: type = type(field.default)
        how: dict[str, Any] = {"type": kind, "choices": words}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            how = {"type": float, "nargs": "+", "metavar": "X"}
        elif field.metadata["ratio"]:
            how = {"type": float, "nargs": "+", "action": RatioAction, "metavar": "SHARE"}
        elif not words:
            how["metavar"] = kind.__name__.upper()
        # argparse fills in what follows a % in a help text.
        parser.add_argument(flag(field.name), help=text.replace("%", "%%"), **how)


class RatioAction(argparse.Action):
    """One number for a constant, two for a range: `--ratio 0.5`, `--ratio 0.25 0.75`.

    With `default=[]` and `const=True` the option may be repeated, and gives a list.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the number or the range."""
        if len(values) > 2:
            parser.error(f"{option_string} takes one or two numbers, got {len(values)}")
        ratio = values[0] if len(values) == 1 else tuple(values)
        if self.const:
            ratio = [*getattr(namespace, self.dest, ()), ratio]
        setattr(namespace, self.dest, ratio)
