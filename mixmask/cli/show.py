"""`mixmask show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixmask.cli._console import check_out, say
from mixmask.cli.options import RatioAction, add_shared

if TYPE_CHECKING:
    from mixmask._checks import Ratio


def show(images: list[Path], out: Path, grid_sizes: list[int], ratio: Ratio, seed: int) -> None:
    """Draw block and discrete masks at several grids, and both mixes of each pair."""
    from mixmask.data.sets import load_data, read_square
    from mixmask.figures.masks import figure_masks
    from mixmask.figures.style import save_figure

    if len(images) == 1:
        raise ValueError(f"one image has no partner, got {images[0]} alone; name another image")
    check_out(out)
    if images:
        read = []
        for path in images:
            image = read_square(path, 224)
            if image is None:
                raise ValueError(f"{path} is no readable image; pass a JPEG or PNG file")
            read.append(torch.from_numpy(image).permute(2, 0, 1))
        pictures = torch.stack(read)
    else:
        pictures = load_data("clothing64", 64).train.images[[2520, 1100]]
    generator = torch.Generator().manual_seed(seed)
    figure = figure_masks(pictures, grid_sizes=grid_sizes, ratio=ratio, generator=generator)
    save_figure(figure, out)
    say(f"drew {out}")


def add_show(commands: Any) -> None:
    """Add `show`."""
    parser = commands.add_parser(
        "show",
        help="draw masks and mixes of images",
        description="Draw block and discrete masks at several grids, the mixed images and the "
        "switch images. White keeps an image's own pixels, black takes its partner's.",
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
