"""The function on the command line, and what is told to those who need one."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_images import constants, first_pixels, labels_of

from mixmask.data.datasets import call_function, describe_door, take_splits
from mixmask.data.sets import load_data

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write a module into the current folder, which is not on the path of imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])

    def write(text: str) -> None:
        __import__("sys").modules.pop("mydata", None)
        (tmp_path / "mydata.py").write_text(text)

    return write


def test_a_function_from_the_current_folder(module: Callable[[str], None]) -> None:
    module(
        "import torch\n"
        "def images(): return torch.zeros(3, 1, 9, 9)\n"
        "def both(): return images(), images()[:2]\n"
        "def named(): return {'dev': images()[:2], 'TRAIN': images(), 'test': images()[:1]}\n"
        "def nothing(): return None\n"
    )
    data = load_data("mydata:images", 8)
    assert (data.train.images.shape, data.test) == ((3, 1, 9, 9), None)
    for name, lengths in (("both", {"test": 2}), ("named", {"test": 1, "dev": 2})):
        train, tests = take_splits(call_function(f"mydata:{name}"))
        assert len(train) == 3
        assert {split: len(part) for split, part in tests.items()} == lengths
    splits = {"train": list(constants([1, 2])), "validation": list(constants([3]))}
    validation = load_data(splits, 7).test
    assert validation is not None
    assert first_pixels(validation.images).tolist() == [3]
    with pytest.raises(ValueError, match=r"data must be a data set .*, got NoneType"):
        load_data("mydata:nothing", 8)
    with pytest.raises(ValueError, match=r"--data mydata:none cannot be imported: .*'none'"):
        load_data("mydata:none", 8)
    with pytest.raises(ValueError, match="No module named 'nobodys'"):
        load_data("nobodys.module:function", 8)


@pytest.mark.parametrize("kind", ["npz", "h5", "parquet", "tar"])
def test_other_kinds_of_files_are_pointed_to_a_function(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"photographs.{kind}"
    file.touch()
    message = rf"in mydata.py, write `def load\(\): .*photographs.{kind}.* --data mydata:load"
    with pytest.raises(ValueError, match=message):
        load_data(str(file), 32)
    with pytest.raises(ValueError, match=rf"no images that Pillow reads; .*\*.{kind}.* --data my"):
        load_data(str(tmp_path), 32)


def test_the_advice_for_npz_works(module: Callable[[str], None]) -> None:
    np.savez("photographs.npz", images=np.arange(3, dtype=np.uint8)[:, None, None].repeat(9, 1))
    with pytest.raises(ValueError, match="mydata:load") as caught:
        load_data("photographs.npz", 8)
    (code,) = re.findall("`(.*)`", str(caught.value))
    module(code)
    np.savez("photographs.npz", images=np.full((3, 9, 9), 7, np.uint8))
    assert first_pixels(load_data("mydata:load", 8).train.images).tolist() == [7, 7, 7]


def bands(count: int) -> bytes:
    """Return a TIFF file of 4 x 4 pixels and so many bands of 8 bits."""
    bits = struct.pack(f"<{count}H", *[8] * count)
    data = 8 + len(bits)
    tags = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, count, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, 1, data), (277, 3, 1, count), (278, 3, 1, 4), (279, 4, 1, 16 * count),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    start = struct.pack("<2sHI", b"II", 42, data + 16 * count)
    return start + bits + bytes(16 * count) + directory + bytes(4)


def test_multi_band_tiffs_are_pointed_to_a_function(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.tif").write_bytes(bands(5))
    message = r"2 images in a row cannot be read: .*0.tif.*tifffile.* pass --data mydata:load"
    with pytest.raises(OSError, match=message):
        load_data(str(tmp_path), 8)


def test_the_advice_for_tiffs_reads_them_from_class_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arrays = [np.full((4, 4, 5), value, np.float32) for value in (2, 8)]
    reader = SimpleNamespace(imread=lambda path: arrays[int(Path(path).stem)])
    monkeypatch.setitem(sys.modules, "tifffile", reader)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "a" / "b" / f"{i}.tif").touch()
    made = re.search("`(def load.*)`", describe_door(tmp_path / "*.tif"))
    assert made
    space: dict[str, Any] = {}
    exec(made[1], space)  # noqa: S102  # What a user would paste.
    assert [float(image.max()) for image in space["load"]()] == [0.25, 1.0]


@pytest.mark.parametrize("pattern, images", [("*.npz", 6), ("*.npy", 2), ("*.h5", 6)])
def test_the_advice_for_a_folder_of_arrays_reads_them_all(
    pattern: str, images: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=lambda path: np.load(path)))
    (tmp_path / "a").mkdir()
    for i in (1, 2):
        array = np.full((3, 4, 4), i, np.uint8)
        with (tmp_path / "a" / f"{i}{pattern[1:]}").open("wb") as file:
            np.save(file, array) if pattern == "*.npy" else np.savez(file, images=array)
    made = re.search("`(def load.*)`", describe_door(tmp_path / pattern))
    assert made
    space: dict[str, Any] = {}
    exec(made[1], space)  # noqa: S102  # What a user would paste.
    found = np.stack([*space["load"]()])
    assert len(found) == images
    assert set(found.flat) == {1, 2}


@pytest.mark.parametrize("mode, count", [("RGBA", 4), ("RGBX", 4), ("LA", 2)])
def test_a_further_band_of_a_tiff_is_no_transparency(mode: str, count: int, tmp_path: Path) -> None:
    image = Image.new(mode, (9, 9), (100, 150, 200, 30)[-count:])
    image.save(tmp_path / "a.tif")
    for name in "bc":  # Of PNG files it is.
        image.convert("RGBA").save(tmp_path / f"{name}.png")
    message = rf"it has {count} bands, .* pass --data mydata:load"
    with pytest.warns(UserWarning, match=message):
        assert len(load_data(str(tmp_path), 8).train.images) == 2
    for name in "bc":
        (tmp_path / f"{name}.png").unlink()
        image.save(tmp_path / f"{name}.tif")
    with pytest.raises(OSError, match=message):
        load_data(str(tmp_path), 8)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "P", "YCbCr", "1"])
def test_tiffs_without_further_bands_are_read(mode: str, tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (9, 9), (100, 150, 200)).convert(mode).save(tmp_path / f"{name}.tif")
    assert len(load_data(str(tmp_path), 8).train.images) == 2


def examples() -> list[str]:
    page = (ROOT / "mixmask" / "trainers" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return [example for example in found if "trainers import pretrain" not in example]


def test_the_documented_examples_run(module: Callable[[str], None], tmp_path: Path) -> None:
    npz, xrays = examples()
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(6, 20, 20, 3), dtype=np.uint8)
    labels = np.arange(6) % 2
    np.savez(
        "cells.npz", train=images, train_labels=labels, test=images[:3], test_labels=labels[:3]
    )
    module(npz)
    data = load_data("mydata:load", 14)
    assert data.labelled
    assert data.train.images.shape == (6, 3, 16, 16)
    assert labels_of(data.test) == [0, 1, 0]

    (tmp_path / "xrays").mkdir()
    for i in range(3):
        values = np.full((20, 24), 1_365 * (i + 1), np.uint16)
        Image.fromarray(values).save(tmp_path / "xrays" / f"{i}.png")
    module(xrays)
    data = load_data("mydata:load", 14)
    assert data.channels == 1
    torch.testing.assert_close(first_pixels(data.train.images), torch.tensor([1 / 3, 2 / 3, 1]))
