"""Accuracies against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    top_k_accuracy_score,
)

from mixmask.evaluation import measure_accuracy, wilson_interval


def test_accuracies_equal_those_of_scikit_learn() -> None:
    labels = torch.randint(9, (500,))
    scores = torch.randn(500, 9).softmax(dim=1)
    scores[torch.arange(500), labels] += 0.1
    measured = measure_accuracy(scores, labels)
    predicted = scores.argmax(dim=1)
    assert measured.top1 == pytest.approx(accuracy_score(labels, predicted))
    assert measured.top5 == pytest.approx(top_k_accuracy_score(labels, scores.numpy(), k=5))
    assert measured.mean_class == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert measured.confusion.tolist() == confusion_matrix(labels, predicted).tolist()


def test_classes_that_do_not_occur_count_for_nothing() -> None:
    scores = torch.eye(7)[[0, 0, 2]]
    measured = measure_accuracy(scores, torch.tensor([0, 1, 2]))
    assert measured.mean_class == pytest.approx(2 / 3)
    assert measured.per_class[3:].isnan().all()


@pytest.mark.parametrize("classes, has_top5", [(1, False), (5, False), (6, True)])
def test_top5_is_left_out_where_it_says_nothing(classes: int, has_top5: bool) -> None:
    measured = measure_accuracy(torch.rand(3, classes), torch.zeros(3, dtype=torch.int64))
    assert (measured.top5 is not None) == has_top5


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    labels = torch.arange(8)
    measured = measure_accuracy(torch.zeros(8, 8), labels)
    assert measured.confusion[:, 0].tolist() == [1] * 8
    assert measured.top1 == 1 / 8
    assert measured.top5 == 5 / 8


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        (torch.rand(0, 3), torch.zeros(0, dtype=torch.int64), "not be empty"),
        (torch.rand(2, 3), torch.tensor([0, 3]), "below the number of classes, 3, got 3"),
        (torch.rand(2, 3), torch.tensor([0, -1]), "leave unlabelled images out"),
        (torch.rand(2, 3), torch.tensor([0]), r"must be \(2,\), one for each row"),
        (torch.tensor([[0.1, torch.nan]]), torch.tensor([0]), "must be finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    scores: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_accuracy(scores, labels)


@pytest.mark.parametrize("right, images", [(0, 7), (3, 7), (164, 372), (372, 372), (9, 10**6)])
def test_intervals_equal_scipys(right: int, images: int) -> None:
    expected = binomtest(right, images).proportion_ci(method="wilson")
    ours = wilson_interval(right / images, images)
    assert ours == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_mean_of_one_class_has_the_interval_of_that_class() -> None:
    scores = torch.eye(2)[torch.arange(30) % 3 // 2]  # A third says 1.
    measured = measure_accuracy(scores, torch.zeros(30, dtype=torch.int64))
    found = measured.intervals()
    assert found["mean_class"] == pytest.approx(found["top1"])
    assert measured.class_intervals() == [pytest.approx(found["top1"]), None]
    assert measured.to_json(("a", "b"))["intervals"] == {
        "kind": "95 %, Wilson", **found, "per_class": {"a": found["top1"], "b": None},
    }  # fmt: skip


def test_intervals_hold_the_truth_in_95_of_100_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    shares, counts = torch.tensor([0.95, 0.6, 0.3]), torch.tensor([20, 40, 30])
    labels = torch.arange(3).repeat_interleave(counts)  # (90,)
    truth = {"mean_class": float(shares.mean()), "top1": float((shares * counts).sum() / 90)}
    inside = dict.fromkeys(truth, 0)
    for _ in range(2000):
        right = torch.rand(90, generator=generator) < shares[labels]
        scores = torch.eye(3)[torch.where(right, labels, (labels + 1) % 3)]
        found = measure_accuracy(scores, labels).intervals()
        for name, value in truth.items():
            inside[name] += found[name][0] <= value <= found[name][1]
    assert 0.93 < inside["mean_class"] / 2000 < 0.97
    assert inside["top1"] / 2000 > 0.94  # Classes of unlike difficulty vary less than one.
