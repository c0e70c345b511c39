"""Figures hold what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mixmask.figures.masks import figure_detections, figure_masks, figure_views
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


@pytest.mark.parametrize("masks", [False, True])
def test_detections_beside_what_was_annotated(masks: bool) -> None:
    images = [torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(3, 50, 50, dtype=torch.uint8)]
    boxes, labels = torch.tensor([[2.0, 4, 20, 30], [5, 5, 9, 9]]), torch.tensor([2, 1])
    shape = torch.zeros(2, 40, 60)
    shape[:, 5:20, 5:15] = 1
    more = {"masks": shape} if masks else {}
    target = {"boxes": boxes, "labels": labels, **more}
    found = {**target, "scores": torch.tensor([0.9, 0.2])}
    nothing = {name: values[:0] for name, values in found.items()}
    figure = figure_detections(images, [target, target], [found, nothing], ["cell", "nut"])
    left, right, _, empty = figure.axes
    assert [axis.get_title() for axis in (left, right)] == [
        "annotated: 2", "detected: 1 with a score of 0.5 or more",
    ]  # fmt: skip
    assert (len(left.patches), len(right.patches), len(empty.patches)) == (2, 1, 0)
    assert left.patches[0].get_bbox().bounds == (1.5, 3.5, 18, 26)  # type: ignore[attr-defined]
    assert [text.get_text() for text in right.texts] == ["0.90"]
    assert left.patches[0].get_edgecolor() != left.patches[1].get_edgecolor()
    assert bool(left.collections) == masks
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cell", "nut"]
