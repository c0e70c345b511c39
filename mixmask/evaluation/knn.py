"""Weighted nearest neighbours, the usual monitor of self-supervised training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask._checks import check_positive
from mixmask.evaluation.metrics import check_features, count_classes

# Normalised training features at a time, in numbers: 64 MiB.
_FEATURES = 2**24
# Similarities at a time: 128 MiB.
_SIMILARITIES = 2**25
# Neighbours are sought among the maxima of so many columns each.
_GROUP = 4


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

    Args:
        train: (N, D) features.
        train_labels: (N,) int64.
        test: (M, D) features.
        test_labels: (M,) int64.
        k: Number of neighbours; all N where there are fewer.
        temperature: Of the votes' weights.
        chunk: As in `knn_scores`.

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
    right = scores.argmax(dim=1) == test_labels.to(scores.device)
    return float(right.float().mean())


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
    similarity, labels = _neighbours(train, train_labels.to(device), test, k, chunk)
    # Dividing a row by its largest vote changes no share, and keeps small temperatures finite.
    votes = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp_()
    votes /= votes.sum(dim=1, keepdim=True)
    return torch.zeros(len(test), classes, device=device).scatter_add_(1, labels, votes)


def _check_options(k: int, temperature: float, chunk: int | None) -> None:
    for name, value in (("k", k), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; use for instance 20")
    check_positive("temperature", temperature)


def _neighbours(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Return similarities and labels (M, k) of the nearest training features, in no order."""
    columns = min(chunk or max(_FEATURES // train.shape[1], 1024), len(train))
    rows = min(chunk or max(_SIMILARITIES // columns, 1), len(test))
    nearest = torch.full((len(test), k), -torch.inf, device=train.device)
    labels = torch.zeros(len(test), k, dtype=torch.int64, device=train.device)
    # One block for all similarities: allocated anew, its pages cost as much as the selection.
    space = torch.empty(rows * columns, device=train.device)
    for start in range(0, len(train), columns):
        keys = _unit(train[start : start + columns], "train")
        own = train_labels[start : start + columns]
        for first in range(0, len(test), rows):
            queries = _unit(test[first : first + rows].to(train.device), "test")
            block = space[: len(queries) * len(keys)].view(len(queries), len(keys))
            torch.mm(queries, keys.T, out=block)
            found, index = _largest(block, min(k, len(keys)))
            place = slice(first, first + len(queries))
            if start == 0 and found.shape[1] == k:
                nearest[place], labels[place] = found, own[index]
                continue
            found = torch.cat([nearest[place], found], dim=1)
            nearest[place], index_both = found.topk(k, dim=1, sorted=False)
            labels[place] = torch.cat([labels[place], own[index]], dim=1).gather(1, index_both)
    return nearest, labels


def _unit(features: Tensor, split: str) -> Tensor:
    unit = F.normalize(features.float(), dim=1)
    if not unit.sum().isfinite():
        raise ValueError(
            f"{split} features must be finite, got NaN or infinity; the run may have diverged"
        )
    return unit


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row (n, m) and their columns, in no order.

    The k largest lie in at most k groups of columns, those with the largest maxima. Maxima are
    cheap and selection is not, so the groups are found first, in the same way.
    """
    size = values.shape[1] // _GROUP
    if size < _GROUP * k:
        found = values.topk(k, dim=1, sorted=False)
        return found.values, found.indices
    # A group's columns lie `size` apart, so that the maxima run along memory.
    grouped = values[:, : size * _GROUP].view(len(values), _GROUP, size)
    _, group = _largest(grouped.amax(dim=1), k)
    offsets = torch.arange(_GROUP, device=values.device) * size
    columns = (group[:, None] + offsets[:, None]).flatten(1)
    rest = torch.arange(size * _GROUP, values.shape[1], device=values.device)
    columns = torch.cat([columns, rest.expand(len(values), -1)], dim=1)
    found = values.gather(1, columns).topk(k, dim=1, sorted=False)
    return found.values, columns.gather(1, found.indices)
