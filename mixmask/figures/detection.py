"""Figure: what was annotated beside what was detected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure_detections(
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    predictions: Sequence[dict[str, Tensor]],
    classes: Sequence[str],
    *,
    threshold: float = 0.5,
) -> Figure:
    """Draw what was annotated beside what was detected, one row per image.

    Args:
        images: (3, H, W) uint8 each.
        targets: Per image `boxes` (n, 4) in pixels, `labels` (n,) and optionally `masks` (n, H, W).
        predictions: Per image the same and `scores` (n,).
        classes: Names; label 1 is the first.
        threshold: Smallest score of a detection that is drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height = 4.2 * sum(image.shape[1] / image.shape[2] for image in images) + 0.6
    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False)
    colours = [f"C{i % 10}" for i in range(len(classes))]
    for (left, right), image, target, prediction in zip(
        axes, images, targets, predictions, strict=True
    ):
        sure = prediction["scores"] >= threshold
        shown = {name: values[sure] for name, values in prediction.items()}
        left.set_title(f"annotated: {len(target['boxes'])}", fontsize=8)
        title = f"detected: {int(sure.sum())} with a score of {threshold:g} or more"
        right.set_title(title, fontsize=8)
        for axis, boxes in ((left, target), (right, shown)):
            axis.imshow(image.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
            axis.set(xticks=[], yticks=[])
            _draw_boxes(axis, boxes, colours)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(
        handles, classes, loc="outside lower center", ncols=min(len(classes), 6), frameon=False
    )
    return figure


def _draw_boxes(axis: Axes, boxes: dict[str, Tensor], colours: Sequence[str]) -> None:
    """Draw boxes in their classes' colours, with scores and masks where there are any."""
    from matplotlib.patches import Rectangle

    scores = boxes.get("scores")
    for i, (corners, label) in enumerate(zip(boxes["boxes"], boxes["labels"], strict=True)):
        # A picture's first pixel is drawn around 0; its left edge is at -0.5.
        left, top, right, bottom = (corners - 0.5).tolist()
        colour = colours[int(label) - 1]
        box = Rectangle((left, top), right - left, bottom - top, fill=False, color=colour)
        axis.add_patch(box)
        if scores is not None:
            axis.text(
                left, top, f"{float(scores[i]):.2f}", color="white", fontsize=6, va="top",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
        if "masks" in boxes:
            mask = boxes["masks"][i].float().numpy()
            axis.contour(mask, [0.5], colors=[colour], linewidths=0.8)
