"""Backbones from checkpoints: our runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmask.backbones import build_backbone


@dataclass(frozen=True)
class Loaded:
    """A backbone and where it came from.

    Attributes:
        backbone: (N, 3, H, W) -> (N, `num_features`), pooled, on the CPU, in evaluation mode.
        arch: timm's name of it, or "narrow".
        small_stem: Whether its stem is the one for small images.
        layout: Whose checkpoint it was.
        taken: Keys of the checkpoint that went into the backbone.
        left: Keys of the checkpoint that did not.
        config: The run's `config.json`; empty for checkpoints of others.
    """

    backbone: nn.Module
    arch: str
    small_stem: bool
    layout: str
    taken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


def load_backbone(path: Path, *, arch: str | None = None, small_stem: bool | None = None) -> Loaded:
    """Load the backbone of a run folder or a checkpoint file.

    Args:
        path: A run folder, or a checkpoint file.
        arch: timm's name of the backbone. Default: the run's own.
        small_stem: Whether its stem is the one for small images. Default: the run's own.

    Raises:
        ValueError: If there is no checkpoint that fits.
    """
    folder, file = (path, path / "last.pt") if path.is_dir() else (path.parent, path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = torch.load(file, map_location="cpu", weights_only=True)["model"]
    prefix = "backbone."
    taken = tuple(key for key in content if key.startswith(prefix))
    state: dict[str, Tensor] = {key.removeprefix(prefix): content[key] for key in taken}
    arch = arch or config["arch"]
    small_stem = config["small_stem"] if small_stem is None else small_stem
    backbone = build_backbone(arch, small_stem=small_stem)
    backbone.load_state_dict(state)
    left = tuple(key for key in content if not key.startswith(prefix))
    return Loaded(backbone.eval(), arch, small_stem, "mixmask", taken, left, config)
