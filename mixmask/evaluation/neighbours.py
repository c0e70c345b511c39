"""Nearest neighbours by cosine similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Normalised features of the bank at a time, in numbers: 64 MiB.
_FEATURES = 2**24
# Similarities at a time: 128 MiB.
_SIMILARITIES = 2**25
# Neighbours are sought among the maxima of so many columns each.
_GROUP = 4


def nearest_neighbours(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    own: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the most cosine-similar features, the most similar first.

    Args:
        queries: (M, D) floating features.
        bank: (N, D) floating features.
        k: Number of neighbours.
        own: (M,) int64, where each query is in the bank itself; it is not its own neighbour.
        chunk: Features of either at a time. Default: as about 250 MiB allow.

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
    similarity, index = search(queries, bank, k, own=own, chunk=chunk)
    similarity, order = similarity.sort(dim=1, descending=True)
    return similarity, index.gather(1, order)


@torch.no_grad()
def search(
    queries: Tensor, bank: Tensor, k: int, *, own: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find neighbours as `nearest_neighbours` does, in no order, with k of at most N."""
    columns = min(chunk or max(_FEATURES // bank.shape[1], 1024), len(bank))
    rows = min(chunk or max(_SIMILARITIES // columns, 1), len(queries))
    nearest = torch.full((len(queries), k), -torch.inf, device=bank.device)
    places = torch.zeros(len(queries), k, dtype=torch.int64, device=bank.device)
    # One block for all similarities: allocated anew, its pages cost as much as the selection.
    space = torch.empty(rows * columns, device=bank.device)
    for start in range(0, len(bank), columns):
        keys = _unit(bank[start : start + columns], "train")
        for first in range(0, len(queries), rows):
            here = slice(first, first + rows)
            q = _unit(queries[here].to(bank.device), "test")
            block = space[: len(q) * len(keys)].view(len(q), len(keys))
            torch.mm(q, keys.T, out=block)
            if own is not None:
                _hide(block, own[here].to(bank.device) - start)
            values, index = _largest(block, min(k, len(keys)))
            index += start
            if start > 0 or values.shape[1] < k:
                values = torch.cat([nearest[here], values], dim=1)
                index = torch.cat([places[here], index], dim=1)
                values, best = values.topk(k, dim=1, sorted=False)
                index = index.gather(1, best)
            nearest[here], places[here] = values, index
    return nearest, places


def _hide(similarity: Tensor, columns: Tensor) -> None:
    """Take one column of each row out of the search, where it lies within (n, m)."""
    inside = ((columns >= 0) & (columns < similarity.shape[1])).nonzero()[:, 0]
    similarity[inside, columns[inside]] = -torch.inf


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
