"""Options of a run: frozen dataclasses, from which the command line and the README derive."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask._checks import check_choice, ratio_bounds

MIXTURES = ("none", "mixmask", "unmix", "both", "erase")
METHODS = ("moco-v1", "moco-v2")


def option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """Declare a field with the line that `--help` shows for it."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """What every method needs: data, views, mixing, schedule, optimiser, device."""

    method: str = option("moco-v2", "training method", METHODS)
    mix: str = option("mixmask", "what fills the mixed view", MIXTURES)
    data: str = option("clothing64", "clothing64, cifar10, cifar100, stl10, or a folder of images")
    arch: str = option("resnet50", "backbone: a timm name, or 'narrow' for our small ResNet")
    small_stem: bool = option(False, "3x3 first convolution without max-pooling, for small images")
    image_size: int = option(224, "height and width of the views, in pixels")
    grid_size: int = option(8, "cells along a side of the mask")
    ratio: float | tuple[float, float] = option(
        0.5, "share of an image's own pixels, or two numbers for a range"
    )
    pattern: str = option("block", "pattern of the mask", ("block", "discrete"))
    per_sample: bool = option(False, "one mask a sample instead of one for the batch")
    roll: bool = option(False, "shift block masks at random, so that no place is favoured")
    switch: bool = option(True, "weigh the partner's term too")
    min_scale: float = option(0.2, "smallest share of an image's area that a crop takes")
    jitter: float = option(0.4, "strength of brightness, contrast and saturation jitter")
    hue: float = option(0.1, "strength of hue jitter")
    grey: float = option(0.2, "probability of a grey view")
    blur: float = option(0.5, "probability of a blurred view")
    epochs: int = option(200, "passes over the data")
    batch_size: int = option(256, "images a step and process")
    lr: float = option(0.03, "learning rate at the start, for the batch size given")
    warmup: float = option(0.0, "share of the run over which the learning rate rises")
    schedule: str = option("cosine", "learning rate over the run", ("cosine", "step"))
    weight_decay: float = option(1e-4, "weight decay of SGD")
    sgd_momentum: float = option(0.9, "momentum of SGD")
    precision: str = option("fp32", "number format of the forward pass", ("fp32", "bf16", "fp16"))
    seed: int = option(0, "seed from which all randomness follows")
    monitor: int = option(10, "epochs between two kNN accuracies on the test split; 0 for none")

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        for f in dataclasses.fields(self):
            if f.metadata["choices"]:
                check_choice(_flag(f.name), getattr(self, f.name), f.metadata["choices"])
        ratio_bounds(self.ratio)
        for name in ("image_size", "epochs"):
            _check_range(name, getattr(self, name), 1)
        _check_range("batch_size", self.batch_size, 2)
        _check_range("grid_size", self.grid_size, 2, self.image_size)
        _check_range("seed", self.seed, 0)
        _check_range("monitor", self.monitor, 0)
        for name in ("min_scale", "jitter", "grey", "blur", "warmup", "sgd_momentum"):
            _check_range(name, getattr(self, name), 0, 1)
        _check_range("hue", self.hue, 0, 0.5)
        for name in ("lr", "weight_decay"):
            _check_range(name, getattr(self, name), 0)


@dataclass(frozen=True)
class MoCoConfig(RunConfig):
    """MoCo's own options; the defaults are MoCo v2's on ImageNet, 200 epochs."""

    dim: int = option(128, "size of the embedding")
    mlp: bool = option(True, "projection head with a hidden layer (v2), not a linear one (v1)")
    queue_size: int = option(65_536, "keys in the queue")
    temperature: float = option(0.2, "temperature of InfoNCE")
    encoder_momentum: float = option(0.999, "momentum of the key encoder")
    bn_splits: int = option(
        1, "parts of a batch with batch-norm statistics of their own; keys are then shuffled"
    )

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        super().__post_init__()
        for name in ("dim", "queue_size", "bn_splits"):
            _check_range(name, getattr(self, name), 1)
        _check_range("encoder_momentum", self.encoder_momentum, 0, 1)
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be positive, got {self.temperature}; use 0.2")
        if self.batch_size % self.bn_splits or self.batch_size // self.bn_splits < 2:
            raise ValueError(
                f"--bn-splits must divide --batch-size into parts of at least 2, got "
                f"{self.bn_splits} and {self.batch_size}; use for instance 1"
            )


_CIFAR = {
    "arch": "resnet18", "small_stem": True, "image_size": 32, "grid_size": 2,
    "min_scale": 0.08, "blur": 0.0, "batch_size": 512, "lr": 0.06, "weight_decay": 5e-4,
    "queue_size": 4096, "temperature": 0.1, "encoder_momentum": 0.99, "bn_splits": 8,
    "epochs": 1000,
}  # fmt: skip

# Options that suit a data set better than the defaults, which are ImageNet's.
PRESETS: dict[str, dict[str, Any]] = {
    "clothing64": {
        "arch": "narrow", "image_size": 32, "grid_size": 2, "min_scale": 0.4, "jitter": 0.6,
        "hue": 0.15, "grey": 0.5, "blur": 0.0, "epochs": 28, "batch_size": 64, "lr": 0.03,
        "warmup": 0.05, "weight_decay": 5e-4, "queue_size": 512, "temperature": 0.1,
        "encoder_momentum": 0.996,
    },
    # Un-Mix's recipe (Shen et al.), on which the paper's CIFAR-100 rows build.
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": {**_CIFAR, "image_size": 64, "grid_size": 4, "epochs": 200, "small_stem": False},
}  # fmt: skip

# What MoCo v1 did otherwise, on any data.
_MOCO_V1 = {"mlp": False, "temperature": 0.07, "schedule": "step", "hue": 0.4, "blur": 0.0}


def moco_config(**given: Any) -> MoCoConfig:
    """Build a configuration: defaults, then the data set's preset, the method's, then yours.

    Args:
        **given: Fields of `MoCoConfig`.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> moco_config(data="cifar100").grid_size, moco_config(data="photos").grid_size
        (2, 8)
    """
    options: dict[str, Any] = dict(PRESETS.get(given.get("data", "clothing64"), {}))
    if given.get("method") == "moco-v1":
        options.update(_MOCO_V1)
    options.update(given)
    return MoCoConfig(**options)


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")


def load_config(path: Path) -> MoCoConfig:
    """Read a configuration that `save_config` wrote.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(fields["ratio"], list):
            fields["ratio"] = tuple(fields["ratio"])
        return MoCoConfig(**fields)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.parent} is no run that can be resumed: its {path.name} cannot be read "
            f"({error}); pass the folder that --out made"
        ) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        bounds = f"at least {low}" if high == float("inf") else f"within {low} ... {high}"
        raise ValueError(f"{_flag(name)} must be {bounds}, got {value}")
