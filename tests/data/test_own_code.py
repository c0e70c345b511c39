"""Data sets whose own code is at fault, or whose splits are not what they seem: one clear line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask.data.images import open_image
from mixmask.data.sets import load_data
from mixmask.data.views import RandomView
from mixmask.runs.images import load_images


def pairs(*labels: int, size: int = 9) -> list[tuple[torch.Tensor, int]]:
    return [(torch.full((3, size, size), 20 * i).byte(), label) for i, label in enumerate(labels)]


TRAIN, HIDDEN = pairs(0, 1, 0, 1), pairs(-1, -1)


@pytest.mark.parametrize(
    ("made", "labels", "warning"),
    [
        (
            {"train": TRAIN, "validation": pairs(1, 0, 0), "test": HIDDEN},
            [1, 0, 0],
            r"the data set hides the labels of test \(all -1\); validation is used instead",
        ),
        ({"train": TRAIN, "test": HIDDEN}, None, "of test .*; it is left out"),
        ((TRAIN, HIDDEN), None, "of test .*; it is left out"),
        ({"train": TRAIN, "dev": pairs(1), "val": [x for x, _ in TRAIN]}, [1], ""),
    ],
)
def test_a_split_of_hidden_labels_is_no_test_split(
    made: Any, labels: list[int] | None, warning: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        test = load_data(made, 8).test
    assert (None if test is None or test.labels is None else test.labels.tolist()) == labels
    assert len(caught) == bool(warning)
    if warning:
        with pytest.warns(UserWarning, match=warning):
            load_data(made, 8)


def test_test_images_without_a_label_are_left_out() -> None:
    data = load_data((TRAIN, pairs(-1, 1, -1, 0)), 8)
    _, test = data.labelled_splits()
    assert test.labels is not None
    assert test.labels.tolist() == [1, 0]
    assert len(test.images) == 2


def test_numbered_pieces_of_a_split_are_joined() -> None:
    made = {"train.X2": TRAIN, "train.X1": TRAIN[:3], "val.X": pairs(1)}
    data = load_data(made, 8)
    assert (len(data.train.images), data.classes) == (7, ("0", "1"))
    assert data.test is not None
    assert len(data.test.images) == 1


@pytest.mark.parametrize("names", [("test",), ("foo", "bar"), ()])
def test_a_mapping_without_a_training_split_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"splits {', '.join(names) or 'none'}; call the training"):
        load_data(dict.fromkeys(names, TRAIN), 8)


class Failing:
    """A data set in which reading one image raises an error."""

    def __init__(self, error: Exception, at: int) -> None:
        self.error, self.at = error, at

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.at:
            raise self.error
        return torch.zeros(3, 9, 9)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    "error",
    [KeyError("x"), IndexError("out of range"), OSError(2, "gone", "a"), ZeroDivisionError()],
)
def test_errors_of_getitem_name_the_image_and_the_line(error: Exception, at: int) -> None:
    kind = type(error).__name__
    expected = rf"^image {at} cannot be read: {kind}: .* in .*test_own_code\.py, line \d+$"
    with pytest.raises(ValueError, match=expected):
        load_data(Failing(error, at), 8)


def test_memory_that_runs_out_is_no_fault_of_the_image() -> None:
    with pytest.raises(MemoryError):
        load_data(Failing(MemoryError(), 0), 8)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([], r"must be a tensor .*, got list \[\]; convert"),
        ((), r"must be a tensor .*, got tuple \(\); convert"),
        ({"pixels": 1}, r"must be a tensor .*, got dict \{'pixels': 1\}; convert"),
        (torch.zeros(3, 0, 5), r"must have pixels, got the shape \(1, 3, 0, 5\)"),
        (np.zeros((0, 5), np.uint8), r"must have pixels, got the shape \(1, 1, 0, 5\)"),
        (Image.new("RGB", (0, 5)), r"must have pixels, got the shape \(1, 3, 5, 0\)"),
    ],
)
def test_items_that_hold_no_image(item: Any, message: str, at: int) -> None:
    items: list[Any] = [torch.zeros(3, 9, 9)] * 9
    if isinstance(item, Image.Image):
        items = [Image.new("RGB", (9, 9))] * 9
    items[at] = item
    with pytest.raises((TypeError, ValueError), match=f"^image {at} {message}"):
        load_data(items, 8)


def test_views_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have pixels, got the shape \(2, 3, 0, 8\)"):
        RandomView(8)(torch.zeros(2, 3, 0, 8))


def test_tensors_that_require_gradients_are_read_without() -> None:
    images = load_data([torch.rand(3, 9, 9, requires_grad=True) for _ in range(4)], 8).train.images
    assert isinstance(images, torch.Tensor)
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", r"must name a function without arguments, got 5 \(.* not a callable.*\); write"),
        ("needs", r"must name a function without arguments, .*missing a required argument: 'root'"),
        ("fails", r"failed: KeyError: 'boo' in .*owndata\.py, line 4$"),
        ("ends", r"failed: SystemExit: 0 in .*owndata\.py, line 7$"),
        ("ends_saying", r"failed: SystemExit: no images in .*owndata\.py, line 9$"),
        ("missing", "cannot be imported: AttributeError: .* no attribute 'missing'"),
    ],
)
def test_functions_that_cannot_be_called(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "number = 5\ndef needs(root): pass\ndef fails():\n    raise KeyError('boo')\n"
        "import sys\ndef ends():\n    sys.exit(0)\ndef ends_saying():\n    sys.exit('no images')\n"
    )
    (tmp_path / "owndata.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^--data owndata:{name} {message}"):
        load_data(f"owndata:{name}", 8)


def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text, message in (
        ("broken1", "x = (", r"SyntaxError: .*broken1\.py, line 1\)$"),
        ("broken2", "1 / 0", r"ZeroDivisionError: .* in .*broken2\.py, line 1$"),
        ("broken3", "raise SystemExit([1])", r"SystemExit: \[1\] in .*broken3\.py, line 1$"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(ValueError, match=f"--data {name}:load cannot be imported: {message}"):
            load_data(f"{name}:load", 8)


@pytest.mark.parametrize(
    "others", [TRAIN[:3], pairs(0, 1, 0, 1, size=7), pairs(0, 1, 0, 2), TRAIN[::-1]]
)
def test_a_function_that_returns_other_images_is_noticed(others: Any) -> None:
    known = {"fingerprint": load_data(TRAIN, 8).fingerprint(), "image_size": 8}
    load_images(known, 8, data=TRAIN)
    with pytest.raises(ValueError, match=r"4 training images instead of None"):
        load_images({"fingerprint": {}, "image_size": 8}, 8, data=TRAIN)
    others = [(image.flip(2) + 1, label) for image, label in others]
    with pytest.raises(ValueError, match="does not hold the images that the run was started on"):
        load_images(known, 8, data=others)


def test_other_labels_of_the_same_images_are_noticed() -> None:
    known = {"fingerprint": load_data(TRAIN, 8).fingerprint(), "image_size": 8}
    relabelled = [(image, 1 - label) for image, label in TRAIN]
    for size in (8, 16):  # At another size, the images themselves are not compared.
        with pytest.raises(ValueError, match="started on: as many, but with other labels; pass"):
            load_images(known, size, data=relabelled)


@pytest.mark.parametrize("limit", ["abc", "-5", "0", "1e6"])
def test_a_limit_of_pixels_is_a_number(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMASK_MAX_PIXELS", limit)
    with (
        pytest.raises(ValueError, match=f"MAX_PIXELS must be a whole number .*got '{limit}'"),
        open_image(b""),
    ):
        pass
