"""`mixmask embed`."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixmask.cli._console import say
from mixmask.cli.features import SOURCE, add_force, load
from mixmask.cli.options import add_shared
from mixmask.evaluation import Task
from mixmask.runs.folder import atomic_write, check_files


# Any: the options of SOURCE, passed on as they are.
def embed(
    run: Path,
    to: str,
    out: Path | None = None,
    force: bool = False,
    device: str | None = None,
    **options: Any,
) -> None:
    """Write the features of all images, and beside them the name of each row's image."""
    out = out or Path(f"features.{to}")
    if out.suffix != f".{to}":
        raise ValueError(
            f"--out must name a .{to} file, got {out}; use {out.with_suffix(f'.{to}')}"
        )
    table = out.with_suffix(".csv")
    check_files(out, table, force=force)
    task = load([run], device, **options)
    splits = [task.train] if task.test is task.train else [task.train, task.test]
    # The training images first.
    features = torch.cat([task.extract(split.images).cpu() for split in splits])  # (N, D)
    with atomic_write(out, table) as (array, names):
        with array.open("wb") as file:
            np.save(file, features.numpy())
        with names.open("w", newline="", encoding="utf-8") as text:
            csv.writer(text).writerows([("split", "class", "file"), *_name_rows(task)])
    source = task.sources[0]
    say(
        f"{source.title}: {len(features):,} images of {source.data}, {features.shape[1]} features "
        f"each at {source.image_size} px\nwrote {out} and {table}"
    )


def _name_rows(task: Task) -> list[tuple[str, str, str]]:
    """Return split, class and file of each image; its number in the split where it has no file."""
    rows = []
    for name, split in {"train": task.train, "test": task.test}.items():
        if name == "test" and split is task.train:
            break
        count = len(split.images)
        labels = [-1] * count if split.labels is None else split.labels.tolist()
        for label, file in zip(labels, split.files or map(str, range(count)), strict=True):
            rows.append((name, task.classes[label] if label >= 0 else "", file))
    return rows


def add_embed(parser: argparse.ArgumentParser) -> None:
    """Add the options of `embed`."""
    parser.description = (
        "Write the features of all images of a data set, float32, and beside them a table with the "
        "split, the class and the file of each row."
    )
    parser.set_defaults(command=embed)
    add_shared(parser, "run")
    parser.add_argument("--to", choices=("npy",), default="npy", help="format [npy]")
    add_shared(parser, "--out", help="file to write, and a .csv beside it [features.npy]")
    add_shared(parser, *SOURCE)
    add_force(parser)
