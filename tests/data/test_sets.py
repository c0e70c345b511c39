"""Reading the embedded photographs and folders of images."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import tiny_images

from mixmask.data import sets as data_module
from mixmask.data.images import open_image, take_square
from mixmask.data.named import load_named
from mixmask.data.sets import STREAM, StoredImages, hold_out, load_data


def write_images(folder: Path, count: int, mode: str = "RGB", value: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((20, 30, 3), value + i, dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


def test_clothing64_is_whole() -> None:
    loaded = load_data("clothing64", 32)
    assert isinstance(loaded.train.images, torch.Tensor)
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
    assert isinstance(loaded.train.images, torch.Tensor)
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
    write_images(tmp_path / "dog", 1)
    (tmp_path / "cat" / "bad1.jpg").write_bytes(b"no image")
    (tmp_path / "cat" / "bad2.jpg").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_data(str(tmp_path), 14)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert (
        "cat/bad1.jpg is not a readable image (not in a format that Pillow reads);" in messages[0]
    )
    assert messages[1] == "2 unreadable images so far"
    assert len(loaded.train.images) == 4
    assert loaded.train.labels is not None
    assert loaded.train.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.filterwarnings("ignore:.*unreadable image", "ignore:.*not a readable image")
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_images_in_memory_and_on_disk_are_the_same_data(share: float, tmp_path: Path) -> None:
    for name, count in (("cat", 9), ("dog", 8)):
        write_images(tmp_path / name, count)
        for number in range(3):
            (tmp_path / name / f"{3 * number}bad.jpg").write_bytes(b"no image")
    memory, disk = (load_data(str(tmp_path), 14, stream=how) for how in ("never", "always"))
    if share:
        memory, disk = (hold_out(data, share) for data in (memory, disk))
    assert memory.fingerprint() == disk.fingerprint()
    counts: Any = memory.fingerprint()
    assert counts["train"] + counts["test"] == 23
    assert len(memory.train.images) + (len(memory.test.images) if memory.test else 0) == 17
    for one, other in ((memory.train, disk.train), (memory.test, disk.test)):
        if one is not None and other is not None:
            assert [name for name, _ in one.listed] == list(other.files)
            assert set(other.files) - set(one.files) == {name for _, name, _ in one.lost}
            assert other.labels is not None
            assert [label for _, label in one.listed] == other.labels.tolist()


def test_folder_with_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        load_data(str(tmp_path), 14)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(OSError, match=r"2 images in a row cannot be read: .*a.jpg is not a re"):
        load_data(str(tmp_path), 14)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="--data must be a folder or one of clothing64, cifar10"):
        load_data("imagenet-22k", 224)


def test_folder_beyond_memory_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, 3)
    needed = 3 * 3 * 16 * 16
    monkeypatch.setattr(data_module, "MAX_BYTES", needed)
    assert not load_data(str(tmp_path), 14).streamed
    monkeypatch.setattr(data_module, "MAX_BYTES", needed - 1)
    assert load_data(str(tmp_path), 14).streamed
    assert not load_data(str(tmp_path), 14, stream="never").streamed
    monkeypatch.setattr(data_module, "MAX_BYTES", needed)
    monkeypatch.setattr(data_module, "free_bytes", lambda: 4 * needed - 1)
    assert load_data(str(tmp_path), 14).streamed
    monkeypatch.setattr(data_module, "free_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"GiB are free; leave out --stream never"):
        load_data(str(tmp_path), 14, stream="never")


def test_named_data_are_not_streamed() -> None:
    with pytest.raises(ValueError, match="--stream always needs a folder of images, got --data cl"):
        load_data("clothing64", 32, stream="always")


def test_images_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 3, value=10)
    write_images(tmp_path / "train" / "dog", 2, mode="L", value=50)
    write_images(tmp_path / "test" / "dog", 2, mode="P")
    memory, disk = (load_data(str(tmp_path), 14, stream=s) for s in ("never", "always"))
    assert disk.labelled
    assert disk.classes == memory.classes
    assert memory.test is not None
    assert disk.test is not None
    for ours, theirs in ((disk.train, memory.train), (disk.test, memory.test)):
        assert ours.labels is not None
        assert theirs.labels is not None
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.images.shape == theirs.images.shape
        assert torch.equal(ours.images[:], theirs.images[:])
    images, whole = disk.train.images, memory.train.images
    index = torch.tensor([4, 0])
    assert torch.equal(images[index], whole[index])
    assert torch.equal(images[1:3], whole[1:3])
    assert torch.equal(images[-1], whole[-1])
    table = torch.tensor([[0, 1, 2], [4, 4, 3]])
    assert torch.equal(images[table], whole[table])
    assert images[:0].shape == (0, 3, 16, 16)
    with pytest.raises(IndexError):
        images[5]
    assert isinstance(images, StoredImages)
    assert torch.equal(images.subset(index)[:], whole[index])


def test_large_jpeg_is_decoded_smaller_to_the_same_square(tmp_path: Path) -> None:
    file = tmp_path / "large.jpg"
    photograph = tiny_images(1)[0].permute(1, 2, 0).numpy()
    large = Image.fromarray(photograph).resize((800, 800), Image.Resampling.BICUBIC)
    large.save(file, quality=95)
    with open_image(file) as image:
        square = take_square(image, 64).permute(1, 2, 0).numpy()
    whole = np.asarray(Image.open(file).resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(square - whole).mean() < 1


def test_a_file_on_disk_that_cannot_be_read_is_named_and_replaced_in_its_place(
    tmp_path: Path,
) -> None:
    for label, value in (("cat", 10), ("dog", 90)):
        write_images(tmp_path / label, 12, value=value)
    for number in range(11):
        (tmp_path / "dog" / f"{number}.png").write_bytes(b"no image")
    images = load_data(str(tmp_path), 14, stream="always").train.images
    assert isinstance(images, StoredImages)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = images[:]
        images.warn_rest()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 3, messages
    assert Path("dog", "0.png").as_posix() in messages[0]
    assert messages[1].startswith("10 unreadable images")
    assert messages[2].startswith("11 unreadable images")
    # 11.png is the only whole one in dog, and the fourth by name; then the first of all follows.
    assert read[12:, 0, 0, 0].tolist() == [101] * 4 + [10] * 8


def test_views_much_larger_than_the_images(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    with pytest.warns(UserWarning, match="are about 20 px, and views of 41 px"):
        load_data(str(tmp_path), 41)
    load_data(str(tmp_path), 40)


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
    assert isinstance(loaded.train.images, torch.Tensor)
    assert loaded.train.images.shape == (train, 3, 32, 32)
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.test is not None
    assert len(loaded.test.images) == test
    assert loaded.classes == ("cat", "dog", "owl")
    assert loaded.labelled


def test_named_images_much_smaller_than_the_views(downloads: Path) -> None:
    with pytest.warns(UserWarning, match="images of cifar10 are about 32 px, and views of 224 px"):
        load_data("cifar10", 224, root=downloads)


def test_stl10_from_torchvision_trains_on_unlabelled_images_too(downloads: Path) -> None:
    loaded = load_data("stl10", 64, root=downloads)
    assert loaded.train.images.shape == (7, 3, 96, 96)
    assert loaded.train.labels is not None
    assert loaded.train.labels.tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert loaded.test is not None
    assert loaded.test.labels is not None
    assert loaded.test.labels.tolist() == [2, 0]


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_share_of_each_class_is_held_out(stream: str, tmp_path: Path) -> None:
    for label, count in (("cat", 20), ("dog", 10), ("owl", 2)):
        write_images(tmp_path / label, count)
    whole = load_data(str(tmp_path), 14, stream=stream)
    data = hold_out(whole, 0.2)
    assert data.labelled
    assert data.streamed == (stream == "always")
    assert data.test is not None
    assert data.test.labels is not None
    assert data.train.labels is not None
    assert torch.bincount(data.test.labels).tolist() == [4, 2, 1]
    assert torch.bincount(data.train.labels).tolist() == [16, 8, 1]
    assert sorted(data.train.files + data.test.files) == sorted(whole.train.files)
    for split in (data.train, data.test):
        assert len(split.images) == len(split.files)
        expected = [int(Path(name).stem) for name in split.files]
        values = split.images[:]
        assert isinstance(values, torch.Tensor)
        assert values[:, 0, 0, 0].tolist() == expected
        assert [data.classes.index(Path(name).parent.name) for name in split.files] == (
            split.labels.tolist() if split.labels is not None else None
        )
    assert hold_out(whole, 0.2).fingerprint() == data.fingerprint()
    other = hold_out(whole, 0.2, seed=1).test
    assert other is not None
    assert other.files != data.test.files


def test_what_cannot_be_held_out(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", 2)
    flat = load_data(str(tmp_path), 14)
    with pytest.raises(ValueError, match="holding out images needs labels, got none"):
        hold_out(flat, 0.1)
    write_images(tmp_path / "dog", 1)
    labelled = load_data(str(tmp_path), 14)
    with pytest.raises(ValueError, match=r"class dog has one image, .* add"):
        hold_out(labelled, 0.1)
    with pytest.raises(ValueError, match="must lie between 0 and 1, got 10; use"):
        hold_out(labelled, 10)
    with pytest.raises(ValueError, match="the data has a test split already"):
        hold_out(load_data("clothing64", 32), 0.1)


def test_a_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    def write(name: str, labels: tuple[str, ...], count: int) -> dict[str, Any]:
        for label in labels:
            write_images(tmp_path / name / label, count)
        prints = [load_data(str(tmp_path / name), 14, stream=s).fingerprint() for s in STREAM]
        assert prints[0] == prints[1] == prints[2]  # However they are read.
        return prints[0]

    first = write("x", ("cat", "dog"), 3)
    assert list(first.items())[:3] == [("train", 6), ("test", 0), ("classes", ["cat", "dog"])]
    assert write("same", ("cat", "dog"), 3) == first
    others = [first, write("more", ("cat", "dog"), 4), write("other", ("cat", "owl"), 3)]
    (tmp_path / "x" / "cat" / "0.png").rename(tmp_path / "x" / "cat" / "9.png")
    assert len({str(each) for each in (*others, write("x", (), 0))}) == 4
    images = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    plain = load_data(images, 14).fingerprint()
    images[20:] = 1
    assert load_data(images, 14).fingerprint() != plain


def test_small_views_of_data_sets_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="images of the data set are about 8 px, and views of 32"):
        load_data([torch.zeros(3, 8, 8)] * 2, 32)


def test_a_download_without_a_network_says_where_files_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.CIFAR100.download", fail)
    message = rf"--data cifar100 could not be .*\(Name or .* CIFAR100 into {tmp_path}"
    with pytest.raises(OSError, match=message):
        load_named("cifar100", tmp_path)
