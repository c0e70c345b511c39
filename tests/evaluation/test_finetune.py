"""Subsets, fine-tuning, and the probe by SGD."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.data.sets import load_data
from mixmask.evaluation import (
    FineTuning,
    LinearSGD,
    balanced_subset,
    classifier_scores,
    extract_features,
    linear_scores,
    listed_subset,
    measure_accuracy,
)
from mixmask.evaluation.features import resize
from mixmask.runs.schedules import cosine_decay, step_decay

TUNING, PROBE = FineTuning(epochs=2, batch_size=8), LinearSGD(epochs=2, batch_size=8)


def coloured(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noise whose mean colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(160, (n, 3, 20, 20), generator=generator)
    images[torch.arange(n), labels] += 90
    return images.to(torch.uint8), labels


@pytest.mark.parametrize("percent, each", [(1, 1), (10, 5), (40, 20)])
def test_subsets_are_balanced_and_follow_the_seed(percent: float, each: int) -> None:
    labels = torch.cat([torch.zeros(90), torch.ones(40), torch.full((20,), 2)]).long()
    index = balanced_subset(labels, percent, seed=1)
    assert labels[index].bincount().tolist() == [each] * 3
    assert index.unique().numel() == 3 * each
    assert torch.equal(index, balanced_subset(labels, percent, seed=1))
    assert not torch.equal(index, balanced_subset(labels, percent, seed=2))


def test_all_labels_need_no_balance() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    assert balanced_subset(labels, 100).tolist() == [0, 1, 2, 3]


def test_class_with_too_few_images_is_named() -> None:
    labels = torch.tensor([0] * 9 + [1])
    with pytest.raises(ValueError, match="50 % of 10 images are 2 of each class, but class dog "):
        balanced_subset(labels, 50, classes=("cat", "dog"))


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_percentage_out_of_range(percent: float) -> None:
    with pytest.raises(ValueError, match="--percent must be above 0 and at most 100"):
        balanced_subset(torch.arange(10) % 2, percent)


FILES = ("cat/0.png", "cat/1.png", "dog/0.png", "dog/8.png")


def test_listed_files_with_and_without_folders() -> None:
    assert listed_subset(FILES, ["8.png", "cat/0.png"]).tolist() == [0, 3]


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "names no file"),
        (["0.png"], "is the name of 2 files; write their folders"),
        (["8.png", "x.png", "y.png"], "2 of 3 names .* first x.png"),
        (["cow/8.png"], "1 of 1 names"),
        (["8.png", "dog/8.png"], "names a file twice"),
    ],
)
def test_lists_that_do_not_fit(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed_subset(FILES, names)


def test_fine_tuning_on_a_tenth_beats_the_frozen_backbone() -> None:
    data = load_data("clothing64", 32)
    assert data.test is not None
    assert data.train.labels is not None
    assert data.test.labels is not None
    backbone = build_backbone("narrow")
    index = balanced_subset(data.train.labels, 10)
    images, labels = data.train.images[index], data.train.labels[index]
    x, x_test = (extract_features(backbone, part) for part in (images, data.test.images))
    start = measure_accuracy(linear_scores(x, labels, x_test)[0], data.test.labels)
    protocol = FineTuning(epochs=10, batch_size=32, lr=0.05)
    test = data.test.images
    scores = classifier_scores(backbone, images, labels, test, protocol, image_size=32)
    assert measure_accuracy(scores, data.test.labels).top1 > start.top1 + 0.02


def test_probe_by_sgd_learns_what_is_linear() -> None:
    (images, labels), (test, test_labels) = coloured(96, 0), coloured(48, 1)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = 3  # type: ignore[assignment]
    backbone.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    protocol = LinearSGD(epochs=6, batch_size=16, lr=3.0)
    scores = classifier_scores(backbone, images, labels, test, protocol, image_size=16)
    assert measure_accuracy(scores, test_labels).top1 > 0.9


@pytest.mark.parametrize("protocol", [TUNING, PROBE])
def test_seed_decides_and_nothing_else_changes(protocol: FineTuning | LinearSGD) -> None:
    (images, labels), (test, _) = coloured(20, 0), coloured(6, 1)
    backbone = build_backbone("narrow").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    drawn = torch.get_rng_state()

    def scores_of(protocol: FineTuning | LinearSGD) -> Tensor:
        return classifier_scores(backbone, images, labels, test, protocol, image_size=16, classes=4)

    scores = scores_of(protocol)
    assert scores.shape == (6, 4)
    assert torch.equal(drawn, torch.get_rng_state())
    assert backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    torch.manual_seed(7)
    assert torch.equal(scores, scores_of(protocol))
    assert not torch.equal(scores, scores_of(dataclasses.replace(protocol, seed=1)))


@pytest.mark.parametrize("protocol", [TUNING, PROBE])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 0}, "--image-size must be at least 1"),
        ({"labels": torch.tensor([0, 1, 9])}, "below the number of classes, 3, got 9"),
        ({"images": torch.zeros(1, 3, 9, 9), "labels": torch.tensor([0])}, "at least two images"),
    ],
)
def test_training_refuses(
    protocol: FineTuning | LinearSGD, changes: dict[str, Any], message: str
) -> None:
    images, labels = coloured(3, 0)
    given: dict[str, Any] = {"images": images, "labels": labels, "test": images, "image_size": 16}
    with pytest.raises(ValueError, match=message):
        classifier_scores(
            build_backbone("narrow"), **{**given, **changes}, protocol=protocol, classes=3
        )


@pytest.mark.parametrize("protocol", [TUNING, PROBE])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"seed": -1}, "--seed must be within 0"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({"lr": float("nan")}, "--lr must be positive"),
    ],
)
def test_training_options_out_of_range(
    protocol: FineTuning | LinearSGD, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(protocol, **changes)


def test_diverging_training_says_so() -> None:
    images, labels = coloured(32, 0)
    protocol = dataclasses.replace(TUNING, lr=1e30)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        classifier_scores(build_backbone("narrow"), images, labels, images, protocol, image_size=16)


def test_schedules_andresize() -> None:
    assert [cosine_decay(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    shares = (0.0, 0.59, 0.6, 0.79, 0.8)
    assert [step_decay(share) for share in shares] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    images = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).to(torch.uint8)
    assert torch.equal(resize(images, 14), images[..., 1:15, 1:15])
    assert torch.equal(resize(images, 16), images)
    assert resize(images, 7).shape == resize(images[..., :7, :7], 7).shape == (1, 3, 7, 7)
    assert resize(images, 20).shape == (1, 3, 20, 20)
