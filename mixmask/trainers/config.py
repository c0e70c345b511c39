"""Options of a run: frozen dataclasses, from which the command line and the README derive."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mixmask import masks
from mixmask._blocks import LARGEST_GRID
from mixmask._checks import Ratio
from mixmask.data.named import NAMED
from mixmask.runs.options import (
    HELP,
    Options,
    Value,
    check_options,
    check_range,
    option,
    share,
)

TIMM = "timm"  # Of --init.
PATTERNS = tuple(masks.PATTERNS)
MIXTURES = ("none", "mixmask", "unmix", "both", "erase", "mixup", "cutmix")


# The groups of `--help`: each begins with the option that is named first. A method's own options
# belong to the group of the method.
GROUPS = {
    "data": "data", "image_size": "views", "mix": "mixing", "method": "method",
    "epochs": "optimiser", "precision": "run",
}  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """What every method needs: data, views, mixing, backbone, optimiser, device."""

    data: str = option(
        "clothing64",
        f"{', '.join(NAMED)}, a folder of images, a .zip file of such a folder, or "
        "package.module:function",
    )
    recipe: str = option(
        "", "named settings [those of --data; for your own images by number and size]"
    )
    stream: str = option(
        "auto",
        "whether a folder's images stay on disk and are decoded in each epoch; auto: if they do "
        "not fit into memory",
        ("auto", "always", "never"),
    )
    workers: int = option(0, f"{HELP['workers']}; 0 = CPU cores - 1, at most 16", low=0)

    holdout: float = option(
        0.0,
        "share of each class held out as the test split, for labelled images without one",
        low=0,
        high=0.9,
    )

    image_size: int = option(224, "height and width of the views in pixels", low=1)
    channels: int = option(3, "channels of the images; taken from the data", low=1)
    min_scale: float = share(0.2, "smallest share of an image's area that a crop takes")
    jitter: float = share(0.4, "strength of brightness, contrast and saturation jitter")
    hue: float = option(0.1, "strength of hue jitter", low=0, high=0.5)
    grey: float = share(0.2, "probability of a grey view")
    blur: float = share(0.5, "probability of a blurred view")

    mix: str = option("mixmask", "how the mixed view is made", MIXTURES)
    grid_size: int = option(8, "mask cells per side")
    ratio: Ratio = option(  # noqa: RUF009
        0.5, "share of an image's own pixels; two numbers for a range", ratio=True
    )
    pattern: str = option("block", "pattern of the mask", PATTERNS)
    per_sample: bool = option(False, "one mask per sample instead of one per batch")
    roll: bool = option(False, "shift block masks at random, so that all places are equally likely")
    switch: bool = option(True, "add the partner's term with weight 1 - λ")
    alpha: float = option(1.0, "Beta parameter of λ in mixup and CutMix", positive=True)
    global_share: float = share(0.5, "share of steps in which Un-Mix applies mixup, not CutMix")
    channel_share: float = share(0.0, "share of steps where erase masks channels separately (MSCN)")
    extra_crops: int = option(0, "additional views per image, mixed or erased too (MSCN: 2)", low=0)
    mixed_size: int = option(0, "height and width of the mixed views; 0 = --image-size", low=0)
    mix_every: int = option(1, "mix views in every N-th step", low=1)
    replace_clean: bool = option(False, "replace the clean queries by the mixed views")

    method: str = option("moco-v2", "training method")
    arch: str = option("resnet50", HELP["arch"])
    small_stem: bool = option(False, HELP["small_stem"])

    init: str = option(
        "",
        "what the backbone starts from: a checkpoint in any layout that export reads, or timm, for "
        "its pretrained weights of --arch",
    )

    epochs: int = option(200, "passes over the data", low=1)
    batch_size: int = option(256, "batch size per process", low=2)
    optimizer: str = option("sgd", "optimiser", ("sgd", "lars", "adamw"))
    lr: float = option(0.03, "initial learning rate, for this batch size", positive=True)
    warmup: float = share(0.0, "share of the run in which the learning rate rises")
    schedule: str = option("cosine", "schedule of the learning rate", ("cosine", "step"))
    weight_decay: float = option(1e-4, HELP["weight_decay"], low=0)
    sgd_momentum: float = share(0.9, "momentum of SGD and LARS")
    accumulate: int = option(1, "gradient accumulation: parts into which a batch is split", low=1)

    precision: str = option("fp32", "number format of the forward pass", ("fp32", "bf16", "fp16"))
    compile: bool = option(False, "compile the backbone")
    compile_mode: str = option(
        "default",
        "mode of torch.compile; reduce-overhead uses CUDA graphs, for small networks on a GPU",
        ("default", "reduce-overhead", "max-autotune"),
    )
    checkpointing: bool = option(False, "recompute activations in backward to save memory")
    sync_bn: bool = option(False, "batch-norm statistics over all processes (GPUs only)")
    save_every: int = option(
        0, "checkpoints within an epoch, besides that at its end: one in every N-th step", low=0
    )
    save_minutes: float = option(
        0.0,
        "checkpoints within an epoch: one when so many minutes have passed since the last one, "
        "besides those of --save-every",
        low=0,
    )
    keep: int = option(
        0, "checkpoints of past epochs to keep; the best one by kNN is kept too", low=0
    )
    measure_every: int = option(
        10, "epochs between measurements of kNN accuracy; 0 = only before and after the run", low=0
    )
    tracker: str = option(
        "none", "where metrics go, besides metrics.csv", ("none", "tensorboard", "wandb")
    )
    seed: int = option(0, HELP["seed"], low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        """Check all options.

        Raises:
            TypeError: If an option has another type.
            ValueError: If an option is out of range, or contradicts another one.
        """
        if not isinstance(self.data, str):
            raise TypeError(
                "--data must be the name of a data set, a path or package.module:function, got "
                f"{type(self.data).__name__}; pass a data set to `mixmask.trainers.pretrain`, or "
                "write a function that returns it"
            )
        check_options(self)
        size, blocks = self.mixed_size or self.image_size, self.pattern == "block"
        check_range("grid_size", self.grid_size, 2, min(size, LARGEST_GRID) if blocks else size)
        if self.roll and not blocks:
            raise ValueError("--roll needs --pattern block; leave one of them out")
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"--accumulate must divide --batch-size into parts of at least 2, got "
                f"{self.accumulate} and {self.batch_size}; use for instance 1"
            )
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(
                f"--compile-mode {self.compile_mode} needs --compile; add it, or leave both out"
            )


def default(name: str, value: Value) -> Value:
    """Declare an option of every run again, with a default that suits a method."""
    shared = RunConfig.__dataclass_fields__[name].metadata
    return dataclasses.field(default=value, metadata=shared)


@dataclass(frozen=True)
class LargeBatchConfig(RunConfig):
    """SimCLR's settings on ImageNet (appendix B.6), from which those of other methods differ."""

    optimizer: str = default("optimizer", "lars")
    batch_size: int = default("batch_size", 4096)
    lr: float = default("lr", 4.8)
    warmup: float = default("warmup", 0.1)
    weight_decay: float = default("weight_decay", 1e-6)
    epochs: int = default("epochs", 100)


# Recipes that take the same options in a method: small images, and parts of ImageNet.
SMALL_IMAGES = ("cifar10", "cifar100", "tiny-imagenet", "stl10")
IMAGENET_PARTS = ("imagenette", "imagenet100")


def presets(recipes: tuple[str, ...], **options: object) -> dict[str, Options]:
    """Return the same options for several recipes."""
    return dict.fromkeys(recipes, options)


# What suits small images: ResNet-18 as on CIFAR, after Un-Mix (Shen et al.), on which the paper's
# CIFAR-100 rows build.
_CIFAR = {
    "arch": "resnet18", "small_stem": True, "image_size": 32, "grid_size": 2,
    "min_scale": 0.08, "blur": 0.0, "batch_size": 512, "weight_decay": 5e-4, "epochs": 1000,
}  # fmt: skip
_IMAGENETTE = {"arch": "resnet18", "image_size": 128, "batch_size": 256, "weight_decay": 5e-4}

# Options that suit a data set better than the defaults, which are ImageNet's, in every method.
PRESETS: dict[str, Options] = {
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
