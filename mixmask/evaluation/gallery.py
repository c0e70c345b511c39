"""Images as backbones see them: maps of features in two dimensions, and nearest neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask._checks import check_choice
from mixmask.data.sets import Images, load_data
from mixmask.evaluation.features import extract_features
from mixmask.evaluation.neighbours import nearest_neighbours
from mixmask.evaluation.tasks import load_sources
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


@dataclass(frozen=True)
class Gallery:
    """Backbones, images to show, and a bank of images that are searched for neighbours.

    Attributes:
        backbones: Name of the run and backbone, (n, 3, H, W) -> (n, D), each.
        data: Name of the data set, or the folder.
        split: Which images are shown: "test" or "training".
        shown: (M, 3, H, W) uint8.
        labels: (M,) int64; None where they are not known.
        bank: (N, 3, H, W) uint8, the training images; `shown` itself where there are no others.
        bank_labels: (N,) int64; None where they are not known.
        classes: Names of the classes.
    """

    backbones: Sequence[tuple[str, nn.Module]]
    data: str
    split: str
    shown: Images
    labels: Tensor | None
    bank: Images
    bank_labels: Tensor | None
    classes: tuple[str, ...]

    def choose_classes(self, names: Sequence[str] | None) -> Tensor:
        """Return the indices of the shown images of some classes, or of all.

        Raises:
            ValueError: If there are no labels, or no such class.
        """
        if names is None:
            return torch.arange(len(self.shown))
        if self.labels is None:
            raise ValueError(f"--classes needs labels, and {self.data} has none; leave it out")
        for name in names:
            if name not in self.classes:
                known = ", ".join(self.classes[:_NAMED_CLASSES])
                more = ", …" if len(self.classes) > _NAMED_CLASSES else ""
                raise ValueError(f"--classes must be among {known}{more}; got {name}")
        wanted = torch.tensor([self.classes.index(name) for name in names])
        return torch.isin(self.labels, wanted).nonzero()[:, 0]


def load_gallery(
    runs: Sequence[Path],
    *,
    data: str | None = None,
    image_size: int | None = None,
    arch: str | None = None,
    small_stem: bool | None = None,
    device: torch.device | str = "cpu",
) -> Gallery:
    """Load backbones and the images that they share; the arguments are those of `load_task`.

    The test split is shown where there is one, and labels are not needed.

    Raises:
        ValueError: If a checkpoint or the data cannot be loaded, or the runs used different data.
    """
    loaded, name, size = load_sources(
        runs, data=data, image_size=image_size, arch=arch, small_stem=small_stem, device=device
    )
    names = [short_path(run.resolve()) for run in runs]
    backbones = [(name, each.backbone) for name, each in zip(names, loaded, strict=True)]
    images = load_data(name, size)
    train, test, labels, bank_labels = images.train, images.test, None, None
    bank = train.images
    if images.labelled:
        (bank, bank_labels), (shown, labels) = images.labelled_splits()
    elif test is not None:
        shown = test.images
    else:
        shown, labels, bank_labels = bank, train.labels, train.labels
    split = "training" if test is None else "test"
    return Gallery(backbones, name, split, shown, labels, bank, bank_labels, images.classes)


class Drawing(NamedTuple):
    """A figure, and in one line what it shows."""

    figure: Figure
    title: str


def draw_map(
    gallery: Gallery,
    *,
    projection: str = "pca",
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Drawing:
    """Draw the features of the shown images in two dimensions, one panel per backbone.

    Args:
        gallery: Backbones and images, see `load_gallery`.
        projection: "pca" or "tsne", see `project`.
        classes: Names of those to draw. Default: all.
        seed: Of t-SNE, and of which images are drawn where there are more than 5,000.
    """
    index = gallery.choose_classes(classes)
    if len(index) > _MOST_POINTS:
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
        index = index[order[:_MOST_POINTS].sort().values]
    maps = []
    for name, backbone in gallery.backbones:
        features = extract_features(backbone, gallery.shown[index])  # (n, D)
        maps.append((name, *project(features, method=projection, seed=seed)))
    data, images = short_path(gallery.data), f"{len(gallery.shown):,} {gallery.split} images"
    title = f"{data}, {len(index):,} of {images}"
    labels = None if gallery.labels is None else gallery.labels[index]
    return Drawing(figure_map(maps, labels, gallery.classes, title=title), title)


def draw_neighbours(gallery: Gallery, *, queries: int = 8, k: int = 8, seed: int = 0) -> Drawing:
    """Draw shown images, each with the images of the bank that the first backbone finds nearest.

    Args:
        gallery: Backbone and images, see `load_gallery`.
        queries: Number of shown images to ask for, see `choose_queries`.
        k: Number of neighbours of each; an image is not its own neighbour.
        seed: Of which images are asked for.
    """
    check_range("queries", queries, 1, len(gallery.shown))
    generator = torch.Generator().manual_seed(seed)
    chosen = choose_queries(gallery.labels, len(gallery.shown), queries, generator)
    own = chosen if gallery.shown is gallery.bank else None
    check_range("k", k, 1, len(gallery.bank) - (own is not None))
    run, backbone = gallery.backbones[0]
    bank = extract_features(backbone, gallery.bank)
    asked = extract_features(backbone, gallery.shown[chosen])
    similarity, index = (part.cpu() for part in nearest_neighbours(asked, bank, k, own=own))
    title, names = f"{run}: {short_path(gallery.data)}", None
    if gallery.labels is not None and gallery.bank_labels is not None:
        labels, others = gallery.labels[chosen], gallery.bank_labels[index]  # (M,), (M, k)
        names = [
            (gallery.classes[label], [gallery.classes[other] for other in row])
            for label, row in zip(labels.tolist(), others.tolist(), strict=True)
        ]
        same = int((others == labels[:, None]).sum())
        title += f", {same} of {index.numel()} neighbours are of the query's class"
    figure = figure_neighbours(
        gallery.shown[chosen], gallery.bank[index], similarity, names=names, title=title
    )
    return Drawing(figure, title)


def choose_queries(
    labels: Tensor | None, images: int, count: int, generator: torch.Generator
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
        return order[:count]
    seen: Counter[int] = Counter()
    rounds = []
    for label in labels[order].tolist():
        seen[label] += 1
        rounds.append(seen[label])
    return order[torch.tensor(rounds).sort(stable=True).indices[:count]]


class Projection(NamedTuple):
    """A map of features: points (N, 2) float32 and what its two axes are."""

    points: Tensor
    axes: tuple[str, str]


@torch.no_grad()
def project(features: Tensor, *, method: str = "pca", seed: int = 0) -> Projection:
    """Lay features out in two dimensions, by their directions alone, as neighbours are found.

    Args:
        features: (N, D), N of at least 3.
        method: "pca", the two directions of most variance (`torch.pca_lowrank`), or "tsne"
            (scikit-learn's).
        seed: Of both.

    Raises:
        ValueError: If there are fewer than 3 features, or scikit-learn is missing for t-SNE.

    Source:
        van der Maaten and Hinton, "Visualizing Data using t-SNE".

    Example:
        >>> project(torch.randn(9, 4)).points.shape
        torch.Size([9, 2])
    """
    check_choice("method", method, tuple(PROJECTIONS))
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
    points = x @ (directions * directions.gather(0, largest).sign())  # (N, up to 50)
    if method == "tsne":
        return Projection(_tsne(points, seed), ("t-SNE, first axis", "t-SNE, second axis"))
    first, second = (100 * deviations[:2].square() / x.square().sum().clamp_min(1e-12)).tolist()
    return Projection(
        points[:, :2].float(),
        (
            f"first component, {first:.0f} % of the variance",
            f"second component, {second:.0f} % of the variance",
        ),
    )


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
