"""Figure of annotations beside detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mixmask.figures.style import CLASS_COLOURS, LINES, add_legend, new_figure, show_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SURE = 0.5  # Smallest score of a detection that is drawn.


def figure_detections(
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    predictions: Sequence[dict[str, Tensor]],
    classes: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Draw annotations beside detections with a score of 0.5 or more, one row per image.

    Args:
        images: (3, H, W) uint8 each.
        targets: Per image `boxes` (n, 4) in pixels, `labels` (n,) and optionally `masks` (n, H, W).
        predictions: Per image the same and `scores` (n,).
        classes: Names; label 1 is the first.
        title: The run and its average precision.
    """
    # Inches: a column is about 4.2 wide, and each row as high as its image needs.
    height = 4.2 * sum(image.shape[1] / image.shape[2] for image in images) + 1
    figure = new_figure(8.6, height)
    axes = figure.subplots(len(images), 2, squeeze=False)
    present: set[int] = set()
    for (left, right), image, target, prediction in zip(
        axes, images, targets, predictions, strict=True
    ):
        sure = prediction["scores"] >= _SURE
        shown = {name: values[sure] for name, values in prediction.items()}
        count = int(sure.sum())
        show_image(left, image, f"annotated: {len(target['boxes'])}")
        show_image(right, image, f"detected: {count} with a score of {_SURE:g} or more")
        for axis, boxes in ((left, target), (right, shown)):
            _draw_boxes(axis, boxes)
            present.update(boxes["labels"].tolist())
    for label in sorted(present):  # Lines without points, for the legend.
        colour, line = _style(label)
        axes[0, 0].plot([], [], line, color=colour, label=classes[label - 1])
    add_legend(figure, axes[:1, 0], title)
    return figure


def _style(label: int) -> tuple[str, str]:
    """Choose colour and line of a class; no two of up to forty classes share both."""
    line, colour = divmod(label - 1, len(CLASS_COLOURS))
    return CLASS_COLOURS[colour], LINES[line % len(LINES)]


def _draw_boxes(axis: Axes, boxes: dict[str, Tensor]) -> None:
    """Draw boxes in their classes' colours, with scores and masks where there are any."""
    from matplotlib.patches import Rectangle

    for i, (corners, label) in enumerate(zip(boxes["boxes"], boxes["labels"], strict=True)):
        # A picture's first pixel is drawn around 0; its left edge is at -0.5.
        left, top, right, bottom = (corners - 0.5).tolist()
        colour, line = _style(int(label))
        box = Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=1.8)
        box.set(edgecolor=colour, linestyle=line)
        axis.add_patch(box)
        if "scores" in boxes:
            axis.text(
                left, top, f"{float(boxes['scores'][i]):.2f}", fontsize=7, va="top",
                bbox={"facecolor": "white", "edgecolor": colour, "pad": 0.8},
            )  # fmt: skip
        if "masks" in boxes:
            mask = boxes["masks"][i].float().numpy()  # (H, W)
            axis.contour(mask, [0.5], colors=[colour], linewidths=1.2)
