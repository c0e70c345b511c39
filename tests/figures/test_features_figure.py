"""Maps and sheets of neighbours show what they were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixmask.figures.features import class_style, figure_confusion, figure_map, figure_neighbours
from mixmask.figures.style import write_figure

AXES = ("first", "second")


def test_up_to_a_hundred_classes_look_unlike() -> None:
    for classes in (10, 11, 100):
        assert len({class_style(label, classes) for label in range(classes)}) == classes
    ten = [class_style(label, 10) for label in range(10)]
    assert len({colour for colour, _ in ten}) == len({mark for _, mark in ten}) == 10


def test_map_has_a_panel_a_run_and_a_legend_of_the_classes_there_are() -> None:
    points, labels = torch.randn(30, 2), torch.arange(30) % 3 * 2
    classes = ["ant", "bee", "cat", "dog", "eel"]
    figure = figure_map([("a", points, AXES), ("b", -points, AXES)], labels, classes, title="t")
    for axis, name, sign in zip(figure.axes, "ab", (1, -1), strict=True):
        assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == (name, *AXES)
        for label, drawn in zip((0, 2, 4), axis.collections[:3], strict=True):
            expected = sign * points[labels == label].numpy()
            np.testing.assert_allclose(np.asarray(drawn.get_offsets()), expected, rtol=1e-6)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ant", "cat", "eel"]


@pytest.mark.parametrize("count, panels", [(2, 1), (10, 1), (20, 1), (20, 3)])
def test_a_legend_of_long_names_leaves_panels_and_title_alone(
    count: int, panels: int, tmp_path: Path
) -> None:
    names = [f"golden retriever from the northern highlands {i}" for i in range(count)]
    labels = torch.arange(60) % count
    maps = [("runs/" + "name-" * 30, torch.randn(60, 2), AXES)] * panels
    figure = figure_map(maps, labels, names, title="sets/pets, 5,000 of 10,000 test images " * 2)
    write_figure(figure, tmp_path / "map.png")
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert len(figure.axes) == panels
    for axis in figure.axes:
        panel = axis.get_tightbbox()
        assert panel is not None
        assert page.x0 <= panel.x0 < panel.x1 <= box.x0
        assert axis.bbox.width > 3 * figure.dpi  # Inches.
    assert box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= figure.texts[0].get_window_extent().y0


def test_map_of_many_classes_says_why_it_has_no_legend() -> None:
    labels = torch.arange(300) % 150
    for count, words in ((21, "21 classes by colour and mark: too"), (150, "several share one")):
        names = [str(i) for i in range(count)]
        figure = figure_map([("a", torch.randn(300, 2), AXES)], labels % count, names)
        assert not figure.legends
        assert words in figure.get_suptitle()


def test_map_without_labels_is_grey_and_a_long_name_is_cut() -> None:
    figure = figure_map([("x" * 99 + "end", torch.randn(9, 2), AXES)], None)
    assert len(figure.axes[0].collections) == 1
    title = figure.axes[0].get_title()
    assert len(title) <= 60
    assert title.endswith("end")


def test_sheet_shows_neighbours_in_order_and_frames_the_wrong_ones() -> None:
    queries = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    neighbours = torch.randint(256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    similarity = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]])
    names = [("cat", ["cat", "dog", "cat"]), ("dog", ["cat", "cat", "dog"])]
    figure = figure_neighbours(queries, neighbours, similarity, names=names, title="t")
    axes = np.array(figure.axes).reshape(2, 4)
    for i in range(2):
        shown = [axis.get_images()[0].get_array() for axis in axes[i]]
        for image, expected in zip(shown, [queries[i], *neighbours[i]], strict=True):
            assert (image == expected.permute(1, 2, 0).numpy()).all()
    assert [[axis.get_title() for axis in row] for row in axes] == [
        ["cat", "0.90", "dog 0.80", "0.70"], ["dog", "cat 0.60", "cat 0.50", "0.40"],
    ]  # fmt: skip
    framed = [[axis.spines["left"].get_visible() for axis in row] for row in axes]
    assert framed == [[True, False, True, False], [True, True, True, False]]
    assert axes[0, 0].spines["left"].get_edgecolor() != axes[0, 2].spines["left"].get_edgecolor()


def test_sheet_without_labels_frames_the_queries_alone() -> None:
    images = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    figure = figure_neighbours(images[:, 0], images, torch.zeros(1, 2))
    assert [axis.get_title() for axis in figure.axes] == ["query", "0.00", "0.00"]
    assert [axis.spines["top"].get_visible() for axis in figure.axes] == [True, False, False]


@pytest.mark.parametrize(
    "count, numbered, named", [(3, True, True), (100, False, True), (200, False, False)]
)
def test_confusion_as_shares_of_classes(count: int, numbered: bool, named: bool) -> None:
    confusion = torch.zeros(count, count, dtype=torch.int64)
    confusion[0, :2] = torch.tensor([1, 3])
    names = [f"class {i}" for i in range(count)]
    axis = figure_confusion(confusion, names, title="runs/first, knn").axes[0]
    assert axis.get_title() == "runs/first, knn"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
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
