"""Data sets of one's own: any map-style `Dataset`, from Python or named on the command line."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mixmask._devices import is_out_of_memory
from mixmask.data.images import Picture, is_deep, read_deep
from mixmask.data.views import check_pixels

# Where items that are mappings keep image and label, as Hugging Face and webdataset name them.
_IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_KEYS = ("label", "labels", "target", "fine_label", "cls")

# Names of splits, without case. Some come in numbered pieces, as ImageNet-100 in train.X1,
# train.X2, ... and val.X. Of several test splits, the first one with labels counts.
_TRAIN, _TESTS = "train(ing)?", ("test(ing)?", "val(id|idation)?", "dev", "eval(uation)?")
_PIECE = r"(\.x\d*|[-_. ]?\d{1,2})?"

_FILES = 'files = sorted(glob.glob("{folder}/**/{name}", recursive=True))'
# How files that are not images become a data set, in the body of a function: of one file by its
# ending, of a folder of them by a pattern.
_READERS = {
    ".npz": 'import numpy; return numpy.load("{file}")["images"]',
    "*.npz": f"import glob, numpy; {_FILES};"
    ' return numpy.concatenate([numpy.load(file)["images"] for file in files])',
    ".npy": 'import numpy; return numpy.load("{file}", mmap_mode="r")',
    "*.npy": f"import glob, numpy; {_FILES}; return [*map(numpy.load, files)]",
    ".h5": 'import h5py; return h5py.File("{file}")["images"][:]',
    "*.h5": f"import glob, h5py, numpy; {_FILES};"
    ' return numpy.concatenate([h5py.File(file)["images"] for file in files])',
    ".parquet": 'import datasets; return datasets.load_dataset("parquet", data_files="{file}",'
    ' split="train")',
    ".tar": 'import datasets; return datasets.load_dataset("webdataset", data_files="{file}",'
    ' split="train")',
    ".tif": f"import glob, tifffile; {_FILES};"
    " images = [*map(tifffile.imread, files)]; top = max(x.max() for x in images);"
    " return [x / top for x in images]",
}
_READERS |= {".hdf5": _READERS[".h5"], "*.hdf5": _READERS["*.h5"]}
_READERS |= {".tgz": _READERS[".tar"], ".tiff": _READERS[".tif"]}


class MapDataset(Protocol):
    """What `torch.utils.data.Dataset`, a list and an array have in common."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...  # Items are what their author returns.


def describe_door(file: Path) -> str:
    """Return how a file or a folder of such files is passed as a data set; empty if unknown.

    Example:
        >>> describe_door(Path("x.npz"))
        'in mydata.py, write `def load(): import numpy; return numpy.load("x.npz")["images"]` and
        pass --data mydata:load'
    """
    code = _READERS.get(file.name.lower()) or _READERS.get(file.suffix.lower())
    if code is None:
        return ""
    body = code.format(file=file.as_posix(), folder=file.parent.as_posix(), name=file.name)
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
    with _explain_errors(f"--data {name} cannot be imported"):
        load = getattr(importlib.import_module(module), function)
    try:
        inspect.signature(load).bind()
    except TypeError as error:  # It cannot be called, or not like this.
        raise ValueError(
            f"--data {name} must name a function without arguments, got {load!r:.60} ({error}); "
            "write one that returns the data set"
        ) from None
    with _explain_errors(f"--data {name} failed"):
        return load()


@contextmanager
def _explain_errors(problem: str) -> Iterator[None]:
    """Turn whatever code of the user's raises into a ValueError of one line that says where."""
    try:
        yield
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # A script's own end is not that of the command.
        if is_out_of_memory(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f" in {place.filename}, line {place.lineno}"
        if place.filename.startswith((__file__, "<")):  # Not in the user's code.
            where = ""
        raise ValueError(f"{problem}: {type(error).__name__}: {error}{where}") from error


def take_splits(made: Any) -> tuple[MapDataset, dict[str, MapDataset]]:
    """Return the training data set out of what a function returned, and test ones by their names.

    Args:
        made: A data set, a tuple of both, or a mapping, as Hugging Face's DatasetDict is. Of
            numbered pieces of a split, all are joined. The test split that is meant comes first.

    Raises:
        ValueError: If it is something else, or has no training split.
    """
    if isinstance(made, Mapping):
        trains, tests = find_splits(made)
        if not trains:
            raise ValueError(
                f"data has the splits {', '.join(map(str, made)) or 'none'}; call the training "
                "split train, and one to test on test or validation"
            )
        joined = [_join([made[name] for name in names]) for names in (trains, *tests)]
    else:
        joined = list(made) if isinstance(made, tuple) else [made]
        tests = [["test"]] if len(joined) == 2 else []
    needed = ("__len__", "__getitem__")
    parts = joined if len(joined) == 1 + len(tests) else []
    if not parts or not all(
        hasattr(p, name) and not isinstance(p, type) for p in parts for name in needed
    ):
        kinds = ", ".join(type(part).__name__ for part in joined) or "nothing"
        raise ValueError(
            "data must be a data set with __len__ and __getitem__, or a training and a test one, "
            f"got {kinds}; streaming data sets are not supported; load them fully"
        )
    return parts[0], {names[0]: part for names, part in zip(tests, parts[1:], strict=True)}


def _join(pieces: list[MapDataset]) -> MapDataset:
    return pieces[0] if len(pieces) == 1 else ConcatDataset(cast("list[Dataset[Any]]", pieces))


def find_splits(names: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the training split's pieces, and those of each test split, best first.

    Example:
        >>> find_splits(["Validation", "train.X2", "dogs", "train.X1"])
        (['train.X1', 'train.X2'], [['Validation']])
    """
    ordered = sorted(map(str, names))
    train, *tests = (
        [name for name in ordered if re.fullmatch(split + _PIECE, name, re.IGNORECASE)]
        for split in (_TRAIN, *_TESTS)
    )
    return train, [pieces for pieces in tests if pieces]


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
        looked = [
            _to_tensor(_read_item(dataset, i), i) for i in range(0, count, max(1, count // 4))
        ]
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
            ValueError: If it is unlike the others, or the data set fails to return it.
        """
        image, _ = item = _read_item(self.dataset, self.indices[number])
        plain = isinstance(image, Image.Image) and min(image.size) > 0
        if plain and (self.channels, self.dtype) == (3, torch.uint8):
            yield image
            return
        tensor = _to_tensor(item, self.indices[number])
        if (len(tensor), tensor.dtype) != (self.channels, self.dtype):
            raise ValueError(
                f"{self.name(number)} has {len(tensor)} channels of {tensor.dtype}, others have "
                f"{self.channels} of {self.dtype}; return the same for all"
            )
        yield tensor

    def labels(self) -> Tensor | None:
        """Return the labels (N,) int64 of the whole data set, or None if items have none.

        An attribute `targets` and a column of a Hugging Face data set are read at once, otherwise
        every item is.

        Raises:
            ValueError: If they are not integers.
        """
        found = getattr(self.dataset, "targets", None)
        for key in getattr(self.dataset, "column_names", None) or ():
            if key in _LABEL_KEYS:
                found = self.dataset[key]
        if found is None and _read_item(self.dataset, 0)[1] is not None:
            found = [_read_item(self.dataset, i)[1] for i in range(len(self.dataset))]
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
        named = getattr(self.dataset, "classes", None)
        features = getattr(self.dataset, "features", None) or {}
        for key in _LABEL_KEYS:  # Hugging Face's ClassLabel.
            named = named or getattr(features.get(key), "names", None)
        return tuple(map(str, named or range(count)))


def _read_item(dataset: MapDataset, number: int) -> tuple[Any, Any]:
    """Return image and label of an item, which is None where there is none."""
    with _explain_errors(f"image {number} cannot be read"):
        item = dataset[number]
    if isinstance(item, Mapping):
        image, label = (
            next((item[key] for key in keys if key in item), None)
            for keys in (_IMAGE_KEYS, _LABEL_KEYS)
        )
        return (item if image is None else image), label
    if isinstance(item, (tuple, list)) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _to_tensor(item: tuple[Any, Any], number: int) -> Tensor:
    """Return an item's image, of any form, as (C, H, W), uint8 or float32."""
    image, _ = item
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
        value = f"of shape {tuple(image.shape)}" if hasattr(image, "shape") else f"{image!r:.60}"
        raise TypeError(
            f"image {number} must be a tensor (C, H, W), an array (H, W) or (H, W, C), or a PIL "
            f"image, got {type(image).__name__} {value}; convert it in __getitem__"
        )
    image = image.detach()  # The squares and crops of all are written into one tensor.
    check_pixels(image[None], f"image {number}")
    return image.float() if image.is_floating_point() else image
