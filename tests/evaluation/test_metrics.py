"""Accuracies against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    top_k_accuracy_score,
)

from mixmask.evaluation import measure_accuracy


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
