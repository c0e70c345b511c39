"""`mixmask export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixmask.cli._console import say
from mixmask.cli.options import add_shared


def export(
    run: Path, to: str, out: Path, arch: str | None, small_stem: bool | None, force: bool
) -> None:
    """Write a run's or a checkpoint's backbone in the format of another library."""
    from mixmask.checkpoints.export import export_backbone
    from mixmask.checkpoints.load import load_backbone

    loaded = load_backbone(run, arch=arch, small_stem=small_stem)
    say(loaded.describe())
    exported = export_backbone(loaded, to, out, force=force)
    say(f"wrote {', '.join(map(str, exported.files))}")
    for note in exported.notes:
        say(note)


def add_export(commands: Any) -> None:
    """Add `export`."""
    from mixmask.checkpoints.export import FORMATS

    parser = commands.add_parser(
        "export",
        help="write a backbone for another library",
        description="Write the backbone of a run, or of a checkpoint of MoCo, lightly, "
        "solo-learn, torchvision or timm, for another library. Heads, queues and momentum "
        "encoders are left out.",
    )
    parser.set_defaults(command=export)
    add_shared(parser, "run", "--arch", "--small-stem")
    parser.add_argument("--to", required=True, choices=FORMATS, help="library to write for")
    files = "*.safetensors, *.pkl for Detectron2, any other name for torch.save"
    add_shared(parser, "--out", required=True, help=f"file to write: {files}")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
