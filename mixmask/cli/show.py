"""`mixmask show`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mixmask._checks import Ratio
from mixmask._seeds import check_seed
from mixmask.cli._console import say
from mixmask.cli.options import RatioAction, add_shared
from mixmask.data.images import UnreadableError, open_image, take_square
from mixmask.data.sets import load_data
from mixmask.figures.masks import figure_masks
from mixmask.figures.style import check_figure, save_figure


def show(
    images: list[Path],
    out: Path,
    grid_sizes: list[int],
    ratio: Ratio,
    seed: int,
    force: bool = False,
) -> None:
    """Draw block and discrete masks at several grids, and both mixes of each pair."""
    if len(images) == 1 and not images[0].is_dir():
        raise ValueError(f"one image has no partner, got {images[0]} alone; name another image")
    check_figure(out, force=force)
    check_seed(seed)
    if images:
        pictures = torch.stack([_read(path) for path in images])
    else:
        # A skirt and a coat.
        pictures = load_data("clothing64", 64).train.images[torch.tensor([2520, 1100])]
    generator = torch.Generator().manual_seed(seed)
    figure = figure_masks(pictures, grid_sizes=grid_sizes, ratio=ratio, generator=generator)
    save_figure(figure, out)
    say(f"drew {out}")


def _read(path: Path) -> Tensor:
    """Read a square of 224 px."""
    try:
        with open_image(path) as image:
            return take_square(image, 224)
    except UnreadableError as error:
        fix = f"name files, as {path}/*.jpg does" if path.is_dir() else "pass a JPEG or PNG file"
        raise ValueError(f"{path} is not a readable image ({error}); {fix}") from error


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add the options of `show`."""
    parser.description = (
        "Draw block and discrete masks at several grids, the mixed images and the switch images. "
        "White keeps an image's own pixels, black takes its partner's."
    )
    parser.set_defaults(command=show)
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", default=[],
        help="image files, mixed in pairs [two photographs of clothing64]",
    )  # fmt: skip
    add_shared(parser, "--out", default=Path("mixmask.png"), help="PNG file to write [mixmask.png]")
    parser.add_argument(
        "--grid-sizes", type=int, nargs="+", default=[2, 4, 8], metavar="N",
        help="cells per side [2 4 8]",
    )  # fmt: skip
    parser.add_argument(
        "--ratio", type=float, nargs="+", action=RatioAction, default=0.5, metavar="SHARE",
        help="share of an image's own pixels; two numbers for a range [0.5]",
    )  # fmt: skip
    add_shared(parser, "--seed", help="seed of the masks [0]")
    add_shared(parser, "--force")
