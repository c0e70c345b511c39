"""What of a checkpoint's content a run cannot go on from, told before any of it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmask._checks import one_line
from mixmask.runs.folder import CONFIG, load_checkpoint
from mixmask.runs.options import Options

_NUMBER = int | float


def restore(
    folder: Path,
    parts: Mapping[str, Any],  # What torch and accelerate have in common is no type.
    progress: Mapping[str, type],
    find_misfit: Callable[[Options], str] = lambda _: "",
) -> tuple[Path, Options]:
    """Restore a run's model and optimiser from its newest whole checkpoint that fits them.

    Args:
        folder: The run folder.
        parts: "model", "optimizer", and whatever else has a state dict in the checkpoint.
        progress: Names and types of what the caller takes from the content itself.
        find_misfit: Says why the caller cannot use a content with all of these; "" if it can.

    Returns:
        The file and its content; a warning names newer files that were damaged.

    Raises:
        ValueError: If there is no checkpoint that can be used.
    """
    kinds = {"model": Mapping, "optimizer": Mapping, **progress}

    def describe(content: Options) -> str:
        return (
            describe_progress(content, kinds)
            or describe_misfit(parts["model"].state_dict(), content["model"])
            or describe_optimizer_misfit(parts["optimizer"], content["optimizer"])
            or find_misfit(content)
        )

    file, content = load_checkpoint(folder, describe)
    try:
        for name, part in parts.items():
            part.load_state_dict(content[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} does not fit the run's {CONFIG} ({type(error).__name__}: {one_line(error)}); "
            "restore the one it was trained with, or train it again with a new --out"
        ) from None
    return file, content


def describe_misfit(own: Mapping[str, Tensor], found: Mapping[str, object]) -> str:
    """Name the first tensor of a checkpoint that a network cannot take; "" if it takes all.

    Example:
        >>> describe_misfit({"w": torch.zeros(2, 3)}, {"w": torch.zeros(4, 3)})
        'w must be of shape (2, 3), got (4, 3)'
    """
    for name, tensor in own.items():
        if name not in found:
            return f"{name} is missing"
        shapes = tuple(tensor.shape), tuple(getattr(found[name], "shape", ()))
        if shapes[0] != shapes[1]:
            return f"{name} must be of shape {shapes[0]}, got {shapes[1]}"
    return next((f"{name} is unknown" for name in found if name not in own), "")


def describe_progress(content: Mapping[str, object], parts: Mapping[str, type]) -> str:
    """Name the first part of a checkpoint that is missing or of another type; "" if all are right.

    Args:
        content: The checkpoint.
        parts: Names and types. "step" is counted from 0, and "rows" are measurements of epochs.

    Example:
        >>> describe_progress({"step": -1}, {"step": int}), describe_progress({}, {"rows": list})
        ('step is -1', 'rows is missing')
    """
    for name, kind in parts.items():
        if name not in content:
            return f"{name} is missing"
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            return f"{name} is {type(content[name]).__name__}"
    if isinstance(step := content.get("step"), int) and step < 0:
        return f"step is {step}"
    rows = content.get("rows", [])
    if not (isinstance(rows, Sequence) and all(map(_is_row, rows))):
        return "rows are no measurements of epochs"
    return ""


def _is_row(row: object) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("epoch"), _NUMBER)


def describe_optimizer_misfit(optimizer: torch.optim.Optimizer, found: Mapping[str, object]) -> str:
    """Name what of an optimiser's saved state does not fit it; "" if all does.

    torch takes any tensors, and a fused step writes over memory where they are too small.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> group = {"lr": 0.1, "params": [0]}
        >>> wrong = {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": [group]}
        >>> describe_optimizer_misfit(torch.optim.SGD([weight]), wrong)
        "the optimiser's momentum_buffer 0 is of another shape or type"
    """
    groups, state = found.get("param_groups"), found.get("state")
    own = optimizer.param_groups
    if not (isinstance(groups, list) and isinstance(state, Mapping) and len(groups) == len(own)):
        return f"the optimiser must have {len(own)} groups and their state"
    for group, saved in zip(own, groups, strict=True):
        if not isinstance(saved, Mapping):
            return "the optimiser's groups are no groups of parameters"
        for name, value in saved.items():
            number = isinstance(value, _NUMBER) and math.isfinite(value)
            if type(group.get(name)) in (int, float) and not number:
                return f"the optimiser's {name} is {value!r}"
    parameters = [parameter for group in own for parameter in group["params"]]
    for index, values in state.items():
        if not (isinstance(index, int) and index < len(parameters) and isinstance(values, Mapping)):
            return f"the optimiser has no parameter {index}"
        for name, value in values.items():
            if isinstance(value, Tensor) and name != "step" and not _fits(value, parameters[index]):
                return f"the optimiser's {name} {index} is of another shape or type"
    return ""


def _fits(value: Tensor, parameter: nn.Parameter) -> bool:
    """Tell whether a tensor has a parameter's form, and memory of its own for each element."""
    room = value.untyped_storage().nbytes() // max(1, value.element_size())
    alike = (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
    return alike and room >= value.storage_offset() + value.numel()
