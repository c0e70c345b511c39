"""Images as backbones see them: maps of features in two dimensions, and nearest neighbours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask._checks import check_choice, few
from mixmask._seeds import check_seed
from mixmask.evaluation.neighbours import nearest_neighbours
from mixmask.evaluation.tasks import Task
from mixmask.figures.features import figure_map, figure_neighbours
from mixmask.figures.style import short_path
from mixmask.runs.options import check_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECTIONS = {"pca": "PCA", "tsne": "t-SNE"}
# More points hide each other, and t-SNE would take minutes.
_MOST_POINTS = 5000
# Directions of variance that t-SNE starts from, and rounds that find them.
_DIRECTIONS, _ROUNDS = 50, 8
_NAMED_CLASSES = 20


def draw_map(
    task: Task, *, projection: str = "pca", classes: Sequence[str] | None = None, seed: int = 0
) -> tuple[Figure, str]:
    """Draw the features of the test images in two dimensions, one panel per backbone.

    Args:
        task: Backbones and images, see `load_task`.
        projection: "pca" or "tsne", see `project`.
        classes: Names of those to draw. Default: all.
        seed: Of t-SNE, and of which images are drawn where there are more than 5,000.

    Returns:
        The figure, and in one line what it shows.

    Raises:
        ValueError: If classes are named and there are no labels, or no such class.
    """
    check_seed(seed)
    index, labels = _choose_classes(task, classes), task.test.labels
    if len(index) > _MOST_POINTS:
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
        index = index[order[:_MOST_POINTS].sort().values]
    maps = []
    for number, source in enumerate(task.sources):
        features = task.extract(task.test.images[index], number)  # (n, D)
        maps.append((source.title, *project(features, method=projection, seed=seed)))
    split = "training" if task.test is task.train else "test"
    images = f"{len(task.test.images):,} {split} images"
    title = f"{short_path(task.sources[0].data)}, {len(index):,} of {images}"
    labels = None if labels is None else labels[index]
    return figure_map(maps, labels, task.classes, title=title), title


def draw_neighbours(
    task: Task, *, queries: int = 8, k: int = 8, seed: int = 0
) -> tuple[Figure, str]:
    """Draw test images, each with the training images that the first backbone finds nearest.

    Args:
        task: Backbone and images, see `load_task`.
        queries: Number of test images to ask for, see `choose_queries`.
        k: Number of neighbours of each; an image is not its own neighbour.
        seed: Of which images are asked for.

    Returns:
        The figure, and in one line what it shows.
    """
    check_seed(seed)
    bank, shown = task.train.images, task.test.images
    check_range("queries", queries, 1, len(shown))
    generator = torch.Generator().manual_seed(seed)
    chosen = choose_queries(task.test.labels, len(shown), queries, generator)
    own = chosen if task.test is task.train else None
    check_range("k", k, 1, len(bank) - (own is not None))
    x_bank = task.extract(bank)  # (N, D)
    x = task.extract(shown[chosen])  # (M, D)
    similarity, index = (part.cpu() for part in nearest_neighbours(x, x_bank, k, own=own))
    title, names = f"{task.sources[0].title}: {short_path(task.sources[0].data)}", None
    if task.test.labels is not None and task.train.labels is not None:
        labels, others = task.test.labels[chosen], task.train.labels[index]  # (M,), (M, k)
        names = [
            (task.classes[label], [task.classes[other] for other in row])
            for label, row in zip(labels.tolist(), others.tolist(), strict=True)
        ]
        same = int((others == labels[:, None]).sum())
        title += f", {same} of {index.numel()} neighbours are of the query's class"
    figure = figure_neighbours(shown[chosen], bank[index], similarity, names=names, title=title)
    return figure, title


def _choose_classes(task: Task, names: Sequence[str] | None) -> Tensor:
    """Return the indices (n,) of the test images of some classes, or of all."""
    labels = task.test.labels
    if names is None:
        return torch.arange(len(task.test.images))
    if labels is None:
        data = task.sources[0].data
        raise ValueError(f"--classes needs labels, and {data} has none; leave it out")
    for name in names:
        if name not in task.classes:
            known = few(task.classes, _NAMED_CLASSES)
            raise ValueError(f"--classes must be among {known}; got {name}")
    wanted = torch.tensor([task.classes.index(name) for name in names])
    return torch.isin(labels, wanted).nonzero()[:, 0]


def choose_queries(
    labels: Tensor | None, images: int, wanted: int, generator: torch.Generator
) -> Tensor:
    """Choose images at random, one of each class before a second of any.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 2])
        >>> chosen = choose_queries(labels, 5, 3, torch.Generator().manual_seed(0))
        >>> sorted(labels[chosen].tolist())
        [0, 1, 2]
    """
    order = torch.randperm(images, generator=generator)
    if labels is None:
        return order[:wanted]
    # How many of its class come before each image.
    seen: defaultdict[int, count[int]] = defaultdict(count)
    rounds = [next(seen[label]) for label in labels[order].tolist()]
    return order[torch.tensor(rounds).sort(stable=True).indices[:wanted]]


@torch.no_grad()
def project(
    features: Tensor, *, method: str = "pca", seed: int = 0
) -> tuple[Tensor, tuple[str, str]]:
    """Lay features out in two dimensions, by their directions alone, as neighbours are found.

    Args:
        features: (N, D), N of at least 3.
        method: "pca", the two directions of most variance (`torch.pca_lowrank`), or "tsne"
            (scikit-learn's).
        seed: Of both.

    Returns:
        Points (N, 2) float32, and what their two axes are.

    Raises:
        ValueError: If there are fewer than 3 features, or scikit-learn is missing for t-SNE.

    Source:
        van der Maaten and Hinton, "Visualizing Data using t-SNE".

    Example:
        >>> project(torch.randn(9, 4))[0].shape
        torch.Size([9, 2])
    """
    check_choice("method", method, tuple(PROJECTIONS))
    check_seed(seed)
    if len(features) < 3:
        raise ValueError(f"a map needs at least 3 images, got {len(features)}; use more")
    x = F.normalize(features.cpu().double(), dim=1)
    x = x - x.mean(dim=0)  # (N, D)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # The search for directions begins at random.
        _, deviations, directions = torch.pca_lowrank(
            x, min(_DIRECTIONS, *x.shape), center=False, niter=_ROUNDS
        )
    # Either sign of a direction is right; this one does not depend on the library.
    largest = directions.abs().argmax(dim=0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()  # (D, up to 50)
    points = x @ directions  # (N, up to 50)
    if method == "tsne":
        return _tsne(points, seed), ("t-SNE, first axis", "t-SNE, second axis")
    first, second = (100 * deviations[:2].square() / x.square().sum().clamp_min(1e-12)).tolist()
    axes = f"first component, {first:.0f} %", f"second component, {second:.0f} %"
    return points[:, :2].float(), (f"{axes[0]} of the variance", f"{axes[1]} of the variance")


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
