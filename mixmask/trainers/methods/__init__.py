"""The methods by name: a new one is a file of its own and a line here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mixmask._checks import check_choice
from mixmask.trainers.config import PRESETS, RunConfig
from mixmask.trainers.methods import barlow, byol, moco, simclr, simsiam, swav
from mixmask.trainers.parts import Term


class Method(Protocol):
    """What the loop asks of a method, which is an `nn.Module`."""

    backbone: nn.Module

    def terms(
        self,
        x1: Tensor,
        x2: Tensor,
        generator: torch.Generator,
        *,
        extra: Sequence[Tensor] = (),
        mix: bool = True,
    ) -> Iterator[Term]:
        """Yield the clean term, then one for each mixed view."""

    def after_step(self, done: float) -> None:
        """Do what follows an optimiser step; `done` is the share of the run behind it."""


class Entry(NamedTuple):
    """A method, its options, what it sets otherwise on any data, and its presets by data."""

    build: type[Any]
    config: type[RunConfig]
    defaults: dict[str, Any]
    presets: dict[str, dict[str, Any]]


METHODS: dict[str, Entry] = {
    "moco-v1": Entry(moco.MoCo, moco.MoCoConfig, moco.V1, moco.PRESETS),
    "moco-v2": Entry(moco.MoCo, moco.MoCoConfig, {}, moco.PRESETS),
    "simclr": Entry(simclr.SimCLR, simclr.SimCLRConfig, {}, simclr.PRESETS),
    "byol": Entry(byol.BYOL, byol.BYOLConfig, {}, byol.PRESETS),
    "simsiam": Entry(simsiam.SimSiam, simsiam.SimSiamConfig, {}, simsiam.PRESETS),
    "barlow-twins": Entry(barlow.BarlowTwins, barlow.BarlowTwinsConfig, {}, barlow.PRESETS),
    "swav": Entry(swav.SwAV, swav.SwAVConfig, {}, swav.PRESETS),
}


def make_config(**given: Any) -> Any:
    """Build a method's configuration: its defaults, the presets for the data, then yours.

    Args:
        **given: Fields of the method's configuration.

    Raises:
        ValueError: If a value is out of range, or an option belongs to another method.

    Example:
        >>> make_config(data="cifar100").grid_size, make_config(data="photos").grid_size
        (2, 8)
    """
    method = given.get("method", RunConfig.method)
    check_choice("--method", method, tuple(METHODS))
    entry = METHODS[method]
    known = {field.name for field in dataclasses.fields(entry.config)}
    for name in given:
        if name not in known:
            owners = [other for other, e in METHODS.items() if hasattr(e.config, name)]
            raise ValueError(
                f"--{name.replace('_', '-')} is no option of {method}"
                + (f", but of {', '.join(owners)}; leave it out" if owners else "")
            )
    data = given.get("data", RunConfig.data)
    recipe = given.get("recipe") or (data if data in PRESETS else "imagenet")
    check_choice("--recipe", recipe, tuple(PRESETS))
    if recipe != data and data in PRESETS:
        raise ValueError(
            f"--recipe {recipe} and --data {data} contradict each other; leave --recipe out, or "
            "name the folder that its images are in"
        )
    options = {**PRESETS[recipe], **entry.presets.get(recipe, {}), **entry.defaults}
    return entry.config(**{**options, **given, "method": method, "recipe": recipe})


def option_defaults(method: str) -> dict[str, Any]:
    """Return a method's options at their defaults; none for a method that is not known here.

    Example:
        >>> option_defaults("moco-v2")["temperature"], option_defaults("another")
        (0.2, {})
    """
    if method not in METHODS:
        return {}
    return {field.name: field.default for field in dataclasses.fields(METHODS[method].config)}


def load_config(path: Path) -> RunConfig:
    """Read a configuration that `save_config` wrote.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(fields["ratio"], list):
            fields["ratio"] = tuple(fields["ratio"])
        return METHODS[fields["method"]].config(**fields)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.parent} is no run that can be resumed: its {path.name} cannot be read "
            f"({error}); pass the folder that --out made"
        ) from error


def build_method(config: RunConfig) -> Any:
    """Build the method that a configuration names, an `nn.Module` that is a `Method`."""
    return METHODS[config.method].build(config)
