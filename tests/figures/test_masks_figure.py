"""Figures hold what they promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import BlockMaskGenerator, erase_batch, mix_batch, mixup_batch
from mixmask.data.views import denormalize
from mixmask.figures.masks import figure_masks, figure_views
from mixmask.figures.style import save_figure


@pytest.mark.parametrize("count, pairs", [(2, 1), (5, 3)])
def test_masks_and_mixes_of_every_pair(count: int, pairs: int, tmp_path: Path) -> None:
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    figure = figure_masks(images, grid_sizes=(2, 8))
    axes = np.array(figure.axes).reshape(pairs, 3, 5)  # Masks, mixes, switch images.
    titles = [axis.get_title() for axis in axes.flat]
    assert titles.count("mix, λ = 0.50") == titles.count("switch image") == pairs * 4
    assert [axis.get_title() for axis in axes[0, 0, 1:]] == [
        "block, grid 2", "block, grid 8", "discrete, grid 2", "discrete, grid 8",
    ]  # fmt: skip
    assert "white keeps\none's own pixels" in axes[0, 0, 0].texts[0].get_text()
    mask, mix, switch = (axis.get_images()[0] for axis in axes[0, :, 2])
    kept = mask.get_array().astype(bool)
    own = images[0].permute(1, 2, 0).numpy()
    assert (mix.get_array()[kept] == own[kept]).all()
    assert kept.mean() == 0.5
    total = mix.get_array().astype(int) + switch.get_array().astype(int)
    pair = (images[0].int() + images[1].int()).permute(1, 2, 0).numpy()
    assert (total == pair).all()
    save_figure(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 500


def test_views_in_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    images, query = torch.zeros(4, 3, 9, 9, dtype=torch.uint8), torch.randn(4, 3, 8, 8)
    masks = BlockMaskGenerator(4, (0.25, 0.75))
    mixed = [
        mixup_batch(query, generator=generator),
        mix_batch(query, masks(4, generator=generator)),  # One λ per sample.
    ]
    figure = figure_views(images, query, [[batch] for batch in mixed], query)
    assert figure.get_suptitle().endswith("black takes the partner's")
    axes = np.array(figure.axes).reshape(6, 4)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == [
        "image", "query view", "mixed view", "mask", "mixed view", "key view",
    ]  # fmt: skip
    for row, batch in ((2, mixed[0]), (4, mixed[1])):
        shares = [f"λ = {float(lam):.2f}" for lam in batch.lam.expand(4)]
        assert [axis.get_title() for axis in axes[row]] == shares
    assert len({axis.get_title() for axis in axes[4]}) > 1
    assert mixed[1].mask is not None
    for axis, mask in zip(axes[3], mixed[1].mask, strict=True):
        assert (axis.get_images()[0].get_array() == mask.numpy()).all()


def test_views_of_several_draws_show_the_one_of_each_image() -> None:
    images, query = torch.zeros(4, 3, 9, 9, dtype=torch.uint8), torch.randn(4, 3, 8, 8)
    masks = torch.rand(3, 8, 8) > 0.5
    draws = [*(mix_batch(query, mask) for mask in masks), mixup_batch(query)]
    figure = figure_views(images, query, [draws], query)
    axes = np.array(figure.axes).reshape(5, 4)
    grey = np.full((8, 8), float(draws[3].lam))  # Mixup blends all pixels alike.
    for i, mask in enumerate([*masks.numpy(), grey]):
        assert (axes[2, i].get_images()[0].get_array() == mask).all()
        assert axes[3, i].get_title() == f"λ = {float(draws[i].lam):.2f}"
        expected = denormalize(draws[i].images)[i].permute(1, 2, 0).numpy()
        assert (axes[3, i].get_images()[0].get_array() == expected).all()
    legend, shared = figure.get_suptitle().splitlines()
    assert legend.endswith("black takes the partner's, grey blends both by λ")
    assert "all images share mask and λ" in shared


def test_views_of_erased_images_name_noise_and_masks_per_channel() -> None:
    query = torch.randn(2, 3, 8, 8)
    mask = torch.rand(1, 3, 8, 8) > 0.5
    figure = figure_views(query, query, [[erase_batch(query, mask)]], query)
    assert figure.get_suptitle() == (
        "mask: white keeps one's own pixels, black is filled with noise, colours: one mask per "
        "channel"
    )
    shown = figure.axes[5].get_images()[0].get_array()
    assert shown is not None
    assert (shown == mask[0].permute(1, 2, 0).numpy()).all()


def test_views_without_mixing_have_no_mask() -> None:
    batch = torch.randn(2, 3, 8, 8)
    figure = figure_views(torch.zeros(2, 3, 8, 8), batch, [], batch)
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["image", "query view", "key view"]
    assert figure.get_suptitle() == ""
