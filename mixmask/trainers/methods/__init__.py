"""The methods by name: a new one is a file of its own and a line here."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mixmask._checks import check_choice
from mixmask.backbones import build_backbone, has_plain_stem
from mixmask.checkpoints.load import load_backbone
from mixmask.runs.misfits import describe_misfit
from mixmask.runs.options import Options, flag
from mixmask.runs.records import plural
from mixmask.trainers.config import PRESETS, TIMM, RunConfig
from mixmask.trainers.methods import barlow, byol, moco, simclr, simsiam, swav
from mixmask.trainers.mixtures import Method


class Entry(NamedTuple):
    """A method, its options, what it sets otherwise on any data, and its presets by data."""

    build: type[Any]  # Of a `Method`, from its own configuration and a backbone.
    config: type[RunConfig]
    defaults: Options
    presets: dict[str, Options]


METHODS: dict[str, Entry] = {
    "moco-v1": Entry(moco.MoCo, moco.MoCoConfig, moco.V1, moco.PRESETS),
    "moco-v2": Entry(moco.MoCo, moco.MoCoConfig, {}, moco.PRESETS),
    "simclr": Entry(simclr.SimCLR, simclr.SimCLRConfig, {}, simclr.PRESETS),
    "byol": Entry(byol.BYOL, byol.BYOLConfig, {}, byol.PRESETS),
    "simsiam": Entry(simsiam.SimSiam, simsiam.SimSiamConfig, {}, simsiam.PRESETS),
    "barlow-twins": Entry(barlow.BarlowTwins, barlow.BarlowTwinsConfig, {}, barlow.PRESETS),
    "swav": Entry(swav.SwAV, swav.SwAVConfig, {}, swav.PRESETS),
}


# Any: the result has the fields of the method that is named, which no type tells.
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
    for name in given:
        if not hasattr(entry.config, name):
            owners = [other for other, e in METHODS.items() if hasattr(e.config, name)]
            near = get_close_matches(name, option_defaults(method), 1, cutoff=0.7)
            advice = f", did you mean {flag(near[0])}?" if near else "; leave it out"
            if owners:
                advice = f" (only by {', '.join(owners)}); leave it out"
            raise ValueError(f"{flag(name)} is not supported by {method}{advice}")
    data = given.get("data", RunConfig.data)
    has_own = isinstance(data, str) and data in PRESETS  # The configuration checks its type.
    recipe = given.get("recipe") or (data if has_own else "imagenet")
    check_choice("--recipe", recipe, tuple(PRESETS))
    if has_own and recipe != data:
        raise ValueError(
            f"--recipe {recipe} does not suit --data {data}; leave --recipe out, or pass the "
            "folder of its images"
        )
    options = option_defaults(method, recipe) | given | {"method": method, "recipe": recipe}
    if "small_stem" not in given and not has_plain_stem(options["arch"]):
        options["small_stem"] = False
    return entry.config(**options)


def option_defaults(method: str, recipe: str = "imagenet") -> Options:
    """Return all options of a method as a recipe sets them; none for a method not known here.

    Example:
        >>> option_defaults("moco-v2")["temperature"], option_defaults("another")
        (0.2, {})
    """
    if method not in METHODS:
        return {}
    entry = METHODS[method]
    own = {field.name: field.default for field in dataclasses.fields(entry.config)}
    return {**own, **PRESETS[recipe], **entry.presets.get(recipe, {}), **entry.defaults}


def build_method(config: RunConfig) -> Method:
    """Build the method that a configuration names; weights come from torch's global generator."""
    method: Method = METHODS[config.method].build(config, build_encoder(config))
    return method


def build_encoder(config: RunConfig) -> nn.Module:
    """Build a run's backbone.

    With `--init` its weights are timm's, or those of a checkpoint in any layout that can be read.
    """
    backbone = build_backbone(
        config.arch,
        small_stem=config.small_stem,
        image_size=config.image_size,
        in_chans=config.channels,
        pretrained=config.init == TIMM,
    )
    if config.init not in ("", TIMM):
        loaded = load_backbone(Path(config.init), arch=config.arch, small_stem=config.small_stem)
        state = loaded.backbone.state_dict()
        if misfit := describe_misfit(backbone.state_dict(), state):
            raise ValueError(
                f"--init {config.init} does not fit {config.arch} for images of "
                f"{plural(config.channels, 'channel')} ({misfit}); name another checkpoint"
            )
        backbone.load_state_dict(state)
    return backbone
