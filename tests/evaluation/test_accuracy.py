"""Nearest neighbours and linear probes against scikit-learn's."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.data.sets import load_data
from mixmask.evaluation import (
    extract_features,
    knn_accuracy,
    knn_scores,
    linear_accuracy,
    linear_scores,
)
from mixmask.evaluation import neighbours as search_module
from mixmask.evaluation.linear import PENALTIES


def clusters(n: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, 16, generator=generator), labels


def neighbours(k: int, temperature: float = 0.1) -> KNeighborsClassifier:
    return KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    )


@pytest.mark.parametrize("k", [1, 20, 500])
def test_knn_equals_weighted_neighbours_of_scikit_learn(k: int) -> None:
    (x, y), (x_test, y_test) = clusters(400, 2.0, 1), clusters(100, 2.0, 2)
    reference = neighbours(min(k, 400)).fit(x, y)
    scores = knn_scores(x, y, x_test, k=k)
    np.testing.assert_allclose(scores, reference.predict_proba(x_test), atol=1e-5)
    ours = knn_accuracy(x, y, x_test, y_test, k=k)
    assert ours == pytest.approx(reference.score(x_test, y_test), abs=1e-6)


@pytest.mark.parametrize("k, temperature", [(3, 0.1), (11, 0.5), (5, 0.02)])
@pytest.mark.parametrize("features", [16 * 999, 2**24])
def test_knn_finds_the_nearest_through_groups_of_maxima(
    k: int, temperature: float, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3001 columns leave a rest in every group; 999 a time make four chunks, the last of four rows.
    monkeypatch.setattr(search_module, "_FEATURES", features)
    monkeypatch.setattr(search_module, "_SIMILARITIES", 3001 * 70)
    (x, y), (x_test, _) = clusters(3001, 2.0, 1), clusters(150, 2.0, 2)
    scores = knn_scores(x, y, x_test, k=k, temperature=temperature, classes=7)
    expected = neighbours(k, temperature).fit(x, y).predict_proba(x_test)
    np.testing.assert_allclose(scores[:, :5], expected, atol=2e-5)
    assert scores[:, 5:].eq(0).all()


def test_knn_counts_duplicates_and_survives_cold_votes() -> None:
    x = torch.ones(40, 3)
    y = torch.cat([torch.zeros(30, dtype=torch.int64), torch.ones(10, dtype=torch.int64)])
    scores = knn_scores(x, y, torch.ones(2, 3), k=40, temperature=1e-4)
    torch.testing.assert_close(scores, torch.tensor([[0.75, 0.25]]).expand(2, 2))


def test_knn_of_one_class_is_always_right() -> None:
    x, y = torch.randn(9, 4), torch.zeros(9, dtype=torch.int64)
    assert knn_accuracy(x, y, torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)) == 1.0


def test_knn_takes_half_precision_and_changes_no_input() -> None:
    (x, y), (x_test, y_test) = clusters(300, 1.0, 1), clusters(50, 1.0, 2)
    before = x.clone(), x_test.clone()
    half = knn_accuracy(x.half(), y, x_test.half(), y_test)
    assert half == pytest.approx(knn_accuracy(x, y, x_test, y_test), abs=0.021)
    assert torch.equal(x, before[0])
    assert torch.equal(x_test, before[1])


def test_knn_never_holds_all_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    common = importlib.import_module("common")
    monkeypatch.setattr(search_module, "_FEATURES", 2**14)
    monkeypatch.setattr(search_module, "_SIMILARITIES", 2**18)
    (x, y), (x_test, _) = clusters(8000, 2.0, 1), clusters(1000, 2.0, 2)
    peak = common.peak_bytes(lambda: knn_scores(x, y, x_test), "cpu")
    assert 2**20 < peak < 8000 * 1000 * 4 / 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"train": torch.zeros(0, 4), "train_labels": torch.zeros(0).long()}, "not be empty"),
        ({"test": torch.zeros(0, 4)}, "not be empty"),
        ({"test": torch.zeros(2, 3)}, "same width, got 4 and 3"),
        ({"train_labels": torch.tensor([0, -1, 1])}, "leave unlabelled images out"),
        ({"train_labels": torch.tensor([0, 1])}, "one for each row"),
        ({"train": torch.full((3, 4), torch.nan)}, "train features must be finite"),
        ({"test": torch.full((3, 4), torch.inf)}, "test features must be finite"),
        ({"classes": 1}, "below the number of classes, 1, got 2"),
    ],
)
def test_knn_refuses(changes: dict[str, Any], message: str) -> None:
    given = {"train": torch.eye(3, 4), "train_labels": torch.arange(3), "test": torch.eye(3, 4)}
    with pytest.raises(ValueError, match=message):
        knn_scores(**{**given, **changes})


def test_linear_equals_logistic_regression_on_photographs() -> None:
    data = load_data("clothing64", 32)
    assert data.train.labels is not None
    order = torch.randperm(len(data.train.images))[:1000]
    x = extract_features(build_backbone("narrow"), data.train.images[order])
    y = data.train.labels[order]
    (x, x_test), (y, y_test) = x.split((400, 600)), y.split((400, 600))
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-6)
    for penalty in (1e-1, 1e-3):
        logits, chosen = linear_scores(x, y, x_test, penalties=(penalty,))
        assert chosen == penalty
        reference = LogisticRegression(C=1 / (penalty * len(x)), max_iter=20_000, tol=1e-6)
        reference.fit((x - mean) / std, y)
        ours = float((logits.argmax(dim=1) == y_test).float().mean())
        assert ours == pytest.approx(reference.score((x_test - mean) / std, y_test), abs=0.002)
        assert ours > 0.3


def test_linear_chooses_as_scikit_learn_would() -> None:
    (x, y), (x_test, y_test) = clusters(300, 2.5, 1), clusters(4000, 2.5, 2)
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    held, kept = order[:60], order[60:]

    def fit(index: Tensor, penalty: float) -> LogisticRegression:
        model = LogisticRegression(C=1 / (penalty * len(index)), max_iter=20_000, tol=1e-8)
        return model.fit(x[index], y[index])

    best = max(PENALTIES, key=lambda penalty: float(fit(kept, penalty).score(x[held], y[held])))
    reference = fit(order, best).score(x_test, y_test)
    ours = linear_accuracy(x, y, x_test, y_test, seed=3)
    assert ours == pytest.approx(reference, abs=0.002)


def test_linear_of_a_constant_feature_and_a_single_row() -> None:
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    x[:, 0], x[:, 1] = 5.0, 4.0 * y
    assert linear_accuracy(x, y, x, y) == 1.0
    scores, penalty = linear_scores(x[:1], y[:1], x, classes=2)
    assert scores.isfinite().all()
    assert penalty == PENALTIES[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"penalties": ()}, "penalties must be positive"),
        ({"penalties": (0.0,)}, "penalties must be positive"),
        ({"test": torch.full((3, 4), torch.nan)}, "features must be finite"),
        ({"train_labels": torch.tensor([0, -1, 1])}, "leave unlabelled images out"),
    ],
)
def test_linear_refuses(changes: dict[str, Any], message: str) -> None:
    given = {"train": torch.eye(3, 4), "train_labels": torch.arange(3), "test": torch.eye(3, 4)}
    with pytest.raises(ValueError, match=message):
        linear_scores(**{**given, **changes})


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


def test_features_pass_by_compilation_and_keep_hooks() -> None:
    backbone = build_backbone("narrow")
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    eager = extract_features(backbone, images, batch_size=4)

    def refuse(graph: object, inputs: object) -> NoReturn:
        raise NotImplementedError(f"compiled {graph} for {inputs}")

    backbone.compile(backend=refuse)
    seen: list[int] = []
    with backbone.register_forward_hook(lambda _, x, __: seen.append(len(x[0]))):
        torch.testing.assert_close(extract_features(backbone, images, batch_size=4), eager)
    assert seen == [4, 2]
    with pytest.raises(Exception, match="compiled"):
        backbone(torch.zeros(2, 3, 32, 32))


def test_raw_pixels_are_features_of_a_module_without_weights() -> None:
    images = torch.rand(5, 3, 4, 4)
    features = extract_features(nn.Flatten(), images, normalization=((0.0,), (1.0,)))
    torch.testing.assert_close(features, images.flatten(1))


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"size": -1}, ValueError, "size must be at least 1, got -1"),
        ({"size": "8"}, TypeError, "size must be an integer, got '8'"),
        ({"images": torch.zeros(0, 3, 8, 8)}, ValueError, "images must not be empty"),
    ],
)
def test_features_refuse(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        extract_features(nn.Flatten(), **({"images": torch.zeros(2, 3, 8, 8)} | changes))


def test_images_of_other_channels_are_told() -> None:
    with pytest.raises(ValueError, match="it takes images of 3 channels, got 1"):
        extract_features(build_backbone("narrow"), torch.zeros(4, 1, 16, 16, dtype=torch.uint8))
