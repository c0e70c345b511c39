"""Data sets of one's own: any map-style `Dataset`, from Python or named on the command line."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mixmask.data.images import Picture, is_deep, read_deep
from mixmask.data.views import check_pixels

# Where items that are mappings keep image and label, as Hugging Face and webdataset name them.
_IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_KEYS = ("label", "labels", "target", "fine_label", "cls")

# Names of splits, without case; ImageNet-100 comes in parts, train.X1, train.X2 ... and val.X. The
# first test split with labels counts.
_TRAIN = r"train(ing)?(\.x\d*)?"
_TESTS = (r"test(ing)?", r"val(id|idation)?", r"dev", r"val\.x")

# How files that are not images become a data set, in the body of a function.
_READERS = {
    ".npz": 'import numpy; return numpy.load("{file}")["images"]',
    ".npy": 'import numpy; return numpy.load("{file}", mmap_mode="r")',
    ".h5": 'import h5py; return h5py.File("{file}")["images"][:]',
    ".parquet": 'import datasets; return datasets.load_dataset("parquet", data_files="{file}",'
    ' split="train")',
    ".tar": 'import datasets; return datasets.load_dataset("webdataset", data_files="{file}",'
    ' split="train")',
    ".tif": "import glob, numpy, tifffile; return [x / numpy.iinfo(x.dtype).max for x in"
    ' map(tifffile.imread, glob.glob("{file}"))]',
}
_READERS |= {".hdf5": _READERS[".h5"], ".tgz": _READERS[".tar"], ".tiff": _READERS[".tif"]}


class MapDataset(Protocol):
    """What `torch.utils.data.Dataset`, a list and an array have in common."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...  # Items are what their author returns.


def door(file: Path) -> str:
    """Return how a file or a folder of such files is passed as a data set; empty if unknown.

    Example:
        >>> door(Path("x.npz"))
        'in mydata.py, write `def load(): import numpy; return numpy.load("x.npz")["images"]` and
        pass --data mydata:load'
    """
    code = _READERS.get(file.suffix.lower())
    if code is None:
        return ""
    body = code.format(file=file.as_posix())
    return f"in mydata.py, write `def load(): {body}` and pass --data mydata:load"


def is_function(name: str) -> bool:
    """Return whether a name of data is that of a function, package.module:function."""
    return re.fullmatch(r"\w+(\.\w+)*:\w+", name) is not None and not Path(name).exists()


def call_function(name: str) -> Any:
    """Import and call package.module:function; modules of the current folder are found, too.

    Raises:
        ValueError: If there is no such function.
    """
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # For good: workers import it, too.
        sys.path.insert(0, here)
    try:
        load = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"--data {name} cannot be imported: {error}") from error
    return load()


def take_splits(made: Any) -> tuple[MapDataset, MapDataset | None]:
    """Return the training and the test data set out of what a function returned.

    Args:
        made: A data set, a tuple of both, or a mapping, as Hugging Face's DatasetDict is.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(made, Mapping):
        trains, tests = find_splits(made)
        made = tuple(made[key] for key in [*trains[:1], *tests[:1]])
    parts = made if isinstance(made, tuple) else (made,)
    needed = ("__len__", "__getitem__")
    if not 1 <= len(parts) <= 2 or not all(hasattr(p, name) for p in parts for name in needed):
        kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise ValueError(
            "data must be a data set with __len__ and __getitem__, or a training and a test one, "
            f"got {kinds}; a stream has no length: load it whole, or as a list"
        )
    return parts[0], parts[1] if len(parts) == 2 else None


def find_splits(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of training splits and, in the order of preference, of test splits.

    Example:
        >>> find_splits(["Validation", "Train", "dogs"])
        (['Train'], ['Validation'])
    """
    ordered = sorted(names)

    def matches(pattern: str) -> list[str]:
        return [name for name in ordered if re.fullmatch(pattern, name, re.IGNORECASE)]

    return matches(_TRAIN), [name for pattern in _TESTS for name in matches(pattern)]


@dataclass(frozen=True)
class DatasetImages:
    """The images of a map-style data set, whatever their form.

    Attributes:
        dataset: Its items are images, or sequences or mappings that hold image and label. An
            image is a tensor (C, H, W), an array (H, W) or (H, W, C), both of uint8 or of floats
            within [0, 1], or a PIL image.
        indices: Which of the items.
        channels: Of all images; 3 for PIL images of which some are grey and some coloured.
        dtype: Of all images: uint8 or float32.
    """

    dataset: MapDataset
    indices: Sequence[int]
    channels: int
    dtype: torch.dtype

    @classmethod
    def of(cls, dataset: MapDataset) -> DatasetImages:
        """Take all items, and look at a few for channels and type."""
        count = len(dataset)
        looked = [_to_tensor(dataset[i], i) for i in range(0, count, max(1, count // 4))]
        return cls(dataset, range(count), max(map(len, looked)), looked[0].dtype)

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, number: int) -> str:
        """Return what an image is called in messages."""
        return f"image {self.indices[number]}"

    def subset(self, numbers: Iterable[int]) -> DatasetImages:
        """Return some of the images."""
        return replace(self, indices=[self.indices[number] for number in numbers])

    @contextmanager
    def open(self, number: int) -> Iterator[Picture]:
        """Read an image, (C, H, W) or of PIL if it has colours.

        Raises:
            TypeError: If it is not an image.
            ValueError: If it is unlike the others.
        """
        item = self.dataset[self.indices[number]]
        image, _ = _split_item(item)
        if isinstance(image, Image.Image) and (self.channels, self.dtype) == (3, torch.uint8):
            yield image
            return
        tensor = _to_tensor(item, self.indices[number])
        if (len(tensor), tensor.dtype) != (self.channels, self.dtype):
            raise ValueError(
                f"{self.name(number)} has {len(tensor)} channels of {tensor.dtype}, others have "
                f"{self.channels} of {self.dtype}; return all alike"
            )
        yield tensor

    def labels(self) -> Tensor | None:
        """Return the labels (N,) int64 of the whole data set, or None if items have none.

        An attribute `targets` and a column of a Hugging Face data set are read at once, otherwise
        every item is.

        Raises:
            ValueError: If they are not integers.
        """
        found: Any = getattr(self.dataset, "targets", None)
        for key in getattr(self.dataset, "column_names", None) or ():
            if key in _LABEL_KEYS:
                found = self.dataset[key]
        if found is None and _split_item(self.dataset[0])[1] is not None:
            found = [_split_item(self.dataset[i])[1] for i in range(len(self.dataset))]
        if found is None:
            return None
        labels = np.asarray(found)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be integers, got {found[0]!r}; number the classes")
        if len(labels) != len(self.dataset):
            raise ValueError(f"there are {len(labels)} labels for {len(self.dataset)} images")
        return torch.from_numpy(labels.astype(np.int64))

    def classes(self, count: int) -> tuple[str, ...]:
        """Return the names of the classes, or their numbers where they have none."""
        named: Any = getattr(self.dataset, "classes", None)
        features = getattr(self.dataset, "features", None) or {}
        for key in _LABEL_KEYS:  # Hugging Face's ClassLabel.
            named = named or getattr(features.get(key), "names", None)
        return tuple(map(str, named or range(count)))


def _to_tensor(item: Any, number: int) -> Tensor:
    """Return an item's image, of any form, as (C, H, W), uint8 or float32."""
    image, _ = _split_item(item)
    if isinstance(image, Image.Image):
        if is_deep(image):
            return read_deep(image)
        grey = image.mode in ("1", "L", "LA")
        # (H, W) or (H, W, 3)
        image = np.array(ImageOps.exif_transpose(image).convert("L" if grey else "RGB"))
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        # A copy: torch takes neither read-only arrays nor flipped ones.
        image = torch.from_numpy(np.atleast_3d(np.array(image, order="C"))).permute(2, 0, 1)  # CHW
    if not isinstance(image, Tensor) or image.ndim != 3:
        shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise TypeError(
            f"image {number} must be a tensor (C, H, W), an array (H, W) or (H, W, C), or a PIL "
            f"image, got {type(image).__name__}{shape}; convert it in __getitem__"
        )
    check_pixels(image[None], f"image {number}")
    return image.float() if image.is_floating_point() else image


def _split_item(item: Any) -> tuple[Any, Any]:
    """Return image and label, which is None where there is none."""
    if isinstance(item, Mapping):
        found = [[item[key] for key in keys if key in item] for keys in (_IMAGE_KEYS, _LABEL_KEYS)]
        image, label = (values[0] if values else None for values in found)
        return image, label
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None
