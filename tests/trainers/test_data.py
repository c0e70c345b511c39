"""Reading the embedded photographs and folders of images."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask.trainers import data as data_module
from mixmask.trainers.data import load_data


def write_images(folder: Path, count: int, mode: str = "RGB", value: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((20, 30, 3), value + i, dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


def test_clothing64_is_whole() -> None:
    loaded = load_data("clothing64", 32)
    assert loaded.train.images.shape == (3409, 3, 64, 64)
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.test is not None
    assert loaded.test.images.shape == (372, 3, 64, 64)
    assert loaded.labelled
    assert loaded.test.labels is not None
    counts = torch.bincount(loaded.test.labels, minlength=10)
    assert dict(zip(loaded.classes, counts.tolist(), strict=True))["shoes"] == 73


def test_folder_with_splits_and_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 3, value=10)
    write_images(tmp_path / "train" / "dog", 2, mode="L", value=50)
    write_images(tmp_path / "val" / "dog", 2)
    loaded = load_data(str(tmp_path), 14)
    assert loaded.classes == ("cat", "dog")
    assert loaded.train.images.shape == (5, 3, 16, 16)
    assert loaded.train.labels is not None
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert loaded.train.images[:, 0, 0, 0].tolist() == [10, 11, 12, 50, 51]
    assert loaded.train.files == ("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png")
    assert loaded.labelled


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    loaded = load_data(str(tmp_path), 14)
    assert len(loaded.train.images) == 4
    assert loaded.train.labels is None
    assert not loaded.labelled


def test_unreadable_images_are_named_once_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", 3)
    (tmp_path / "cat" / "bad1.jpg").write_bytes(b"no image")
    (tmp_path / "cat" / "bad2.jpg").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_data(str(tmp_path), 14)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert "bad1.jpg" in messages[0]
    assert messages[1].startswith("skipped 2 unreadable images")
    assert len(loaded.train.images) == 3
    assert loaded.train.labels is not None
    assert len(loaded.train.labels) == 3


@pytest.mark.filterwarnings("ignore:skipped")
def test_folder_with_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        load_data(str(tmp_path), 14)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images in .* can be read"):
        load_data(str(tmp_path), 14)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="--data must be a folder or one of clothing64, cifar10"):
        load_data("imagenet-22k", 224)


def test_folder_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 2)
    monkeypatch.setattr(data_module, "_MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"which is more than the .* kept in memory"):
        load_data(str(tmp_path), 14)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay tiny data sets out on disk as torchvision's downloads are, checksums aside."""
    rng = np.random.default_rng(0)

    def cifar(path: Path, count: int, key: str) -> None:
        path.parent.mkdir(exist_ok=True)
        data = rng.integers(256, size=(count, 3072), dtype=np.uint8)
        path.write_bytes(pickle.dumps({"data": data, key: [i % 3 for i in range(count)]}))

    names = ["cat", "dog", "owl"]
    for file in ("train", "test"):
        cifar(tmp_path / "cifar-100-python" / file, 6, "fine_labels")
    meta = pickle.dumps({"fine_label_names": names})
    (tmp_path / "cifar-100-python" / "meta").write_bytes(meta)
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        cifar(tmp_path / "cifar-10-batches-py" / file, 2, "labels")
    meta = pickle.dumps({"label_names": names})
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(meta)

    stl = tmp_path / "stl10_binary"
    stl.mkdir()
    for file, count in (("train_X", 3), ("unlabeled_X", 4), ("test_X", 2)):
        rng.integers(256, size=(count, 3, 96, 96), dtype=np.uint8).tofile(stl / f"{file}.bin")
    np.array([1, 2, 3], dtype=np.uint8).tofile(stl / "train_y.bin")
    np.array([3, 1], dtype=np.uint8).tofile(stl / "test_y.bin")
    (stl / "class_names.txt").write_text("\n".join(names))
    for module in ("cifar", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    return tmp_path


@pytest.mark.parametrize("name, train, test", [("cifar10", 10, 2), ("cifar100", 6, 6)])
def test_cifar_from_torchvision(name: str, train: int, test: int, downloads: Path) -> None:
    loaded = load_data(name, 32, root=downloads)
    assert loaded.train.images.shape == (train, 3, 32, 32)
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.test is not None
    assert len(loaded.test.images) == test
    assert loaded.classes == ("cat", "dog", "owl")
    assert loaded.labelled


def test_stl10_from_torchvision_trains_on_unlabelled_images_too(downloads: Path) -> None:
    loaded = load_data("stl10", 64, root=downloads)
    assert loaded.train.images.shape == (7, 3, 96, 96)
    assert loaded.train.labels is not None
    assert loaded.train.labels.tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert loaded.test is not None
    assert loaded.test.labels is not None
    assert loaded.test.labels.tolist() == [2, 0]
