"""Nearest neighbours by cosine similarity, and the votes that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask._checks import check_positive
from mixmask.evaluation.metrics import check_features, count_classes, top1_accuracy
from mixmask.evaluation.tasks import Details, ProtocolOptions, Task
from mixmask.runs.options import option

# Normalised features of the bank at a time, in numbers: 64 MiB; not fewer than so many columns.
_FEATURES, _LEAST_COLUMNS = 2**24, 1024
# Similarities at a time: 128 MiB.
_SIMILARITIES = 2**25
# Neighbours are sought among the maxima of so many columns each.
_GROUP = 4


@dataclass(frozen=True)
class KNN(ProtocolOptions):
    """Weighted nearest neighbours on frozen features, see `knn_scores`."""

    k: int = option(20, "number of neighbours", low=1)
    temperature: float = option(0.1, "temperature of the votes", positive=True)
    name: ClassVar[str] = "knn"

    def measure(self, task: Task, progress: bool) -> tuple[Tensor, Details]:
        """Return scores (M, C) of the test images."""
        del progress
        (x, x_test), labels = task.features(), task.labels[0]
        scores = knn_scores(
            x, labels, x_test, k=self.k, temperature=self.temperature, classes=len(task.classes)
        )
        return scores, {"n_train": len(x), "dim": x.shape[1], "k": min(self.k, len(x))}


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """Return the top-1 accuracy, 0 ... 1, of the classes that `knn_scores` finds likeliest.

    Takes the arguments of `knn_scores`, and the test labels (M,) int64; raises the same errors.

    Example:
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> knn_accuracy(x, y, x, y, k=1)
        1.0
    """
    check_features("test", test, test_labels)
    scores = knn_scores(train, train_labels, test, k=k, temperature=temperature)
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
) -> Tensor:
    """Return each class's share of the votes of the k nearest training features.

    A neighbour of cosine similarity s votes for its class with exp(s / temperature).

    Args:
        train: (N, D) floating features.
        train_labels: (N,) int64, from 0.
        test: (M, D) floating features.
        k: Number of neighbours; all N where there are fewer.
        temperature: Of the votes' weights.
        classes: Number of classes. Default: one more than the largest label.

    Returns:
        (M, classes) float32, rows that sum to 1, on the device of `train`.

    Raises:
        ValueError: If a split is empty, unlabelled or not finite, or an option is out of range.

    Source:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination".

    Example:
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> knn_scores(train, torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.1]]), k=1)
        tensor([[1., 0.]])
    """
    check_features("train", train, train_labels)
    check_features("test", test)
    check_positive("temperature", temperature)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}; use for instance 20")
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train and test features must have the same width, got {train.shape[1]} and "
            f"{test.shape[1]}; extract both with the same backbone"
        )
    classes = count_classes(train_labels, classes)
    similarity, index = nearest_neighbours(test, train, min(k, len(train)))
    labels = train_labels.to(train.device)[index]  # (M, k)
    # Dividing a row by its largest vote changes no share, and keeps small temperatures finite.
    votes = ((similarity - similarity[:, :1]) / temperature).exp_()
    votes /= votes.sum(dim=1, keepdim=True)
    return votes.new_zeros(len(test), classes).scatter_add_(1, labels, votes)


@torch.no_grad()
def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the most cosine-similar features, the most similar first.

    Everything is computed where `bank` lies, in chunks of both: beyond the features themselves
    there are M * k neighbours and about 250 MiB. Of features that are equally near at the k-th
    place, any may be found.

    Args:
        queries: (M, D) floating features.
        bank: (N, D) floating features.
        k: Number of neighbours.
        own: (M,) int64, where each query is in the bank itself; it is not its own neighbour.

    Returns:
        Similarities and indices into the bank, (M, k) each, on the device of `bank`.

    Raises:
        ValueError: If the bank has fewer than k features, not counting a query's own, or a feature
            is not finite.

    Example:
        >>> nearest_neighbours(torch.eye(3)[:1], torch.eye(3), 1)[1]
        tensor([[0]])
    """
    most = len(bank) - (own is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k must be within 1 ... {most}, as many images as there are, got {k}")
    columns = min(max(_FEATURES // bank.shape[1], _LEAST_COLUMNS), len(bank))
    rows = min(max(_SIMILARITIES // columns, 1), len(queries))
    similarity = torch.full((len(queries), k), -torch.inf, device=bank.device)
    index = torch.zeros(len(queries), k, dtype=torch.int64, device=bank.device)
    # One block for all similarities: allocated for each, its pages cost as much as the selection.
    space = torch.empty(rows * columns, device=bank.device)
    for start in range(0, len(bank), columns):
        keys = _unit(bank[start : start + columns], "train")
        for first in range(0, len(queries), rows):
            here = slice(first, first + rows)
            q = _unit(queries[here].to(bank.device), "test")
            block = space[: len(q) * len(keys)].view(len(q), len(keys))  # (m, n)
            torch.mm(q, keys.T, out=block)
            if own is not None:
                column = own[here].to(bank.device) - start
                inside = ((column >= 0) & (column < len(keys))).nonzero()[:, 0]
                block[inside, column[inside]] = -torch.inf
            values, places = _largest(block, min(k, len(keys)))
            values = torch.cat([similarity[here], values], dim=1)  # (m, up to 2k)
            places = torch.cat([index[here], places + start], dim=1)
            similarity[here], best = values.topk(k, dim=1)
            index[here] = places.gather(1, best)
    return similarity, index


def _unit(features: Tensor, split: str) -> Tensor:
    unit = F.normalize(features.float(), dim=1)
    if not unit.sum().isfinite():
        raise ValueError(
            f"{split} features must be finite, got NaN or infinity; the run may have diverged"
        )
    return unit


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row (m, n) and their columns, in no order."""
    # They lie in at most k groups of columns, those with the largest maxima. Maxima are cheap and
    # selection is not, so the groups are found first, in the same way.
    size = values.shape[1] // _GROUP
    if size < _GROUP * k:
        largest = values.topk(k, dim=1, sorted=False)
        return largest.values, largest.indices
    # A group's columns lie `size` apart, so that the maxima run along memory.
    grouped = values[:, : size * _GROUP].view(len(values), _GROUP, size)
    _, group = _largest(grouped.amax(dim=1), k)  # (m, k)
    offsets = torch.arange(_GROUP, device=values.device) * size
    columns = (group[:, None] + offsets[:, None]).flatten(1)  # (m, _GROUP * k)
    rest = torch.arange(size * _GROUP, values.shape[1], device=values.device)
    columns = torch.cat([columns, rest.expand(len(values), -1)], dim=1)
    largest = values.gather(1, columns).topk(k, dim=1, sorted=False)
    return largest.values, columns.gather(1, largest.indices)
