"""`mixmask map`, `mixmask neighbours` and `mixmask embed`: features, drawn or written."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixmask import evaluation
from mixmask.cli._console import say
from mixmask.cli.options import SOURCE, add_shared, results_folder
from mixmask.data.sets import Split
from mixmask.evaluation import gallery
from mixmask.figures.style import check_figure, save_figure
from mixmask.runs.files import atomic_write, check_files


# Any: the options of `SOURCE`, passed on as they are.
def draw_map(
    runs: list[Path],
    projection: str,
    seed: int,
    out: Path | None = None,
    force: bool = False,
    classes: list[str] | None = None,
    **source: Any,
) -> None:
    """Draw the features of the test split in two dimensions, one panel per run."""
    # A figure of several runs belongs to none of their folders.
    out = out or (results_folder(runs[0]) if len(runs) == 1 else Path()) / "map.png"
    check_figure(out, force=force)
    task = evaluation.load_task(*runs, labelled=False, **source)
    figure, title = gallery.draw_map(task, projection=projection, classes=classes, seed=seed)
    save_figure(figure, out)
    say(f"{title}, by {gallery.PROJECTIONS[projection]}\ndrew {out}")


def draw_neighbours(
    run: Path,
    queries: int,
    k: int,
    seed: int,
    out: Path | None = None,
    force: bool = False,
    **source: Any,
) -> None:
    """Draw images of the test split and the training images that the backbone finds nearest."""
    out = out or results_folder(run) / "neighbours.png"
    check_figure(out, force=force)
    task = evaluation.load_task(run, labelled=False, **source)
    figure, title = gallery.draw_neighbours(task, queries=queries, k=k, seed=seed)
    save_figure(figure, out)
    say(f"{title}\ndrew {out}")


def embed(run: Path, to: str, out: Path | None = None, force: bool = False, **source: Any) -> None:
    """Write the features of all images, and beside them the name of each row's image."""
    out = out or results_folder(run) / f"features.{to}"
    if out.suffix != f".{to}":
        raise ValueError(
            f"--out must name a .{to} file, got {out}; use {out.with_suffix(f'.{to}')}"
        )
    table = out.with_suffix(".csv")
    check_files(out, table, force=force)
    task = evaluation.load_task(run, labelled=False, **source)
    splits = {"train": task.train} | ({} if task.test is task.train else {"test": task.test})
    # The training images first.
    features = torch.cat([task.extract(s.images).cpu() for s in splits.values()])  # (N, D)
    rows = [row for name, split in splits.items() for row in _name_rows(name, split, task.classes)]
    with atomic_write(out, table) as (array, names):
        # NumPy's own writing to a file hides why it failed.
        content = io.BytesIO()
        np.save(content, features.numpy())
        array.write_bytes(content.getbuffer())
        # The names of files need not be UTF-8.
        text = names.open("w", newline="", encoding="utf-8", errors="backslashreplace")
        with text:
            csv.writer(text).writerows([("split", "class", "file"), *rows])
    origin = task.sources[0]
    say(
        f"{origin.title}: {len(features):,} images of {origin.data}, {features.shape[1]} features "
        f"each at {origin.image_size} px\nwrote {out} and {table}"
    )


def _name_rows(name: str, split: Split, classes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return split, class and file of each image; its number in the split where it has no file."""
    count = len(split.images)
    labels = [-1] * count if split.labels is None else split.labels.tolist()
    files = split.files or map(str, range(count))
    return [
        (name, classes[label] if label >= 0 else "", file)
        for label, file in zip(labels, files, strict=True)
    ]


def add_map(parser: argparse.ArgumentParser) -> None:
    """Add the options of `map`."""
    parser.description = (
        "Draw the features of the test split in two dimensions, one panel per run, coloured by "
        "class."
    )
    parser.set_defaults(command=draw_map)
    add_shared(parser, "runs")
    text = "PNG file to write [map.png beside the run; of several runs, in the current folder]"
    add_shared(parser, "--out", help=text)
    parser.add_argument(
        "--projection", choices=("pca", "tsne"), default="pca", help="tsne needs scikit-learn [pca]"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="classes to draw [all]")
    add_shared(parser, "--seed", *SOURCE, "--force")


def add_neighbours(parser: argparse.ArgumentParser) -> None:
    """Add the options of `neighbours`."""
    parser.description = (
        "Draw images of the test split, each with the training images that the backbone finds "
        "nearest; those of another class are framed."
    )
    parser.set_defaults(command=draw_neighbours)
    add_shared(parser, "run")
    add_shared(parser, "--out", help="PNG file to write [neighbours.png beside the run]")
    parser.add_argument("--queries", type=int, default=8, metavar="N", help="rows [8]")
    parser.add_argument("--k", type=int, default=8, metavar="N", help="neighbours per row [8]")
    add_shared(parser, "--seed", *SOURCE, "--force")


def add_embed(parser: argparse.ArgumentParser) -> None:
    """Add the options of `embed`."""
    parser.description = (
        "Write the features of all images of a data set, float32, and beside them a table with the "
        "split, the class and the file of each row."
    )
    parser.set_defaults(command=embed)
    add_shared(parser, "run")
    parser.add_argument("--to", choices=("npy",), default="npy", help="file format: NumPy's [npy]")
    text = "file to write, and a .csv of that name [features.npy beside the run]"
    add_shared(parser, "--out", help=text)
    add_shared(parser, *SOURCE, "--force")
