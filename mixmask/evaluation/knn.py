"""Weighted nearest neighbours, the usual monitor of self-supervised training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> float:
    """Classify by cosine-similar neighbours, each voting with exp(similarity / temperature).

    Args:
        train: (N, D) features.
        train_labels: (N,) int64.
        test: (M, D) features.
        test_labels: (M,) int64.
        k: Number of neighbours, at most N.
        temperature: Of the votes' weights.
        chunk: Test features at a time, which bounds the memory at chunk * N.

    Returns:
        Top-1 accuracy, 0 ... 1.

    Source:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination".

    Example:
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> knn_accuracy(x, y, x, y, k=1)
        1.0
    """
    if len(train) == 0 or len(test) == 0:
        raise ValueError("knn_accuracy needs features on both splits, got an empty one")
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    train_labels, test_labels = train_labels.to(train.device), test_labels.to(train.device)
    classes = int(train_labels.max()) + 1
    right = torch.zeros((), device=train.device)
    for features, labels in zip(
        torch.split(test, chunk), torch.split(test_labels, chunk), strict=True
    ):
        similarity, index = (features @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(features), classes, device=train.device)
        votes.scatter_add_(1, train_labels[index], (similarity / temperature).exp())
        right += (votes.argmax(dim=1) == labels).sum()
    return float(right) / len(test)
