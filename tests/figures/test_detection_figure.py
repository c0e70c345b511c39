"""Annotations and detections side by side."""

from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_hex

from mixmask.figures.detection import figure_detections
from mixmask.figures.style import CLASS_COLOURS


def test_more_classes_than_colours_differ_in_their_lines() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    boxes = torch.tensor([[2.0, 4, 20, 30]]).repeat(3, 1)
    target = {"boxes": boxes, "labels": torch.tensor([1, 11, 21])}
    found = {"boxes": boxes[:1], "labels": torch.tensor([2]), "scores": torch.tensor([0.9])}
    names = [f"class {i}" for i in range(1, 31)]
    figure = figure_detections([image], [target], [found], names)
    looks = [(p.get_edgecolor(), p.get_linestyle()) for p in figure.axes[0].patches]
    assert len(set(looks)) == 3
    # Those that are shown, not all thirty.
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["class 1", "class 2", "class 11", "class 21"]


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
    figure = figure_detections(
        images, [target, target], [found, nothing], ["cell", "nut"], title="AP 34%"
    )
    left, right, _, empty = figure.axes
    assert figure.get_suptitle() == "AP 34%"
    assert [to_hex(patch.get_edgecolor()) for patch in left.patches] == [*CLASS_COLOURS[1::-1]]
    assert [axis.get_title() for axis in (left, right)] == [
        "annotated: 2", "detected: 1 with a score of 0.5 or more",
    ]  # fmt: skip
    assert (len(left.patches), len(right.patches), len(empty.patches)) == (2, 1, 0)
    assert left.patches[0].get_bbox().bounds == (1.5, 3.5, 18, 26)  # type: ignore[attr-defined]
    assert [text.get_text() for text in right.texts] == ["0.90"]
    assert left.patches[0].get_edgecolor() != left.patches[1].get_edgecolor()
    assert bool(left.collections) == masks
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cell", "nut"]
