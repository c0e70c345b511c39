"""The named recipes: where their settings come from, and what others have got with them."""

from __future__ import annotations

from mixmask._distributed import world_size
from mixmask.data.sets import DataListing
from mixmask.runs.options import Options
from mixmask.trainers.config import PRESETS, RunConfig
from mixmask.trainers.methods import option_defaults

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

# The recipe of one's own images: by their shorter side, at most so many pixels, and for larger
# ones by their number.
_BY_SIDE = {48: "cifar10", 96: "tiny-imagenet"}
_BY_COUNT = {50_000: "imagenette", 500_000: "imagenet100"}

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
        lines += [
            name,
            f"  settings: {settings or 'the defaults'}",
            f"  source: {_ORIGINS.get(name, 'none stated')}",
        ]
        lines += [
            f"  published: {accuracy} % with --method {words} ({measure}; {source})"
            for (measure, source), accuracies in PUBLISHED.get(name, {}).items()
            for words, accuracy in accuracies.items()
        ]
    return "\n".join(lines)


def suit_images(options: Options, listing: DataListing) -> Options:
    """Choose a recipe for images that come without one, and batch and queue that they fill.

    What was given stays. A batch smaller than the recipe's lowers its learning rate in proportion.

    Args:
        options: What the user has given. What is wrong in it is left to `make_config`.
        listing: The images.

    Returns:
        The same, with what was chosen.
    """
    method, holdout = options.get("method", RunConfig.method), options.get("holdout", 0)
    if not (isinstance(method, str) and isinstance(holdout, (int, float)) and 0 <= holdout < 1):
        return options
    count = int(len(listing.train.files) * (1 - holdout))
    by_side = (name for most, name in _BY_SIDE.items() if listing.side <= most)
    by_count = (name for most, name in _BY_COUNT.items() if count < most)
    recipe = next(by_side, next(by_count, "imagenet"))
    chosen: Options = {"recipe": recipe}
    defaults = option_defaults(method, recipe)
    # Some steps in each epoch, of batches that each process has.
    fit = max(2, _power_of_two(count // (4 * world_size())))
    if (
        defaults
        and not {"accumulate", "batch_size"} & set(options)
        and fit < defaults["batch_size"]
    ):
        chosen["batch_size"] = fit
    settings = defaults | chosen | options
    known = [settings.get(name) for name in ("batch_size", "accumulate", "queue_size", "bn_splits")]
    batch, parts, queue, splits = (n if isinstance(n, int) and n > 0 else 1 for n in known)
    if defaults and batch < defaults["batch_size"]:
        chosen["lr"] = defaults["lr"] * batch / defaults["batch_size"]
    if "queue_size" in defaults and "queue_size" not in options and queue > count:
        chosen["queue_size"] = suit_queue(count, batch)
    if "bn_splits" in defaults and "bn_splits" not in options:  # Parts of two images at least.
        part = batch // parts
        fitting = (n for n in range(splits, 1, -1) if part % n == 0 and part >= 2 * n)
        chosen["bn_splits"] = next(fitting, 1)
    return chosen | options


def suit_queue(count: int, batch_size: int) -> int:
    """Return the largest queue that holds about half of the images once, and a batch at least.

    Example:
        >>> suit_queue(3409, 64), suit_queue(50, 64)
        (1024, 64)
    """
    return max(batch_size, _power_of_two(count // 2))


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)
