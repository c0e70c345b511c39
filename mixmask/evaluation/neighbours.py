"""Looking at features: their nearest neighbours, and maps of two dimensions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask._checks import check_choice

PROJECTIONS = ("pca", "tsne")


class Projection(NamedTuple):
    """A map of features: points (N, 2) float32 and what its two axes are."""

    points: Tensor
    axes: tuple[str, str]


@torch.no_grad()
def nearest_neighbours(
    queries: Tensor, bank: Tensor, k: int, *, own: Tensor | None = None, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Find the most cosine-similar features.

    Args:
        queries: (M, D) features.
        bank: (N, D) features on the same device.
        k: Number of neighbours.
        own: (M,) int64, where in the bank each query lies itself; it is no neighbour of its own.
        chunk: Queries at a time, which bounds the memory at chunk * N.

    Returns:
        Similarities and indices into the bank, (M, k) each, the most similar first.

    Raises:
        ValueError: If the bank has fewer than k features, beside a query's own.

    Example:
        >>> nearest_neighbours(torch.eye(3)[:1], torch.eye(3), 1)[1]
        tensor([[0]])
    """
    most = len(bank) - (own is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k must be within 1 ... {most}, as many images as there are, got {k}")
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    found = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T
        if own is not None:
            column = own[start : start + chunk, None].to(bank.device)
            similarity.scatter_(1, column, float("-inf"))
        found.append(similarity.topk(k, dim=1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


@torch.no_grad()
def project(features: Tensor, *, method: str = "pca", seed: int = 0) -> Projection:
    """Lay features out in two dimensions, by their directions alone, as neighbours are found.

    Args:
        features: (N, D), N of at least 3.
        method: "pca", the two directions of most variance, or "tsne" (scikit-learn's).
        seed: Of t-SNE.

    Raises:
        ValueError: If there are fewer than 3 features, or t-SNE is asked for without scikit-learn.

    Source:
        van der Maaten and Hinton, "Visualizing Data using t-SNE".

    Example:
        >>> project(torch.randn(9, 4)).points.shape
        torch.Size([9, 2])
    """
    check_choice("method", method, PROJECTIONS)
    if len(features) < 3:
        raise ValueError(f"a map needs at least 3 images, got {len(features)}; use more")
    x = F.normalize(features.cpu().double(), dim=1)
    x = x - x.mean(dim=0)
    values, directions = torch.linalg.eigh(x.T @ x)  # In ascending order.
    count = min(50, x.shape[1]) if method == "tsne" else 2
    values, directions = values.flip(0)[:count], directions.flip(1)[:, :count]
    # Either sign of a direction is right; this one does not depend on the library.
    largest = directions.abs().argmax(dim=0, keepdim=True)
    points = x @ (directions * directions.gather(0, largest).sign())
    if method == "tsne":
        return Projection(_tsne(points, seed), ("t-SNE, first axis", "t-SNE, second axis"))
    shares = 100 * values / x.square().sum().clamp_min(1e-12)
    names = [
        f"{name} component, {share:.0f} % of the variance"
        for name, share in zip(("first", "second"), shares.tolist(), strict=True)
    ]
    return Projection(points.float(), (names[0], names[1]))


def _tsne(points: Tensor, seed: int) -> Tensor:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError(
            "t-SNE needs scikit-learn, which is not installed; pip install scikit-learn, or use pca"
        ) from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return torch.from_numpy(tsne.fit_transform(points.float().numpy()))
