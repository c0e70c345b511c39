"""Nearest neighbours and linear probes against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy


def clusters(n: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, 16, generator=generator), labels


@pytest.mark.parametrize("k, chunk", [(1, 7), (20, 64), (500, 1024)])
def test_knn_equals_weighted_neighbours_of_scikit_learn(k: int, chunk: int) -> None:
    (x, y), (x_test, y_test) = clusters(400, 2.0, 1), clusters(100, 2.0, 2)
    reference = KNeighborsClassifier(
        min(k, 400),
        metric="cosine",
        weights=lambda distance: np.exp((1 - distance) / 0.1),
    ).fit(x, y)
    ours = knn_accuracy(x, y, x_test, y_test, k=k, chunk=chunk)
    assert ours == pytest.approx(reference.score(x_test, y_test), abs=1e-6)


def test_linear_equals_logistic_regression_of_scikit_learn() -> None:
    (x, y), (x_test, y_test) = clusters(400, 2.0, 1), clusters(1000, 2.0, 2)
    penalty = 1e-2
    ours = linear_accuracy(x, y, x_test, y_test, penalties=(penalty,))
    mean, std = x.mean(dim=0), x.std(dim=0)
    reference = LogisticRegression(C=1 / (penalty * len(x)), max_iter=1000, tol=1e-8)
    reference.fit((x - mean) / std, y)
    assert ours == pytest.approx(reference.score((x_test - mean) / std, y_test), abs=0.002)


def test_features_are_those_of_evaluation_mode_and_leave_the_mode() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    backbone.train()
    in_parts = extract_features(backbone, images, batch_size=3)
    assert backbone.training
    backbone.eval()
    torch.testing.assert_close(in_parts, extract_features(backbone, images))
    assert in_parts.shape == (10, 4)
