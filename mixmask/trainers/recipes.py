"""The named recipes: where their settings come from, and what others have got with them."""

from __future__ import annotations

from mixmask.trainers.config import PRESETS

# What a recipe's settings follow.
_ORIGINS: dict[str, str] = {
    "clothing64": "our own trials: minutes on two CPU cores",
    "cifar10": "Un-Mix's code (Shen et al.); SimCLR appendix B.9; SimSiam appendix D",
    "cifar100": "Un-Mix's code (Shen et al.), on which the paper's rows build",
    "tiny-imagenet": "as cifar100, at 64 px with grid 4 (MixMask, section 4.1)",
    "stl10": "as cifar100, at 64 px with grid 4; no published run",
    "imagenette": "lightly's benchmark: ResNet-18, 128 px, batch 256, 800 epochs",
    "imagenet100": "ImageNet's settings on a ResNet-18, 400 epochs; no published run",
    "imagenet": "the authors' code (MoCo); the methods' papers (others)",
}


# What others have published: recipe -> (measure, source) -> method and options beside the recipe's
# -> accuracy in percent.
PUBLISHED: dict[str, dict[tuple[str, str], dict[str, float]]] = {
    "cifar10": {
        ("kNN", "Un-Mix's code"): {
            "moco-v2 --mix none --symmetric": 90.49, "moco-v2 --mix none": 89.11,
            "moco-v2 --mix unmix --symmetric": 92.25, "moco-v2 --mix unmix": 91.34,
        },
    },
    "cifar100": {
        ("kNN", "Un-Mix's code"): {
            "moco-v2 --mix none --symmetric": 65.49, "moco-v2 --mix none": 63.64,
            "moco-v2 --mix unmix --symmetric": 68.83, "moco-v2 --mix unmix": 67.33,
        },
        ("kNN", "MixMask, table 1"): {"moco-v2 --mix mixmask --pattern discrete": 68.1},
        ("online linear", "solo-learn's results"): {
            "simclr --mix none": 65.78, "byol --mix none": 70.46, "simsiam --mix none": 66.04,
            "barlow-twins --mix none": 70.90,
        },
    },
    "tiny-imagenet": {("kNN", "MixMask, table 1"): {"moco-v2 --mix mixmask": 47.4}},
    "imagenette": {
        ("kNN", "lightly's benchmark"): {
            "moco-v2 --mix none": 87.4, "simclr --mix none": 88.9, "byol --mix none": 88.7,
            "simsiam --mix none": 87.2, "swav --mix none": 90.2,
        },
    },
    "imagenet": {
        ("linear", "the authors' code"): {
            "moco-v2 --mix none": 67.7, "moco-v2 --mix mixmask": 69.2, "moco-v2 --mix both": 69.5,
        },
    },
}  # fmt: skip

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
        lines += [name, f"  settings: {settings or 'the defaults'}", f"  source: {_ORIGINS[name]}"]
        lines += [
            f"  published: {accuracy} % with --method {words} ({measure}; {source})"
            for (measure, source), accuracies in PUBLISHED.get(name, {}).items()
            for words, accuracy in accuracies.items()
        ]
    return "\n".join(lines)
