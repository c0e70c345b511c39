"""Data sets by name: clothing64, which is embedded, and those that torchvision downloads."""

import io
from collections.abc import Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.error import URLError
from zipfile import ZipFile

import torch
from torch import Tensor

__all__ = ["NAMED", "clothing64", "decode_jpegs", "load_named"]

# torchvision's class, and what selects its training and its test split. STL-10: pretraining on
# its 105,000 training and unlabelled images, as its authors mean it.
_TORCHVISION: dict[str, tuple[str, tuple[dict[str, object], dict[str, object]]]] = {
    "cifar10": ("CIFAR10", ({"train": True}, {"train": False})),
    "cifar100": ("CIFAR100", ({"train": True}, {"train": False})),
    "stl10": ("STL10", ({"split": "train+unlabeled"}, {"split": "test"})),
}
NAMED = ("clothing64", *_TORCHVISION)

Files = tuple[list[bytes], list[int]]
Arrays = tuple[Tensor, Tensor]


def clothing64() -> tuple[Files, Files, list[str]]:
    """Read the embedded photographs, 3,781 of clothes at 64 x 64 pixels (CC0), as JPEG bytes.

    Returns:
        The training split (3,409 files and labels), the test split (372), and the ten class
        names, which the labels index.

    Example:
        >>> (train, _), (test, _), classes = clothing64()
        >>> len(train), len(test), classes[:3]
        (3409, 372, ['dress', 'hat', 'longsleeve'])
    """
    with as_file(files("mixmask.data") / "clothing64.zip") as path, ZipFile(path) as archive:
        names = sorted(archive.namelist())
        classes = sorted({name.split("/")[2] for name in names})
        splits: dict[str, Files] = {"train": ([], []), "test": ([], [])}
        for name in names:
            _, split, label, _ = name.split("/")
            splits[split][0].append(archive.read(name))
            splits[split][1].append(classes.index(label))
    return splits["train"], splits["test"], classes


def load_named(name: str, root: Path | None) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Read one of `NAMED`: images (N, 3, H, W) uint8 and labels (N,) int64, train and test.

    Args:
        name: Which one.
        root: Where torchvision keeps its downloads. Default: ~/.cache/mixmask.
    """
    if name == "clothing64":
        (train, labels), (test, test_labels), classes = clothing64()
        pairs = (train, labels), (test, test_labels)
        splits = [(decode_jpegs(files), torch.tensor(numbers)) for files, numbers in pairs]
        return splits[0], splits[1], tuple(classes)
    import torchvision

    # torchvision downloads only what is not there yet.
    dataset, selections = _TORCHVISION[name]
    folder = root or Path.home() / ".cache" / "mixmask"
    try:
        train, test = (
            getattr(torchvision.datasets, dataset)(folder, download=True, **selection)
            for selection in selections
        )
    except URLError as error:
        raise OSError(
            f"--data {name} could not be downloaded ({error.reason}); put the files that "
            f"torchvision has of {dataset} into {folder}, or go online once"
        ) from error
    return _take_arrays(train), _take_arrays(test), tuple(train.classes)


def decode_jpegs(jpegs: Iterable[bytes]) -> Tensor:
    """Decode images of one size: (N, 3, H, W) uint8."""
    # Here, since the examples run without Pillow, on noise.
    import numpy as np
    from PIL import Image

    images = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # (N, 3, H, W)


def _take_arrays(dataset: Any) -> Arrays:
    """Take the arrays of one of torchvision's data sets, which name and shape them in two ways."""
    images = torch.from_numpy(dataset.data)
    if images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()  # (N, 3, H, W)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return images, torch.as_tensor(labels).long()
