"""`mixmask embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixmask.cli._console import say
from mixmask.cli.features import SOURCE, add_force, check_free, load
from mixmask.cli.options import add_shared


def embed(run: Path, to: str, out: Path | None, force: bool, **source: Any) -> None:
    """Write the features of all images, and beside them the name of each row's image."""
    from mixmask.evaluation import write_features

    out = out or Path(f"features.{to}")
    if out.suffix != f".{to}":
        raise ValueError(
            f"--out must name a .{to} file, got {out}; use {out.with_suffix(f'.{to}')}"
        )
    table = out.with_suffix(".csv")
    check_free(out, table, force=force)
    task = load([run], **source)
    splits = {"train": task.train} | ({} if task.test is task.train else {"test": task.test})
    images, width = write_features(task.backbones[0], splits, out, task.classes)
    say(
        f"{task.sources[0].title}: {images:,} images of {task.sources[0].data}, {width} features "
        f"each at {task.feature_size} px\nwrote {out} and {table}"
    )


def add_embed(commands: Any) -> None:
    """Add `embed`."""
    parser = commands.add_parser(
        "embed",
        help="write features of images, with the images' names",
        description="Write the features of all images of a data set, float32, and beside them a "
        "table with the split, the class and the file of each row.",
    )
    parser.set_defaults(command=embed)
    add_shared(parser, "run")
    parser.add_argument("--to", choices=("npy",), default="npy", help="format [npy]")
    add_shared(parser, "--out", help="file to write, and a .csv beside it [features.npy]")
    add_shared(parser, *SOURCE)
    add_force(parser)
