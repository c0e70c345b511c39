"""`mixmask map` and `mixmask neighbours`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mixmask import evaluation
from mixmask.cli._console import say
from mixmask.cli.options import add_shared, choose_device
from mixmask.evaluation import gallery
from mixmask.figures.style import save_figure
from mixmask.runs.folder import check_files

SOURCE = ("--data", "--image-size", "--arch", "--small-stem", "--device", "--threads")


# Any: the options of SOURCE, passed on as they are.
def draw_map(
    runs: list[Path],
    out: Path,
    projection: str,
    seed: int,
    force: bool = False,
    classes: list[str] | None = None,
    device: str | None = None,
    **source: Any,
) -> None:
    """Draw the features of the test split in two dimensions, one panel per run."""
    check_files(out, force=force)
    task = load(runs, device, **source)
    drawn = gallery.draw_map(task, projection=projection, classes=classes, seed=seed)
    save_figure(drawn.figure, out)
    say(f"{drawn.title}, by {gallery.PROJECTIONS[projection]}\ndrew {out}")


def draw_neighbours(
    run: Path,
    out: Path,
    queries: int,
    k: int,
    seed: int,
    force: bool = False,
    device: str | None = None,
    **source: Any,
) -> None:
    """Draw images of the test split and the training images that the backbone finds nearest."""
    check_files(out, force=force)
    task = load([run], device, **source)
    drawn = gallery.draw_neighbours(task, queries=queries, k=k, seed=seed)
    save_figure(drawn.figure, out)
    say(f"{drawn.title}\ndrew {out}")


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add `--force`."""
    parser.add_argument("--force", action="store_true", help="replace existing files")


def load(runs: list[Path], device: str | None, **source: Any) -> evaluation.Task:
    """Load backbones and the images to show, with or without labels."""
    return evaluation.load_task(*runs, device=choose_device(device), labelled=False, **source)


def add_map(parser: argparse.ArgumentParser) -> None:
    """Add the options of `map`."""
    parser.description = (
        "Draw the features of the test split in two dimensions, one panel per run, coloured by "
        "class."
    )
    parser.set_defaults(command=draw_map)
    add_shared(parser, "runs")
    add_shared(parser, "--out", default=Path("map.png"), help="PNG file to write [map.png]")
    parser.add_argument(
        "--projection", choices=("pca", "tsne"), default="pca", help="tsne needs scikit-learn [pca]"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="classes to draw [all]")
    add_shared(parser, "--seed", *SOURCE)
    add_force(parser)


def add_neighbours(parser: argparse.ArgumentParser) -> None:
    """Add the options of `neighbours`."""
    parser.description = (
        "Draw images of the test split, each with the training images that the backbone finds "
        "nearest; those of another class are framed."
    )
    parser.set_defaults(command=draw_neighbours)
    add_shared(parser, "run")
    out = Path("neighbours.png")
    add_shared(parser, "--out", default=out, help=f"PNG file to write [{out}]")
    parser.add_argument("--queries", type=int, default=8, metavar="N", help="rows [8]")
    parser.add_argument("--k", type=int, default=8, metavar="N", help="neighbours per row [8]")
    add_shared(parser, "--seed", *SOURCE)
    add_force(parser)
