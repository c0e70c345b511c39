"""Which files, splits and classes a folder has."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mixmask.data.folders import Files, Source, list_folder
from mixmask.data.sets import load_data


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(files: Source) -> list[str]:
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
            "has classes that the training split has not: c; name the class folders alike",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped")
def test_folders_that_are_refused(files: list[str], message: str, tmp_path: Path) -> None:
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        list_folder(tmp_path)


def test_data_set_that_is_to_be_unpacked() -> None:
    fix = (
        r"got tiny-imagenet; unpack tiny-imagenet and pass its folder, with --recipe tiny-imagenet"
    )
    with pytest.raises(ValueError, match=fix):
        load_data("tiny-imagenet", 64)
