"""Data sets of one's own: forms of images, labels and splits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_images import constants, first_pixels, labels_of
from tiny_runs import run, tiny_config
from torch.utils.data import IterableDataset, TensorDataset

from mixmask.checkpoints.load import load_backbone
from mixmask.data.datasets import DatasetImages
from mixmask.data.sets import StoredImages, load_data
from mixmask.data.stream import Draw, read_batches
from mixmask.data.views import RandomView
from mixmask.evaluation.features import extract_features
from mixmask.figures.masks import figure_views
from mixmask.figures.style import save_figure
from mixmask.trainers.loop import first_views
from mixmask.trainers.run import Run

ROOT = Path(__file__).parents[2]


FORMS: dict[str, tuple[Callable[[int], Any], int, torch.dtype]] = {
    "uint8 tensor": (lambda v: constants([v])[0], 3, torch.uint8),
    "float tensor of 5 bands": (lambda v: constants([v], 5, torch.float)[0], 5, torch.float32),
    "array HW": (lambda v: np.full((12, 16), v, np.uint8), 1, torch.uint8),
    "uint8 tensor of 13 bands": (lambda v: constants([v], 13)[0], 13, torch.uint8),
    "flipped array": (lambda v: np.full((12, 16), v, np.uint8)[::-1], 1, torch.uint8),
    "read-only array": (lambda v: np.broadcast_to(np.uint8(v), (12, 16, 3)), 3, torch.uint8),
    "float64 array HWC": (lambda v: np.full((12, 16, 4), v / 255), 4, torch.float32),
    "RGB": (lambda v: Image.new("RGB", (16, 12), (v, v, v)), 3, torch.uint8),
    "grey": (lambda v: Image.new("L", (16, 12), v), 1, torch.uint8),
    "palette": (lambda v: Image.new("RGB", (16, 12), (v, v, v)).convert("P"), 3, torch.uint8),
    "16 bits": (lambda v: Image.fromarray(np.full((12, 16), v * 257, np.uint16)), 1, torch.float32),
}


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("form", FORMS)
def test_images_of_every_form(form: str, stream: str) -> None:
    make, channels, dtype = FORMS[form]
    data = load_data([make(0), make(51), make(255)], 7, stream=stream)
    assert data.channels == channels
    assert data.train.images.shape == (3, channels, 8, 8)
    assert data.train.images.dtype == dtype
    assert isinstance(data.train.images, StoredImages) == (stream == "always")
    expected = torch.tensor([0, 51, 255])
    if dtype == torch.float32:
        torch.testing.assert_close(first_pixels(data.train.images), expected / 255)
    else:
        assert first_pixels(data.train.images).tolist() == expected.tolist()
    assert (data.train.labels, data.test, data.classes) == (None, None, ())


def test_a_square_of_bands_is_the_central_one() -> None:
    image = torch.zeros(5, 8, 12)
    image[:, :, 2:10] = torch.linspace(0, 1, 5)[:, None, None]
    square = load_data([image, image], 7).train.images[0]
    torch.testing.assert_close(square, torch.linspace(0, 1, 5)[:, None, None].expand(5, 8, 8))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_crops_of_bands_are_streamed_in_their_own_type(workers: int) -> None:
    images = load_data(list(constants([0, 51, 255], 5, torch.float)), 8, stream="always").train
    assert isinstance(images.images, StoredImages)
    drawn = [Draw(torch.tensor([2, 0, 1]), 2, 3)]
    reading = read_batches(
        images.images, drawn, size=8, min_scale=0.3, workers=workers, device=torch.device("cpu")
    )
    with closing(reading):
        (batch,) = list(reading)
    assert (batch.shape, batch.dtype) == ((6, 5, 8, 8), torch.float32)
    torch.testing.assert_close(batch[:, 4, 5, 3], torch.tensor([1.0, 0, 0.2, 1, 0, 0.2]))
    assert RandomView(8, crop=False, blur=1.0)(batch).shape == (6, 5, 8, 8)


class Columns:
    """What a Hugging Face data set offers; its images are read when they are asked for."""

    column_names = ("img", "fine_label")

    def __init__(self, values: list[int], labels: list[int]) -> None:
        self.values, self.labels, self.read = values, labels, 0
        self.features = {"fine_label": SimpleNamespace(names=["cat", "dog"])}

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        if index == "fine_label":
            return self.labels
        self.read += 1
        image = Image.new("RGB", (16, 12), (self.values[index],) * 3)
        return {"img": image, "fine_label": self.labels[index]}


def test_labels_of_tuples_tensors_columns_and_targets() -> None:
    images, labels = constants([10, 20, 30]), torch.tensor([0, 1, 1])
    pairs = list(zip(images, labels.tolist(), strict=True))
    data = load_data((TensorDataset(images, labels), pairs[:2]), 7)
    assert (labels_of(data.train), labels_of(data.test)) == ([0, 1, 1], [0, 1])
    assert data.classes == ("0", "1")
    assert data.labelled
    columns = Columns([10, 20, 30], [0, 1, 1])
    data = load_data(columns, 7, stream="always")
    assert (labels_of(data.train), data.classes) == ([0, 1, 1], ("cat", "dog"))
    assert columns.read < 12  # A few for their sizes, none for the labels.
    targets = type("Targets", (list,), {"targets": [1, 0, 1], "classes": ["a", "b"]})(images)
    data = load_data(targets, 7)
    assert (labels_of(data.train), data.classes) == ([1, 0, 1], ("a", "b"))


def test_labels_that_are_no_classes_of_these_images_are_refused() -> None:
    images = constants([10, 20, 30])
    with pytest.raises(ValueError, match="largest label is 1000000001, for 3 images; number"):
        load_data([(image, 10**9 + i % 2) for i, image in enumerate(images)], 7)
    targets = type("Targets", (list,), {"targets": [1, 0, 1, 0]})(images)
    with pytest.raises(ValueError, match="there are 4 labels for 3 images"):
        load_data(targets, 7)


def test_a_single_class_is_no_label() -> None:
    data = load_data([(image, 0) for image in constants([1, 2])], 7)
    assert (data.train.labels, data.classes) == (None, ())


def test_grey_and_coloured_pil_images_are_all_coloured() -> None:
    mixed = [Image.new(mode, (16, 12), 60) for mode in ("L", "RGB", "L")]
    assert load_data(mixed, 7).train.images.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    "items, message",
    [
        (
            [torch.zeros(3, 8, 8), torch.zeros(4, 8, 8)],
            r"image 0 has 3 channels .* others have 4",
        ),
        ([torch.zeros(224, 224, 3)] * 2, r"got \(1, 224, 224, 3\); bring channels to their place"),
        (
            [np.zeros((3, 40, 40), np.uint8)] * 2,
            r"got \(1, 40, 3, 40\); bring channels to their place",
        ),
        ([torch.full((3, 8, 8), 255.0)] * 2, "must lie within 0 ... 1, got 255 ... 255; divide"),
        ([np.zeros((8, 8), np.uint16)] * 2, r"got torch.uint16; divide them by .*65535 for 16"),
        ([torch.zeros(2, 3, 8, 8)] * 2, r"image 0 must be a tensor \(C, H, W\).* of shape \(2, 3"),
        ([["x"], ["y"]], "image 0 must be a tensor .*, got str 'x'; convert it in __getitem__"),
        ([torch.zeros(3, 8, 8)], r"at least two images, .* got 1"),
        ([(torch.zeros(3, 8, 8), "cat")] * 2, "labels must be integers, got 'cat'"),
    ],
)
def test_items_that_are_refused(items: list[Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        load_data(items, 7)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_what_is_refused_while_streaming_takes_one_line(workers: int) -> None:
    items = [torch.zeros(3, 8, 8)] * 9
    images = load_data(items, 7, stream="always").train.images
    items[7] = torch.zeros(3, 8, 8).long()
    draws = [Draw(torch.tensor([7]), 1, 0)]
    assert isinstance(images, StoredImages)
    reading = read_batches(
        images, draws, size=8, min_scale=0.3, workers=workers, device=torch.device("cpu")
    )
    with closing(reading), pytest.raises(OSError, match=r"^image 7 must be uint8 or .*int64"):
        next(reading)


def test_splits_that_do_not_fit_together() -> None:
    pairs = [(image, i) for i, image in enumerate(constants([1, 2]))]
    with pytest.raises(ValueError, match="a label is 2, and the training split has 2 classes"):
        load_data((pairs, [(constants([1])[0], 2)]), 7)
    with pytest.raises(ValueError, match=r"have 3 channels of .*, test images 1 channels"):
        load_data((pairs, [(constants([1], 1)[0], 1)]), 7)


def test_streams_are_refused() -> None:
    stream = type("Stream", (IterableDataset,), {"__iter__": lambda _: iter(constants([1, 2]))})()
    with pytest.raises(
        ValueError, match=r"with __len__ .*, got Stream; streaming data sets are not"
    ):
        load_data(stream, 7)


def test_what_workers_are_given_can_be_pickled() -> None:
    images = pickle.loads(pickle.dumps(DatasetImages.of(list(constants([3, 4])))))
    with images.open(1) as image:
        assert image[0, 0, 0] == 4


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_backbone_has_as_many_inputs_as_the_images_have_channels(
    stream: str, tmp_path: Path
) -> None:
    bands = torch.rand(16, 5, 24, 24)
    data = load_data(list(bands), 21, stream=stream)
    config = tiny_config("moco-v2", image_size=16, epochs=1, measure_every=0, workers=1)
    model = run(config, data.train.images, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["channels"] == 5
    loaded = load_backbone(tmp_path / "run").backbone
    features = extract_features(loaded, data.train.images)
    assert features.shape == (16, loaded.num_features)
    assert torch.equal(features, extract_features(model.backbone, data.train.images))
    views = first_views(Run.build(config, data.train.images, tmp_path))
    figure = figure_views(*views)
    save_figure(figure, tmp_path / "views.png")
    assert (tmp_path / "views.png").stat().st_size > 1000
