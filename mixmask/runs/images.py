"""The images of a run: loaded, held out, and compared with those that it was started on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixmask._checks import few
from mixmask.data.datasets import is_function
from mixmask.data.sets import ImageData, hold_out, load_data
from mixmask.runs.options import Options
from mixmask.runs.records import plural


def load_images(
    config: Options,
    image_size: int,
    *,
    data: Any = None,
    stream: str = "auto",
    where: str = "the run",
) -> ImageData:
    """Load the images of a run, and compare them with those that it was started on.

    Args:
        config: The content of its `config.json`, or the options of a new run.
        image_size: Size of the views, in pixels; see `load_data`.
        data: Where its images are now, or a data set. Default: where they were.
        stream: See `load_data`.
        where: The run's name in errors.

    Raises:
        ValueError: If they are others: the number of images, the classes, the names of the files
            or the labels differ.
        OSError: If nothing in it can be read.

    Example:
        >>> load_images({"data": "clothing64"}, 32).test.labels.shape
        torch.Size([372])
    """
    name = config["data"] if data is None else data
    images = load_data(name, image_size, stream=stream)
    if share := config.get("holdout", 0.0):
        try:
            images = hold_out(images, share)
        except ValueError as error:
            raise ValueError(f"--holdout {share}: {error}") from None
    check_same(images, config, name, image_size=image_size, where=where)
    return images


def check_code(data: str, where: Path | str) -> None:
    """Refuse data of a run's `config.json` that are code, which the user has not named."""
    # A run folder may come from anywhere, and a function that it names would be called.
    if is_function(data):
        raise ValueError(
            f"the data of {where} come from code, {data}, which is not run because a file names "
            f"it; if you trust it, repeat the command with --data {data}"
        )


def check_same(
    images: ImageData, config: Options, name: object, *, image_size: int, where: str
) -> None:
    """Check that images, which came from `name`, are those of a run; see `load_images`.

    Raises:
        ValueError: If they are others.
    """
    # A run that was started without `pretrain` may have no fingerprint to compare.
    if (known := config.get("fingerprint")) is None:
        return
    found = images.fingerprint()
    if not images.train.files and image_size != config.get("image_size"):
        known = known | {"sum": found["sum"]}  # Of images at another size.
    if differences := _compare(known, found):
        shown = name if isinstance(name, str) else "the data set"
        raise ValueError(
            f"{shown} does not hold the images that {where} was started on: "
            f"{'; '.join(differences)}; pass their location with --data"
        )


def _compare(known: Options, found: Options) -> list[str]:
    """Say what two fingerprints differ in."""
    names = [name for name in found if found[name] != known.get(name)]
    different = [
        f"{plural(found[split], noun)} instead of {known.get(split)}"
        for split, noun in (("train", "training image"), ("test", "test image"))
        if split in names
    ]
    if "classes" in names:
        before = known.get("classes")  # In a file that may have been edited.
        shown = few(before) if isinstance(before, list) and before else "none"
        different.append(f"classes {few(found['classes']) or 'none'} instead of {shown}")
    if names and not different:
        more = "of other names or content" if "sum" in names else "with other labels"
        different.append(f"as many, but {more}")
    return different
