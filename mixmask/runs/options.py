"""Options as dataclass fields: each with its help and its limits, all checked by one function."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from mixmask._checks import check_choice

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Values of a configuration's fields by their names.
Options = dict[str, Any]

Value = TypeVar("Value")


def option(
    default: Value,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    low: float | None = None,
    high: float | None = None,
    positive: bool = False,
) -> Value:
    """Declare a field that becomes a command-line option.

    Args:
        default: Its default; the option has its type.
        text: What `--help` says.
        choices: The words that are allowed. Default: any.
        low: The smallest value that is allowed.
        high: The largest value that is allowed.
        positive: Require more than 0.
    """
    limits = {"low": low, "high": high, "positive": positive}
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
    """Check each field of a configuration against its choices and limits.

    Raises:
        ValueError: If a value is not allowed; the message names the option.
    """
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if limits["choices"]:
            check_choice(flag(field.name), value, limits["choices"])
        if limits["low"] is not None or limits["high"] is not None:
            check_range(field.name, value, limits["low"], limits["high"])
        if limits["positive"] and not value > 0:
            raise ValueError(f"{flag(field.name)} must be positive, got {value}")


def check_range(name: str, value: float, low: float | None, high: float | None = None) -> None:
    """Check that an option lies within its limits, where it has them."""
    if (low is None or low <= value) and (high is None or value <= high):
        return
    if high is None:
        bounds = f"at least {low}"
    else:
        bounds = f"at most {high}" if low is None else f"within {low} ... {high}"
    raise ValueError(f"{flag(name)} must be {bounds}, got {value}")
