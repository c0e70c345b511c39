"""`mixmask export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mixmask.checkpoints.export import FORMATS, export_backbone
from mixmask.checkpoints.load import load_backbone
from mixmask.cli._console import say
from mixmask.cli.options import add_shared
from mixmask.runs.files import check_files


def export(
    run: Path,
    to: str,
    out: Path,
    *,
    arch: str | None = None,
    small_stem: bool | None = None,
    force: bool = False,
) -> None:
    """Write a run's or a checkpoint's backbone in the format of another library."""
    check_files(out, force=force)  # Also Detectron2's, once its backbone is known.
    loaded = load_backbone(run, arch=arch, small_stem=small_stem)
    say(loaded.describe())
    exported = export_backbone(loaded, to, out, force=force)
    say(f"wrote {', '.join(map(str, exported.files))}")
    for note in exported.notes:
        say(note)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    parser.description = (
        "Write the backbone of a run, or of a checkpoint of MoCo, lightly, solo-learn, torchvision "
        "or timm, for another library. Heads, queues and momentum encoders are left out."
    )
    parser.set_defaults(command=export)
    add_shared(parser, "run", "--arch", "--small-stem")
    parser.add_argument("--to", required=True, choices=FORMATS, help="library to write for")
    files = "*.safetensors, *.pkl for Detectron2, any other name for torch.save"
    add_shared(parser, "--out", required=True, help=f"file to write: {files}")
    add_shared(parser, "--force")
