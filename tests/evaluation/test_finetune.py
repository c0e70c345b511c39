"""Subsets, fine-tuning, and the probe by SGD."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.data.sets import load_data
from mixmask.evaluation import (
    Training,
    balanced_subset,
    extract_features,
    finetune_scores,
    linear_scores,
    linear_sgd_scores,
    listed_subset,
    measure_accuracy,
)
from mixmask.evaluation.classifier import _centre
from mixmask.evaluation.finetune import moco_decay
from mixmask.runs.schedules import cosine_decay

SHORT = Training(epochs=2, batch_size=8, image_size=16)


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
    training = Training(epochs=10, batch_size=32, image_size=32, nesterov=True)
    scores = finetune_scores(backbone, images, labels, data.test.images, training, lr=0.05)
    assert measure_accuracy(scores, data.test.labels).top1 > start.top1 + 0.02


def test_probe_by_sgd_learns_what_is_linear() -> None:
    (images, labels), (test, test_labels) = coloured(96, 0), coloured(48, 1)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = 3  # type: ignore[assignment]
    backbone.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    training = Training(epochs=6, batch_size=16, image_size=16)
    scores = linear_sgd_scores(backbone, images, labels, test, training, lr=3.0)
    assert measure_accuracy(scores, test_labels).top1 > 0.9


Scores = Callable[..., Tensor]


@pytest.mark.parametrize("function", [finetune_scores, linear_sgd_scores])
def test_seed_decides_and_nothing_else_changes(function: Scores) -> None:
    (images, labels), (test, _) = coloured(20, 0), coloured(6, 1)
    backbone = build_backbone("narrow").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    drawn = torch.get_rng_state()
    scores = function(backbone, images, labels, test, SHORT, classes=4)
    assert scores.shape == (6, 4)
    assert torch.equal(drawn, torch.get_rng_state())
    assert backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    torch.manual_seed(7)
    assert torch.equal(scores, function(backbone, images, labels, test, SHORT, classes=4))
    other = dataclasses.replace(SHORT, seed=1)
    assert not torch.equal(scores, function(backbone, images, labels, test, other, classes=4))


@pytest.mark.parametrize("function", [finetune_scores, linear_sgd_scores])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 0.0}, "--lr must be positive"),
        ({"lr": float("nan")}, "--lr must be positive"),
        ({"labels": torch.tensor([0, 1, 9])}, "below the number of classes, 3, got 9"),
        ({"images": torch.zeros(1, 3, 9, 9), "labels": torch.tensor([0])}, "at least two images"),
    ],
)
def test_training_refuses(function: Scores, changes: dict[str, Any], message: str) -> None:
    images, labels = coloured(3, 0)
    given: dict[str, Any] = {"images": images, "labels": labels, "test": images}
    with pytest.raises(ValueError, match=message):
        function(build_backbone("narrow"), **{**given, **changes}, training=SHORT, classes=3)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch_size": 1}, {"seed": -1}])
def test_training_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        dataclasses.replace(SHORT, **changes)


def test_diverging_training_says_so() -> None:
    images, labels = coloured(32, 0)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        finetune_scores(build_backbone("narrow"), images, labels, images, SHORT, lr=1e30)


def test_schedules_and_centre() -> None:
    assert [cosine_decay(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    shares = (0.0, 0.59, 0.6, 0.79, 0.8)
    assert [moco_decay(share) for share in shares] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    images = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).to(torch.uint8)
    assert torch.equal(_centre(images, 14), images[..., 1:15, 1:15])
    assert torch.equal(_centre(images, 16), images)
    assert _centre(images, 7).shape == _centre(images[..., :7, :7], 7).shape == (1, 3, 7, 7)
    assert _centre(images, 20).shape == (1, 3, 20, 20)
