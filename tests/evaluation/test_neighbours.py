"""Neighbours against a brute force, maps against numpy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixmask.backbones import build_backbone
from mixmask.data.sets import load_data
from mixmask.evaluation import extract_features
from mixmask.evaluation import neighbours as search_module
from mixmask.evaluation.gallery import project
from mixmask.evaluation.neighbours import nearest_neighbours


def small_chunks(monkeypatch: pytest.MonkeyPatch, columns: int, rows: int) -> None:
    """Let a search see so many features of the bank, and so many queries, at a time."""
    monkeypatch.setattr(search_module, "_FEATURES", 0)
    monkeypatch.setattr(search_module, "_LEAST_COLUMNS", columns)
    monkeypatch.setattr(search_module, "_SIMILARITIES", columns * rows)


@pytest.mark.parametrize("columns, rows", [(1, 1), (4, 3), (1024, 100)])
def test_neighbours_equal_a_brute_force(
    columns: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, columns, rows)
    queries, bank = torch.randn(7, 5), torch.randn(11, 5)
    similarity, index = nearest_neighbours(queries, bank, 3)
    for i, query in enumerate(queries.double().numpy()):
        cosines = [
            query @ other / np.linalg.norm(query) / np.linalg.norm(other)
            for other in bank.double().numpy()
        ]
        best = sorted(range(11), key=lambda j: -cosines[j])[:3]
        assert index[i].tolist() == best
        assert similarity[i].tolist() == pytest.approx([cosines[j] for j in best], abs=1e-6)


def test_an_image_is_no_neighbour_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = torch.randn(11, 5)
    own = torch.tensor([3, 0, 10])
    _, all_found = nearest_neighbours(bank[own], bank, 11)
    assert all_found[:, 0].tolist() == own.tolist()
    small_chunks(monkeypatch, 2, 2)
    _, found = nearest_neighbours(bank[own], bank, 10, own=own)
    assert torch.equal(found, all_found[:, 1:])


@pytest.mark.parametrize("k, own", [(0, None), (5, None), (4, torch.tensor([0]))])
def test_neighbours_that_are_not_there_are_refused(k: int, own: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match=f"k must be within 1 ... {4 - (own is not None)}"):
        nearest_neighbours(torch.randn(1, 5), torch.randn(4, 5), k, own=own)


def test_pca_equals_numpys_singular_vectors() -> None:
    features = torch.randn(40, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    points, axes = project(features)
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x = x - x.mean(axis=0)
    _, singular, directions = np.linalg.svd(x)
    for i, name in enumerate(("first", "second")):
        direction = directions[i] * np.sign(directions[i][np.abs(directions[i]).argmax()])
        np.testing.assert_allclose(points[:, i].numpy(), x @ direction, atol=1e-5)
        share = 100 * singular[i] ** 2 / (singular**2).sum()
        assert axes[i] == f"{name} component, {share:.0f} % of the variance"


def test_lengths_of_features_do_not_move_the_map() -> None:
    features = torch.randn(20, 6)
    torch.testing.assert_close(
        project(features)[0], project(features * torch.rand(20, 1).add(0.1))[0]
    )


def test_tsne_keeps_clusters_apart_and_follows_its_seed() -> None:
    labels = torch.arange(60) % 3
    features = 8 * torch.eye(3)[labels] @ torch.randn(3, 64) + torch.randn(60, 64)
    points, axes = project(features, method="tsne", seed=1)
    distances = torch.cdist(points, points).fill_diagonal_(float("inf"))
    assert torch.equal(labels[distances.argmin(dim=1)], labels)
    assert axes == ("t-SNE, first axis", "t-SNE, second axis")
    assert torch.equal(points, project(features, method="tsne", seed=1)[0])


def test_maps_that_cannot_be_drawn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a map needs at least 3 images, got 2"):
        project(torch.randn(2, 4))
    with pytest.raises(ValueError, match="method must be one of 'pca', 'tsne', got 'umap'"):
        project(torch.randn(9, 4), method="umap")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ValueError, match="t-SNE needs scikit-learn, which is not installed"):
        project(torch.randn(9, 4), method="tsne")


def test_pca_of_features_of_photographs_equals_all_singular_vectors() -> None:
    images = load_data("clothing64", 32).train.images[::20]
    features = extract_features(build_backbone("narrow"), images)
    before = torch.get_rng_state()
    points, _ = project(features)
    assert torch.equal(before, torch.get_rng_state())
    x = F.normalize(features.double(), dim=1)
    u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    signs = (expected * points).sum(dim=0).sign()
    torch.testing.assert_close(points.double(), expected * signs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("columns", [1024, 3])
def test_features_that_are_not_finite_are_refused(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, columns, 4)
    bank = torch.randn(9, 5)
    bank[7, 2] = torch.nan
    with pytest.raises(ValueError, match="features must be finite, got NaN or infinity"):
        nearest_neighbours(torch.randn(4, 5), bank, 2)


@pytest.mark.parametrize("size", [None, 8])
def test_images_that_are_no_pixels_are_refused_at_every_size(size: int | None) -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(2, 3, 12, 12)
    assert extract_features(backbone, images, size=size).shape == (2, 4)
    for wrong in (images * 255, images * 2 - 1, images * torch.nan):
        with pytest.raises(ValueError, match=r"must lie within 0 \.\.\. 1"):
            extract_features(backbone, wrong, size=size)
    for other in (images.long(), images.numpy()):
        with pytest.raises(TypeError, match="must be"):
            extract_features(backbone, other, size=size)  # type: ignore[arg-type]
