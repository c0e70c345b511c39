"""`mixmask map` and `mixmask neighbours`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mixmask.cli._console import check_out, labelled_splits, say

if TYPE_CHECKING:
    from mixmask.checkpoints.load import Loaded
    from mixmask.data.sets import Images

# More points hide each other, and t-SNE would take minutes.
_MOST_POINTS = 5000


class _Images(NamedTuple):
    """Images to look at, their labels where known, and the images to find neighbours among."""

    data: str
    shown: Images
    labels: Tensor | None
    bank: Images
    bank_labels: Tensor | None
    classes: tuple[str, ...]
    split: str


def draw_map(
    runs: list[Path],
    out: Path,
    projection: str,
    classes: list[str] | None,
    seed: int,
    **source: Any,
) -> None:
    """Draw the test split's features in two dimensions, a panel a run."""
    from mixmask.evaluation.neighbours import project
    from mixmask.figures.features import figure_map
    from mixmask.figures.style import save_figure

    check_out(out)
    loaded, images = _load(runs, **source)
    index = _choose_classes(images, classes)
    count = len(index)
    if count > _MOST_POINTS:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        index = index[order[:_MOST_POINTS].sort().values]
    maps = []
    for run, each in zip(runs, loaded, strict=True):
        features = _features(each.backbone, images.shown[index])
        points, axes = project(features, method=projection, seed=seed)
        maps.append((_name(run), points, axes))
    title = f"{images.data}, {len(index):,} of {len(images.shown):,} {images.split} images"
    labels = None if images.labels is None else images.labels[index]
    save_figure(figure_map(maps, labels, images.classes, title=title), out)
    say(f"{title}, by {'t-SNE' if projection == 'tsne' else 'PCA'}\ndrew {out}")


def draw_neighbours(run: Path, out: Path, queries: int, k: int, seed: int, **source: Any) -> None:
    """Draw images of the test split and the training images that the backbone finds nearest."""
    from mixmask.evaluation.neighbours import nearest_neighbours
    from mixmask.figures.features import figure_neighbours
    from mixmask.figures.style import save_figure

    check_out(out)
    (loaded,), images = _load([run], **source)
    if not 1 <= queries <= len(images.shown):
        raise ValueError(
            f"--queries must be within 1 ... {len(images.shown)}, the {images.split} images, "
            f"got {queries}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = choose_queries(images.labels, len(images.shown), queries, generator)
    itself = chosen if images.shown is images.bank else None
    most = len(images.bank) - (itself is not None)
    if not 1 <= k <= most:
        raise ValueError(f"--k must be within 1 ... {most}, the images to find, got {k}")
    bank = _features(loaded.backbone, images.bank)
    asked = _features(loaded.backbone, images.shown[chosen])
    similarity, found = (t.cpu() for t in nearest_neighbours(asked, bank, k, own=itself))
    names, right = None, ""
    if images.labels is not None and images.bank_labels is not None:
        own, others = images.labels[chosen], images.bank_labels[found]
        names = [
            (images.classes[label], [images.classes[other] for other in row])
            for label, row in zip(own.tolist(), others.tolist(), strict=True)
        ]
        same = int((others == own[:, None]).sum())
        right = f", {same} of {found.numel()} neighbours are of the query's class"
    title = f"{_name(run)}: {images.data}{right}"
    figure = figure_neighbours(
        images.shown[chosen], images.bank[found], similarity, names=names, title=title
    )
    save_figure(figure, out)
    say(f"{title}\ndrew {out}")


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
    seen: dict[int, int] = {}
    rounds = []
    for label in labels[order].tolist():
        seen[label] = seen.get(label, 0) + 1
        rounds.append(seen[label])
    return order[torch.tensor(rounds).sort(stable=True).indices[:count]]


def _load(
    runs: Sequence[Path],
    data: str | None,
    arch: str | None,
    small_stem: bool | None,
    image_size: int | None,
) -> tuple[list[Loaded], _Images]:
    """Load backbones and the data that they were trained on, or that is asked for."""
    from mixmask.checkpoints.load import load_backbone

    loaded = [load_backbone(run, arch=arch, small_stem=small_stem) for run in runs]
    names = {str(name) for each in loaded if (name := data or each.config.get("data"))}
    if len(names) != 1:
        told = f"used {', '.join(sorted(names))}" if names else "do not say which data they used"
        raise ValueError(f"the runs {told}; name the data to look at with --data")
    sizes = [size for each in loaded if (size := image_size or each.config.get("image_size"))]
    return loaded, _load_images(names.pop(), max(sizes, default=224))


def _load_images(name: str, image_size: int) -> _Images:
    from mixmask.data.sets import load_data

    data = load_data(name, image_size)
    if data.labelled:
        (bank, bank_labels), (shown, labels) = labelled_splits(data)
        return _Images(name, shown, labels, bank, bank_labels, data.classes, "test")
    bank = data.train.images
    if data.test is not None:
        return _Images(name, data.test.images, None, bank, None, data.classes, "test")
    return _Images(name, bank, data.train.labels, bank, data.train.labels, data.classes, "training")


def _choose_classes(images: _Images, classes: Sequence[str] | None) -> Tensor:
    """Return the indices of the images of some classes, or of all."""
    if classes is None:
        return torch.arange(len(images.shown))
    if images.labels is None:
        raise ValueError(f"--classes needs labels, and {images.data} has none; leave it out")
    for name in classes:
        if name not in images.classes:
            known = ", ".join(images.classes[:20]) + (", …" if len(images.classes) > 20 else "")
            raise ValueError(f"--classes must be among {known}; got {name}")
    wanted = torch.tensor([images.classes.index(name) for name in classes])
    return torch.isin(images.labels, wanted).nonzero()[:, 0]


def _features(backbone: nn.Module, images: Images) -> Tensor:
    from mixmask.evaluation import extract_features

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return extract_features(backbone.to(device), images)


def _name(run: Path) -> str:
    """Name a run by the end of its path."""
    return "/".join(run.resolve().parts[-2:])


def add_map(commands: Any) -> None:
    """Add `map`."""
    from mixmask.evaluation.neighbours import PROJECTIONS

    parser = commands.add_parser(
        "map",
        help="draw features in two dimensions, coloured by class",
        description="Draw the features of the test split in two dimensions, a panel a run, "
        "coloured by class.",
    )
    parser.set_defaults(command=draw_map)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument("--out", type=Path, default=Path("map.png"), help="the PNG to write")
    parser.add_argument(
        "--projection", choices=PROJECTIONS, default="pca", help="tsne needs scikit-learn [pca]"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="draw these alone")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE, and of which images [0]")
    _add_source(parser)


def add_neighbours(commands: Any) -> None:
    """Add `neighbours`."""
    parser = commands.add_parser(
        "neighbours",
        help="draw images and those that a backbone finds nearest",
        description="Draw images of the test split, each with the training images that the "
        "backbone finds nearest; those of another class are framed.",
    )
    parser.set_defaults(command=draw_neighbours)
    parser.add_argument("run", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument("--out", type=Path, default=Path("neighbours.png"), help="the PNG to write")
    parser.add_argument("--queries", type=int, default=8, metavar="N", help="rows [8]")
    parser.add_argument("--k", type=int, default=8, metavar="N", help="neighbours of each [8]")
    parser.add_argument("--seed", type=int, default=0, help="of which images are asked for [0]")
    _add_source(parser)


_RUN = "a run folder or a checkpoint file"


def _add_source(parser: argparse.ArgumentParser) -> None:
    """Add what a checkpoint of others does not tell."""
    parser.add_argument("--data", help="data set or folder to look at [the run's own]")
    parser.add_argument("--arch", help="backbone of the checkpoint [the run's own]")
    parser.add_argument(
        "--small-stem", action=argparse.BooleanOptionalAction, help="its stem [the run's own]"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="size of a folder's images [the run's own]"
    )
