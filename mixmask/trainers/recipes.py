"""The named recipes: where their settings come from, and what others have got with them."""

from __future__ import annotations

from typing import NamedTuple

from mixmask.trainers.config import PRESETS

# What a recipe's settings follow.
SOURCES: dict[str, str] = {
    "clothing64": "our own trials: minutes on two CPU cores",
    "cifar10": "Un-Mix's code (Shen et al.); SimCLR appendix B.9; SimSiam appendix D",
    "cifar100": "Un-Mix's code (Shen et al.), on which the paper's rows build",
    "tiny-imagenet": "as cifar100, at 64 px with grid 4 (MixMask, section 4.1)",
    "stl10": "as cifar100, at 64 px with grid 4; no published run",
    "imagenette": "lightly's benchmark: ResNet-18, 128 px, batch 256, 800 epochs",
    "imagenet100": "ImageNet's settings on a ResNet-18, 400 epochs; no published run",
    "imagenet": "the authors' code (MoCo); the methods' papers (others)",
}


class Expected(NamedTuple):
    """A published accuracy: of which options beside the recipe's, how measured, by whom."""

    method: str
    options: str
    accuracy: float
    measure: str
    source: str


_AUTHORS = "the authors' code"
_UNMIX = "Un-Mix's code"
_PAPER = "MixMask, table 1"
_LIGHTLY = "lightly's benchmark"
_SOLO = "solo-learn's results"

EXPECTED: dict[str, tuple[Expected, ...]] = {
    "cifar10": (
        Expected("moco-v2", "--mix none --symmetric", 90.49, "kNN", _UNMIX),
        Expected("moco-v2", "--mix none", 89.11, "kNN", _UNMIX),
        Expected("moco-v2", "--mix unmix --symmetric", 92.25, "kNN", _UNMIX),
        Expected("moco-v2", "--mix unmix", 91.34, "kNN", _UNMIX),
    ),
    "cifar100": (
        Expected("moco-v2", "--mix none --symmetric", 65.49, "kNN", _UNMIX),
        Expected("moco-v2", "--mix none", 63.64, "kNN", _UNMIX),
        Expected("moco-v2", "--mix unmix --symmetric", 68.83, "kNN", _UNMIX),
        Expected("moco-v2", "--mix unmix", 67.33, "kNN", _UNMIX),
        Expected("moco-v2", "--mix mixmask --pattern discrete", 68.1, "kNN", _PAPER),
        Expected("simclr", "--mix none", 65.78, "online linear", _SOLO),
        Expected("byol", "--mix none", 70.46, "online linear", _SOLO),
        Expected("simsiam", "--mix none", 66.04, "online linear", _SOLO),
        Expected("barlow-twins", "--mix none", 70.90, "online linear", _SOLO),
    ),
    "tiny-imagenet": (Expected("moco-v2", "--mix mixmask", 47.4, "kNN", _PAPER),),
    "imagenette": (
        Expected("moco-v2", "--mix none", 87.4, "kNN", _LIGHTLY),
        Expected("simclr", "--mix none", 88.9, "kNN", _LIGHTLY),
        Expected("byol", "--mix none", 88.7, "kNN", _LIGHTLY),
        Expected("simsiam", "--mix none", 87.2, "kNN", _LIGHTLY),
        Expected("swav", "--mix none", 90.2, "kNN", _LIGHTLY),
    ),
    "imagenet": (
        Expected("moco-v2", "--mix none", 67.7, "linear", _AUTHORS),
        Expected("moco-v2", "--mix mixmask", 69.2, "linear", _AUTHORS),
        Expected("moco-v2", "--mix both", 69.5, "linear", _AUTHORS),
    ),
}

_SHOWN = ("arch", "image_size", "grid_size", "batch_size", "epochs")


def describe() -> str:
    """Return all recipes as text: settings, their source, and published accuracies.

    Example:
        >>> "tiny-imagenet" in describe()
        True
    """
    lines = []
    for name, preset in PRESETS.items():
        settings = ", ".join(
            f"{key.replace('_', '-')} {preset[key]}" for key in _SHOWN if key in preset
        )
        lines += [name, f"  settings: {settings or 'the defaults'}", f"  source: {SOURCES[name]}"]
        lines += [
            f"  published: {e.accuracy} % with --method {e.method} {e.options} "
            f"({e.measure}; {e.source})"
            for e in EXPECTED.get(name, ())
        ]
    return "\n".join(lines)
