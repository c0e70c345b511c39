"""Which files, splits and classes a folder has."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import closing
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from PIL import Image

from mixmask.data.folders import Files, ImageSource, list_folder
from mixmask.data.sets import StoredImages, load_data
from mixmask.data.stream import Draw, Stream


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(files: ImageSource) -> list[str]:
    return [files.name(number) for number in range(len(files))]


def test_files_are_a_sequence_of_paths(tmp_path: Path) -> None:
    given = ["a/1.jpg", "ä/ 2.jpg", "c.png"]
    files = pickle.loads(pickle.dumps(Files.of(tmp_path, given)))
    assert names(files) == given
    assert files[-1] == tmp_path / "c.png"
    assert names(files.subset([1, 0])) == ["ä/ 2.jpg", "a/1.jpg"]
    with pytest.raises(IndexError):
        files[3]
    assert len(Files.of(tmp_path, [])) == 0


def test_flat_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a/x.png", ".hidden.jpg", ".cache/y.jpg")
    train, test, classes = list_folder(tmp_path)
    assert (names(train.files), train.labels, test, classes) == (
        ["a/x.png", "b.JPG"],
        None,
        None,
        (),
    )


def test_class_folders_of_any_depth_and_links(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "n2/2.jpg")
    touch(tmp_path / "data", "train/n1/deep/1.jpg", "train/n1-b/1.jpg", "val/n1/3.jpg")
    (tmp_path / "data" / "train" / "n2").symlink_to(tmp_path / "elsewhere" / "n2")
    (tmp_path / "data" / "train" / "n1" / "loop").symlink_to(tmp_path / "data" / "train")
    train, test, classes = list_folder(tmp_path / "data")
    assert names(train.files) == ["n1/deep/1.jpg", "n1-b/1.jpg", "n2/2.jpg"]
    assert classes == ("n1", "n1-b", "n2")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2]
    assert test is not None
    assert test.labels is not None
    assert (names(test.files), test.labels.tolist()) == (["n1/3.jpg"], [0])


def test_tiny_imagenet(tmp_path: Path) -> None:
    touch(tmp_path, "train/n1/images/n1_0.JPEG", "train/n1/n1_boxes.txt", "wnids.txt")
    touch(tmp_path, "train/n2/images/n2_0.JPEG", "test/images/test_0.JPEG")
    touch(tmp_path, *(f"val/images/val_{i}.JPEG" for i in range(3)))
    rows = [f"val_{i}.JPEG\t{label}\t0\t0\t1\t1" for i, label in enumerate(["n2", "n1", "n2"])]
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(rows) + "\n")
    with pytest.warns(UserWarning, match=r"skipped what holds no images in .*: 3 \.txt"):
        train, test, classes = list_folder(tmp_path)
    assert classes == ("n1", "n2")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1]
    assert test is not None
    assert names(test.files)[0] == "images/val_0.JPEG"
    assert test.labels is not None
    assert test.labels.tolist() == [1, 0, 1]
    annotations.write_text(rows[0])
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"names no class for images/val_1.JPEG and 1 more;"),
    ):
        list_folder(tmp_path)


def test_imagenet100_in_parts(tmp_path: Path) -> None:
    touch(tmp_path, "train.X1/n2/1.JPEG", "train.X2/n1/1.JPEG", "val.X/n1/2.JPEG")
    train, test, classes = list_folder(tmp_path)
    assert names(train.files) == ["train.X1/n2/1.JPEG", "train.X2/n1/1.JPEG"]
    assert train.labels is not None
    assert (train.labels.tolist(), classes) == ([1, 0], ("n1", "n2"))
    assert test is not None
    assert test.labels is not None
    assert test.labels.tolist() == [0]


def test_split_without_labels_serves_where_there_is_no_other(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/1.jpg", "val/2.jpg")
    found = list_folder(tmp_path).test
    assert found is not None
    assert (names(found.files), found.labels) == (["1.jpg"], None)


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "holds no images"),
        (["train/notes.txt"], "holds no images"),
        (["one.jpg"], "holds one image, one.jpg; training needs at least a batch of two"),
        (
            ["train/a/1.jpg", "train/b/x.txt", "train/c/1.jpg"],
            r"class folders without images in .*train: b; fill or remove them",
        ),
        (
            ["a/1.jpg", *(f"{i}/x.txt" for i in range(5))],
            "class folders without images in .*: 0, 1, 2 and 2 more;",
        ),
        (["train/a/1.jpg", "train/b/1.jpg", "test/x.txt"], r"test holds no images; fill or"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"],
            "has classes missing from the training split: c; use the same class folders",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped")
def test_folders_that_are_refused(files: list[str], message: str, tmp_path: Path) -> None:
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    "train, test",
    [
        ("Train", "Validation"),
        ("training", "testing"),
        ("train", "valid"),
        ("TRAIN", "dev"),
        ("train", "Eval"),
        ("train", "VAL"),
    ],
)
@pytest.mark.parametrize("top", ["", "photographs/"])
def test_splits_by_other_names(train: str, test: str, top: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{top}{split}/{label}/1.jpg" for split in (train, test) for label in "ab"))
    found = list_folder(tmp_path)
    assert found.classes == ("a", "b")
    assert found.test is not None
    for listed in (found.train, found.test):
        assert listed.labels is not None
        assert (names(listed.files), listed.labels.tolist()) == (["a/1.jpg", "b/1.jpg"], [0, 1])


def test_test_split_comes_before_validation(tmp_path: Path) -> None:
    folders = [f"{split}/{label}" for split in ("train", "val", "Test") for label in "ab"]
    touch(tmp_path, *(f"{folder}/1.jpg" for folder in folders))
    found = list_folder(tmp_path).test
    assert found is not None
    assert isinstance(found.files, Files)
    assert found.files.root.name == "Test"


@pytest.mark.parametrize(
    ("trains", "tests"),
    [(("train.X1", "train.X2"), ("val.X1", "val.X2")), (("train1", "train_2"), ("Test-1",))],
)
def test_numbered_pieces_of_a_split_are_joined(
    trains: tuple[str, ...], tests: tuple[str, ...], tmp_path: Path
) -> None:
    tops = (*trains, *tests)
    touch(tmp_path, *(f"{top}/{name}/1.jpg" for top in tops for name in ("cat", "dog")))
    train, test, classes = list_folder(tmp_path)
    assert classes == ("cat", "dog")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1] * len(trains)
    assert isinstance(train.files, Files)
    assert train.files.name(0) == f"{trains[0]}/cat/1.jpg"
    assert test is not None
    assert test.labels is not None
    assert test.labels.tolist() == [0, 1] * len(tests)
    assert len(test.files) == 2 * len(tests)


@pytest.mark.parametrize("tops", [("test",), ("val.X",), ("test", "Validation")])
def test_a_test_split_alone_is_refused(tops: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path, *(f"in/{top}/{name}/1.jpg" for top in tops for name in ("cat", "dog")))
    message = rf"in holds .*{tops[0]}.* and no training split; put one .*train, or pass .*/in/"
    with pytest.raises(ValueError, match=message):
        list_folder(tmp_path)
    assert list_folder(tmp_path / "in" / tops[0]).classes == ("cat", "dog")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"c\xfft")
    touch(tmp_path, f"{odd}/{odd}.jpg", "dog/1.jpg")
    train, _, classes = list_folder(tmp_path)
    assert classes == ("c\\udcfft", "dog")
    assert isinstance(train.files, Files)
    assert train.files[0] == tmp_path / odd / f"{odd}.jpg"


def test_classes_that_look_like_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train2017/1.jpg", "val2017/1.jpg", "testimony/1.jpg")
    with pytest.warns(UserWarning, match=r"look like splits: train2017, val2017; call them train"):
        assert len(list_folder(tmp_path).classes) == 3


def test_folders_beside_the_splits_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "valdation/a/1.jpg")
    with pytest.warns(UserWarning, match=r"not read, beside the splits of .*: valdation$"):
        assert list_folder(tmp_path).test is None


@pytest.mark.parametrize(
    "files",
    [
        ["cats/1.jpg", "cats/2.jpg"],
        ["all/1.jpg", "all/deep/2.jpg", "__MACOSX/all/1.jpg", ".ipynb_checkpoints/1.jpg"],
        ["train/all/1.jpg", "train/all/2.jpg", "test/all/1.jpg"],
        ["train/cats/1.jpg", "train/cats/2.jpg", "train/.ipynb_checkpoints/1.jpg"],
    ],
)
def test_a_single_folder_is_no_class(files: list[str], tmp_path: Path) -> None:
    touch(tmp_path, *files)
    train, test, classes = list_folder(tmp_path)
    assert (train.labels, classes, len(train.files)) == (None, (), 2)
    assert test is None or test.labels is None


def test_archive_rubbish_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "__MACOSX/a/1.jpg", ".ipynb_checkpoints/1.jpg")
    assert list_folder(tmp_path).classes == ("a", "b")


def test_skipped_kinds_are_counted_and_named_once(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "a.dcm", "b.DCM", "c.txt", "LICENSE")
    with pytest.warns(UserWarning, match="skipped") as caught:
        list_folder(tmp_path)
    (warning,) = caught
    counts = str(warning.message).rpartition(": ")[2].split(", ")
    assert counts[0] == "2 .dcm"
    assert sorted(counts[1:]) == ["1 .txt", "1 without an ending"]


def write_data(root: Path) -> None:
    """Write a labelled folder with two splits."""
    for number, name in enumerate(["train/a/1", "train/b/1", "train/b/2", "Test/a/1", "Test/b/1"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (9 * number,) * 3).save(root / f"{name}.png")


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("top", ["", "photographs"])
def test_an_archive_is_read_as_its_folder_is(stream: str, top: str, tmp_path: Path) -> None:
    write_data(tmp_path / "whole" / top)
    touch(tmp_path / "whole", "__MACOSX/1.png", "train/.hidden/1.png" if not top else ".x/1.png")
    shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "whole")
    folder, archive = (
        load_data(str(path), 14, stream=stream)
        for path in (tmp_path / "whole", tmp_path / "data.zip")
    )
    assert archive.classes == folder.classes == ("a", "b")
    assert archive.fingerprint() == folder.fingerprint()
    assert folder.test is not None
    assert archive.test is not None
    for ours, theirs in ((archive.train, folder.train), (archive.test, folder.test)):
        assert ours.labels is not None
        assert theirs.labels is not None
        assert ours.files == theirs.files
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert torch.equal(ours.images[:], theirs.images[:])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_open_an_archive_for_themselves(tmp_path: Path) -> None:
    write_data(tmp_path / "whole")
    shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "whole")
    images = load_data(str(tmp_path / "data.zip"), 14, stream="always").train.images
    assert isinstance(images, StoredImages)
    draws = [Draw(torch.tensor([0, 1, 2]), 1, seed) for seed in range(20)]
    stream = Stream(images, draws, size=8, min_scale=0.5, workers=2, device=torch.device("cpu"))
    with closing(stream) as batches:
        for batch in batches:
            assert batch[:, 0, 0, 0].tolist() == [0, 9, 18]


def test_damaged_files_in_an_archive_are_left_out(tmp_path: Path) -> None:
    write_data(tmp_path / "whole")
    shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "whole")
    whole = (tmp_path / "data.zip").read_bytes()
    with ZipFile(tmp_path / "data.zip") as archive:
        start = archive.getinfo("train/b/2.png").header_offset
    body = start + 30 + len("train/b/2.png")
    (tmp_path / "data.zip").write_bytes(whole[:body] + b"x" * 20 + whole[body + 20 :])
    with pytest.warns(UserWarning, match=r"data.zip/train/b/2.png is not a readable image \(.*;"):
        data = load_data(str(tmp_path / "data.zip"), 14)
    assert data.train.files == ("a/1.png", "b/1.png")


def test_archives_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"x.zip is not a folder of images; pass a folder of"):
        load_data(str(tmp_path / "x.zip"), 14)
    with ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("notes.txt", "none")
    with pytest.raises(ValueError, match=r"y.zip holds no images that Pillow reads; pass the"):
        load_data(str(tmp_path / "y.zip"), 14)


def test_data_set_that_is_to_be_unpacked() -> None:
    fix = (
        r"got tiny-imagenet; unpack tiny-imagenet and pass its folder, with --recipe tiny-imagenet"
    )
    with pytest.raises(ValueError, match=fix):
        load_data("tiny-imagenet", 64)


@pytest.mark.parametrize("compression", [9, 99])
def test_a_member_compressed_in_an_unknown_way_is_named(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with ZipFile(path, "w") as archive:
        for name in ("1.png", "2.png"):
            with archive.open(name, "w") as file:
                Image.new("RGB", (9, 9)).save(file, "PNG")
    content = bytearray(path.read_bytes())
    for start in (b"PK\3\4", b"PK\1\2"):  # The first member's two headers.
        content[content.index(start) + (8 if start[2] == 3 else 10)] = compression
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"1\.png is not a readable image \(.*compression"):
        assert len(load_data(str(path), 8).train.images) == 1


def test_an_archive_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path, other = tmp_path / "photos.zip", tmp_path / "other.zip"
    for count, value in ((2, 10), (3, 200)):
        with ZipFile(other, "w") as archive:
            for i in range(count):
                with archive.open(f"{i}.png", "w") as file:
                    Image.new("RGB", (9, 9), (value,) * 3).save(file, "PNG")
        other.replace(path)
        images = load_data(str(path), 8).train.images[:]
        assert (len(images), images.unique().tolist()) == (count, [value])
