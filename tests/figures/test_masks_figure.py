"""Figures hold what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mixmask.figures.masks import (
    figure_confusion,
    figure_curves,
    figure_masks,
    figure_views,
    save_figure,
)


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


def test_curves_with_and_without_accuracies() -> None:
    rows = [
        {"epoch": 0.0, "step": 0.0, "knn": 0.2, "linear": 0.3},
        {"epoch": 1.0, "step": 5.0, "loss": 3.0, "loss_clean": 2.0, "loss_mixed": 1.0},
        {"epoch": 2.0, "step": 9.0, "loss": 2.0, "loss_clean": 1.0, "loss_mixed": 1.0, "knn": 0.4},
    ]
    left, right = figure_curves(rows).axes
    assert left.lines[0].get_ydata().tolist() == [2.0, 1.0]  # type: ignore[union-attr]
    assert [line.get_label() for line in right.lines if len(line.get_xdata()) == 2][-2] == (  # type: ignore[arg-type]
        "nearest neighbours"
    )
    left, right = figure_curves(rows[1:2]).axes
    assert right.texts[0].get_text() == "not measured"


@pytest.mark.parametrize(
    "count, numbered, named", [(3, True, True), (30, False, True), (90, False, False)]
)
def test_confusion_as_shares_of_classes(count: int, numbered: bool, named: bool) -> None:
    confusion = torch.zeros(count, count, dtype=torch.int64)
    confusion[0, :2] = torch.tensor([1, 3])
    axis = figure_confusion(confusion, [f"class {i}" for i in range(count)]).axes[0]
    shares = axis.get_images()[0].get_array()
    assert shares is not None
    assert shares[0, :3].tolist() == [25, 75, 0]
    assert shares[1:].sum() == 0
    assert ([text.get_text() for text in axis.texts] == ["25", "75"]) == numbered
    ticks = [label.get_text() for label in axis.get_yticklabels()]
    assert (ticks[:2] == ["class 0", "class 1"]) == named


def test_confusion_needs_a_name_for_each_class() -> None:
    with pytest.raises(ValueError, match="must be \\(2, 2\\) for 2 classes"):
        figure_confusion(torch.zeros(3, 3), ["a", "b"])
