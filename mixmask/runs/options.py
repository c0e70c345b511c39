"""Options as dataclass fields: each with its help and its limits, all checked by one function."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mixmask._checks import check_choice, check_integer, few, ratio_bounds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

# Values of a configuration's fields by their names.
Options = dict[str, Any]

Value = TypeVar("Value")

# What `config.json` says beside the options: its format, who wrote it, how many processes trained,
# which data they saw, and where a detector's backbone came from.
FACTS = ("format", "version", "processes", "fingerprint", "source")
# Options that say how images are read, and when a run saves: no weights depend on them.
STORAGE = ("stream", "workers", "save_every", "save_minutes", "keep")
# What may differ between a checkpoint and `config.json`: where and how far a run goes on, and how
# its images are shared between processes.
_CHANGEABLE = (
    *STORAGE, "epochs", "data", "init", "batch_size", "accumulate", "measure_every", "tracker",
    "processes",
)  # fmt: skip
# What `--help` says of options that several configurations or commands have; texts that depend on
# the command follow in brackets.
HELP = {
    "arch": "backbone, by its name in timm, or our 'narrow', 'medium'",
    "small_stem": "3x3 first convolution without max-pooling, for small images",
    "mean": "mean of each channel, or of all, for pixels of 0 ... 1",
    "std": "deviation of each channel, or of all, for pixels of 0 ... 1",
    "workers": "processes that read images",
    "weight_decay": "weight decay",
    "seed": "seed of all random draws",
}
# The most that a tensor's side, and thus any whole number of an option, can be.
LARGEST = 2**31 - 1
# What a field of each type takes, and how messages call it.
_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"), int: (Integral, "a whole number"), float: (Real, "a number"),
    str: (str, "text"), tuple: (tuple, "numbers"),
}  # fmt: skip


def option(
    default: Value,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    low: float | None = None,
    high: float | None = None,
    positive: bool = False,
    ratio: bool = False,
) -> Value:
    """Declare a field that becomes a command-line option.

    Args:
        default: Its default; the option has its type.
        text: What `--help` says.
        choices: The words that are allowed. Default: any.
        low: The smallest value that is allowed.
        high: The largest value that is allowed.
        positive: Require more than 0.
        ratio: Take a number inside (0, 1), or a range (low, high).
    """
    limits = {"low": low, "high": high, "positive": positive, "ratio": ratio}
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, **limits})


def share(default: float, text: str) -> float:
    """Declare an option that lies within 0 ... 1."""
    return option(default, text, low=0, high=1)


def flag(name: str) -> str:
    """Return the command-line option of a field.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return "--" + name.replace("_", "-")


def check_options(config: DataclassInstance) -> None:
    """Check each field of a new configuration against its choices and limits.

    Lists become tuples here, for every caller: JSON, YAML and argparse know no tuples.

    Raises:
        TypeError: If a value has not the type of the field's default.
        ValueError: If a value is not allowed. Both messages name the option.
    """
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if isinstance(value, list) and (limits["ratio"] or isinstance(field.default, tuple)):
            value = tuple(value)
            object.__setattr__(config, field.name, value)  # As a frozen class' own __init__ does.
        if limits["ratio"]:
            ratio_bounds(value)
        else:
            _check_type(flag(field.name), value, type(field.default))
        if value == "" and field.default:
            raise ValueError(
                f"{flag(field.name)} must not be empty; leave it out for {field.default!r}"
            )
        if limits["choices"]:
            check_choice(flag(field.name), value, limits["choices"])
        if limits["low"] is not None or limits["high"] is not None:
            check_range(field.name, value, limits["low"], limits["high"])
        if type(field.default) is int:
            check_range(field.name, value, None, LARGEST)
        if limits["positive"] and not value > 0:
            raise ValueError(f"{flag(field.name)} must be positive, got {value}")
        # Neither NaN nor infinite, nor, for a float, a whole number that none can hold.
        if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            raise ValueError(f"{flag(field.name)} must be a finite number, got {value}")


def check_resume(folder: Path, given: Sequence[str], *, allowed: Sequence[str] = ()) -> None:
    """Check that `--resume` names a folder, and that nothing forbidden was given beside it."""
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "nothing is there"
        raise ValueError(
            f"--resume must be a run folder, got {folder}: {found}; pass a folder that --out named"
        )
    if given:
        others = f" (only {', '.join(allowed)} may change)" if allowed else ""
        raise ValueError(f"--resume uses the run's own options; remove {', '.join(given)}{others}")


def _check_type(name: str, value: object, kind: type) -> None:
    """Check that a value is of a kind, or a number that can stand for it."""
    accepted, words = _KINDS[kind]
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{name} must be {words}, got {value!r}")
    for number in value if isinstance(value, tuple) else ():
        _check_type(name, number, float)


def restore_config(kind: type[Config], content: Options) -> Config:
    """Build a configuration of some class from what `read_config` returned.

    Raises:
        TypeError: If an option has another type.
        ValueError: If options are unknown, missing, or out of their range; the message names them.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in content if name not in (*names, *FACTS)]
    missing = [name for name in names if name not in content]
    for what, found in (("unknown", unknown), ("missing", missing)):
        if found:
            raise ValueError(f"{what}: {few(map(repr, found), 5)}")
    return kind(**{name: content[name] for name in names})


def describe_change(trained: object, written: Options) -> str:
    """Name the first option that `config.json` lacks or has changed since a checkpoint; or "".

    Example:
        >>> describe_change({"lr": 0.1, "epochs": 9}, {"lr": 0.5, "epochs": 5})
        'lr was 0.1, is 0.5'
    """
    if not isinstance(trained, Mapping):
        return ""
    for name, value in trained.items():
        if name not in written:
            return f"{name} is missing"
        if not isinstance(value, str | int | float | tuple):
            return f"{name} was {type(value).__name__}"
        now = written[name]
        now = tuple(now) if isinstance(now, list) else now  # JSON knows no tuples.
        if name not in _CHANGEABLE and now != value:
            return f"{name} was {value!r}, is {now!r}"
    # Among processes a step's images may be shared otherwise.
    if {"processes", "batch_size"} <= set(trained):
        before, now = (one["batch_size"] * one["processes"] for one in (trained, written))
        if before != now:
            return f"images per step were {before}, are {now}"
    return ""


def check_range(name: str, value: float, low: float | None, high: float | None = None) -> None:
    """Check that an option lies within its limits, where it has them."""
    if (low is None or low <= value) and (high is None or value <= high):
        return
    if high is None:
        bounds = f"at least {low}"
    else:
        bounds = f"at most {high}" if low is None else f"within {low} ... {high}"
    raise ValueError(f"{flag(name)} must be {bounds}, got {value}")


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads; None leaves torch's choice."""
    if threads is None:
        return
    check_integer("--threads", threads, 1, "leave it out for torch's choice")
    most = max(64, os.cpu_count() or 1)  # More of them than the system allows end the process.
    check_range("threads", threads, None, most)
    torch.set_num_threads(threads)
