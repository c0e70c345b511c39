"""Figures hold what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mixmask.figures.masks import figure_masks, figure_views
from mixmask.figures.style import save_figure


@pytest.mark.parametrize("count, pairs", [(2, 1), (5, 3)])
def test_masks_and_mixes_of_every_pair(count: int, pairs: int, tmp_path: Path) -> None:
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    figure = figure_masks(images, grid_sizes=(2, 8))
    assert len(figure.axes) == pairs * 2 * 7
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count("mix, λ = 0.50") == pairs * 4
    mix, switch = figure.axes[2].get_images()[0], figure.axes[3].get_images()[0]
    total = mix.get_array().astype(int) + switch.get_array().astype(int)  # type: ignore[union-attr]
    pair = (images[0].int() + images[1].int()).permute(1, 2, 0).numpy()
    assert (total == pair).all()
    save_figure(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 500


def test_views_in_rows() -> None:
    batch = torch.randn(4, 3, 8, 8)
    figure = figure_views(batch, [batch, batch], batch)
    assert [axis.get_ylabel() for axis in figure.axes[::4]] == [
        "view", "mixed view", "mixed view", "key view",
    ]  # fmt: skip
