"""Options of a run: frozen dataclasses, from which the command line and the README derive."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask._checks import check_choice, ratio_bounds

MIXTURES = ("none", "mixmask", "unmix", "both", "erase", "mixup", "cutmix")


def option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """Declare a field with the line that `--help` shows for it."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """What every method needs: data, views, mixing, schedule, optimiser, device."""

    method: str = option("moco-v2", "training method")
    mix: str = option("mixmask", "what fills the mixed view", MIXTURES)
    data: str = option("clothing64", "clothing64, cifar10, cifar100, stl10, or a folder of images")
    stream: str = option(
        "auto",
        "whether a folder's images stay on disk, decoded anew in every epoch; auto if they are "
        "too many for memory",
        ("auto", "always", "never"),
    )
    workers: int = option(0, "processes that read a streamed folder; 0 for one a core but one")
    decode: str = option(
        "workers",
        "who decodes a streamed folder's JPEGs: its workers, or the device that trains, by "
        "TorchCodec (nvJPEG on a GPU)",
        ("workers", "device"),
    )
    recipe: str = option("", "named settings; without it those of --data, for a folder imagenet's")
    arch: str = option("resnet50", "backbone: a timm name, or our small 'narrow' or 'medium'")
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
    alpha: float = option(1.0, "Beta parameter of the shares of mixup and CutMix")
    global_share: float = option(0.5, "how often Un-Mix mixes globally, as mixup, not as CutMix")
    channel_share: float = option(
        0.0, "how often erasing masks each colour channel by itself, as MSCN does"
    )
    extra_crops: int = option(0, "further crops of each image, mixed or erased too (MSCN takes 2)")
    mixed_size: int = option(0, "height and width of the mixed views; 0 for --image-size")
    mix_every: int = option(1, "steps from one with mixed views to the next")
    replace_clean: bool = option(
        False, "let mixed views stand for the clean queries, not beside them"
    )
    min_scale: float = option(0.2, "smallest share of an image's area that a crop takes")
    jitter: float = option(0.4, "strength of brightness, contrast and saturation jitter")
    hue: float = option(0.1, "strength of hue jitter")
    grey: float = option(0.2, "probability of a grey view")
    blur: float = option(0.5, "probability of a blurred view")
    epochs: int = option(200, "passes over the data")
    batch_size: int = option(256, "images a step and process")
    optimizer: str = option("sgd", "optimiser of the weights", ("sgd", "lars", "adamw"))
    lr: float = option(0.03, "learning rate at the start, for the batch size given")
    warmup: float = option(0.0, "share of the run over which the learning rate rises")
    schedule: str = option("cosine", "learning rate over the run", ("cosine", "step"))
    weight_decay: float = option(1e-4, "weight decay")
    sgd_momentum: float = option(0.9, "momentum of SGD and LARS")
    accumulate: int = option(1, "parts of a batch that are forwarded one after the other")
    precision: str = option("fp32", "number format of the forward pass", ("fp32", "bf16", "fp16"))
    compile: bool = option(False, "compile the backbone")
    compile_mode: str = option(
        "default",
        "how to compile; reduce-overhead replays CUDA graphs, for small networks on a GPU",
        ("default", "reduce-overhead", "max-autotune"),
    )
    checkpointing: bool = option(False, "recompute activations in backward, to save memory")
    sync_bn: bool = option(False, "batch-norm statistics over all processes (GPUs)")
    tracker: str = option(
        "none", "where metrics go beside metrics.csv", ("none", "tensorboard", "wandb")
    )
    seed: int = option(0, "seed from which all randomness follows")
    monitor: int = option(10, "epochs between two kNN accuracies on the test split; 0 for none")

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        for f in dataclasses.fields(self):
            if f.metadata["choices"]:
                check_choice(_flag(f.name), getattr(self, f.name), f.metadata["choices"])
        ratio_bounds(self.ratio)
        for name in ("image_size", "epochs"):
            check_range(name, getattr(self, name), 1)
        check_range("batch_size", self.batch_size, 2)
        check_range("accumulate", self.accumulate, 1)
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"--accumulate must divide --batch-size into parts of at least 2, got "
                f"{self.accumulate} and {self.batch_size}; use for instance 1"
            )
        for name in ("extra_crops", "mixed_size"):
            check_range(name, getattr(self, name), 0)
        check_range("mix_every", self.mix_every, 1)
        check_range("grid_size", self.grid_size, 2, self.mixed_size or self.image_size)
        check_range("seed", self.seed, 0)
        check_range("monitor", self.monitor, 0)
        check_range("workers", self.workers, 0)
        shares = ("min_scale", "jitter", "grey", "blur", "warmup", "sgd_momentum")
        for name in (*shares, "global_share", "channel_share"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("hue", self.hue, 0, 0.5)
        for name in ("lr", "weight_decay"):
            check_range(name, getattr(self, name), 0)
        check_over_zero("alpha", self.alpha)
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(
                f"--compile-mode {self.compile_mode} needs --compile; add it, or leave both out"
            )


def default(name: str, value: Any) -> Any:
    """Declare an option of every run with another default, which suits a method."""
    shared = RunConfig.__dataclass_fields__[name].metadata
    return option(value, shared["help"], shared["choices"])


# What suits small images: ResNet-18 as on CIFAR, after Un-Mix (Shen et al.), on which the paper's
# CIFAR-100 rows build.
_CIFAR = {
    "arch": "resnet18", "small_stem": True, "image_size": 32, "grid_size": 2,
    "min_scale": 0.08, "blur": 0.0, "batch_size": 512, "weight_decay": 5e-4, "epochs": 1000,
}  # fmt: skip
_IMAGENETTE = {"arch": "resnet18", "image_size": 128, "batch_size": 256, "weight_decay": 5e-4}

# Options that suit a data set better than the defaults, which are ImageNet's, in every method.
PRESETS: dict[str, dict[str, Any]] = {
    "clothing64": {
        "arch": "narrow", "image_size": 32, "grid_size": 2, "min_scale": 0.4, "jitter": 0.6,
        "hue": 0.15, "grey": 0.5, "blur": 0.0, "epochs": 28, "batch_size": 64, "warmup": 0.05,
        "weight_decay": 5e-4,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": {**_CIFAR, "image_size": 64, "grid_size": 4},
    "stl10": {**_CIFAR, "image_size": 64, "grid_size": 4, "epochs": 200, "small_stem": False},
    "imagenette": {**_IMAGENETTE, "grid_size": 8, "epochs": 800},
    "imagenet100": {"arch": "resnet18", "batch_size": 256, "epochs": 400},
    "imagenet": {},
}  # fmt: skip


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuse an option outside of its range, naming its flag."""
    if not low <= value <= high:
        bounds = f"at least {low}" if high == float("inf") else f"within {low} ... {high}"
        raise ValueError(f"{_flag(name)} must be {bounds}, got {value}")


def check_over_zero(name: str, value: float) -> None:
    """Refuse an option that is not positive."""
    if not value > 0:
        raise ValueError(f"{_flag(name)} must be positive, got {value}")
