"""Weighted nearest neighbours, the usual monitor of self-supervised training."""

from __future__ import annotations

import torch
from torch import Tensor

from mixmask._checks import check_positive
from mixmask.evaluation.metrics import check_features, count_classes, top1_accuracy
from mixmask.evaluation.neighbours import search


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
    chunk: int | None = None,
) -> float:
    """Classify by cosine-similar neighbours, each voting with exp(similarity / temperature).

    Takes the arguments of `knn_scores`, and the test labels (M,) int64.

    Returns:
        Top-1 accuracy, 0 ... 1.

    Raises:
        ValueError: If a split is empty or unlabelled, or an option is out of its range.

    Source:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination".

    Example:
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> knn_accuracy(x, y, x, y, k=1)
        1.0
    """
    check_features("test", test, test_labels)
    scores = knn_scores(train, train_labels, test, k=k, temperature=temperature, chunk=chunk)
    return top1_accuracy(scores, test_labels)


@torch.no_grad()
def knn_scores(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
    classes: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return each class's share of the votes of the k nearest training features.

    A neighbour of cosine similarity s votes for its class with exp(s / temperature). Of
    neighbours that are equally near at the k-th place, any may vote.

    Everything is computed where `train` lies, in chunks of both splits: beyond the features
    themselves there are M * k neighbours, M * `classes` scores and about 250 MiB.

    Args:
        train: (N, D) floating features.
        train_labels: (N,) int64, from 0.
        test: (M, D) floating features.
        k: Number of neighbours; all N where there are fewer.
        temperature: Of the votes' weights.
        classes: Number of classes. Default: one more than the largest label.
        chunk: Features of either split at a time. Default: as the memory above allows.

    Returns:
        (M, classes) float32, rows that sum to 1, on the device of `train`.

    Raises:
        ValueError: If a split is empty, unlabelled or not finite, or an option is out of range.

    Example:
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> knn_scores(train, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.1]]), k=1)
        tensor([[1., 0.]])
    """
    check_features("train", train, train_labels)
    check_features("test", test)
    _check_options(k, temperature, chunk)
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train and test features must have the same width, got {train.shape[1]} and "
            f"{test.shape[1]}; extract both with the same backbone"
        )
    classes = count_classes(train_labels, classes)
    k, device = min(k, len(train)), train.device
    similarity, index = search(test, train, k, chunk=chunk)  # (M, k) each
    labels = train_labels.to(device)[index]
    # Dividing a row by its largest vote changes no share, and keeps small temperatures finite.
    votes = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp_()
    votes /= votes.sum(dim=1, keepdim=True)
    return torch.zeros(len(test), classes, device=device).scatter_add_(1, labels, votes)


def _check_options(k: int, temperature: float, chunk: int | None) -> None:
    for name, value in (("k", k), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; use for instance 20")
    check_positive("temperature", temperature)
