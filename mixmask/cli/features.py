"""`mixmask map` and `mixmask neighbours`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmask.cli._console import check_out, say
from mixmask.cli.options import add_shared, choose_device

if TYPE_CHECKING:
    from mixmask.evaluation import Task

SOURCE = ("--data", "--image-size", "--arch", "--small-stem", "--device", "--threads")


def draw_map(
    runs: list[Path],
    out: Path,
    projection: str,
    classes: list[str] | None,
    seed: int,
    force: bool,
    **source: Any,
) -> None:
    """Draw the features of the test split in two dimensions, one panel per run."""
    from mixmask.evaluation import gallery
    from mixmask.figures.style import save_figure

    check_free(out, force=force)
    task = load(runs, **source)
    drawn = gallery.draw_map(task, projection=projection, classes=classes, seed=seed)
    save_figure(drawn.figure, out)
    say(f"{drawn.title}, by {gallery.PROJECTIONS[projection]}\ndrew {out}")


def draw_neighbours(
    run: Path, out: Path, queries: int, k: int, seed: int, force: bool, **source: Any
) -> None:
    """Draw images of the test split and the training images that the backbone finds nearest."""
    from mixmask.evaluation import gallery
    from mixmask.figures.style import save_figure

    check_free(out, force=force)
    task = load([run], **source)
    drawn = gallery.draw_neighbours(task, queries=queries, k=k, seed=seed)
    save_figure(drawn.figure, out)
    say(f"{drawn.title}\ndrew {out}")


def check_free(*files: Path, force: bool) -> None:
    """Refuse files to write that cannot be, or are there already, before any work for them."""
    for file in files:
        check_out(file)
        if file.exists() and not force:
            raise ValueError(f"{file} exists; name another --out, or overwrite it with --force")


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add `--force`."""
    parser.add_argument("--force", action="store_true", help="replace existing files")


def load(runs: list[Path], device: str | None, **source: Any) -> Task:
    """Load backbones and the images to show, with or without labels."""
    from mixmask.evaluation import load_task

    return load_task(*runs, device=choose_device(device), labelled=False, **source)


def add_map(commands: Any) -> None:
    """Add `map`."""
    parser = commands.add_parser(
        "map",
        help="draw features in two dimensions, coloured by class",
        description="Draw the features of the test split in two dimensions, one panel per run, "
        "coloured by class.",
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


def add_neighbours(commands: Any) -> None:
    """Add `neighbours`."""
    parser = commands.add_parser(
        "neighbours",
        help="draw images and those that a backbone finds nearest",
        description="Draw images of the test split, each with the training images that the "
        "backbone finds nearest; those of another class are framed.",
    )
    parser.set_defaults(command=draw_neighbours)
    add_shared(parser, "run")
    out = Path("neighbours.png")
    add_shared(parser, "--out", default=out, help=f"PNG file to write [{out}]")
    parser.add_argument("--queries", type=int, default=8, metavar="N", help="rows [8]")
    parser.add_argument("--k", type=int, default=8, metavar="N", help="neighbours per row [8]")
    add_shared(parser, "--seed", *SOURCE)
    add_force(parser)
