"""`mixmask show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixmask.cli._console import check_out, say
from mixmask.cli.options import RatioAction, add_shared

if TYPE_CHECKING:
    from mixmask._checks import Ratio


def show(images: list[Path], out: Path, grid_sizes: list[int], ratio: Ratio, seed: int) -> None:
    """Draw block and discrete masks at several grids, and the two mixes of each pair."""
    from mixmask.data.sets import load_data
    from mixmask.figures.masks import figure_masks
    from mixmask.figures.style import save_figure

    if len(images) == 1:
        raise ValueError(f"one image has no partner, got {images[0]} alone; name another image")
    check_out(out)
    if images:
        pictures = torch.stack([_read(path) for path in images])
    else:
        pictures = load_data("clothing64", 64).train.images[torch.tensor([2520, 1100])]
    generator = torch.Generator().manual_seed(seed)
    figure = figure_masks(pictures, grid_sizes=grid_sizes, ratio=ratio, generator=generator)
    save_figure(figure, out)
    say(f"drew {out}")


def _read(path: Path) -> Tensor:
    """Read a square of 224 px."""
    from mixmask.data.images import UnreadableError, open_image, take_square

    try:
        with open_image(path) as image:
            return take_square(image, 224)
    except UnreadableError as error:
        fix = "pass a JPEG or PNG file"
        raise ValueError(f"{path} is no readable image ({error}); {fix}") from error


def add_show(commands: Any) -> None:
    """Add `show`."""
    parser = commands.add_parser(
        "show",
        help="draw masks and mixes of images",
        description="Draw block and discrete masks at several grids, and the two mixes.",
    )
    parser.set_defaults(command=show)
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files, mixed in pairs [two photographs of clothing64]",
    )
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
