"""Average precision of detectors, by torchmetrics and pycocotools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from mixmask.data.stream import CUT_OFF, explain_dead_workers, start_worker
from mixmask.detection.data import DetectionSplit, Target
from mixmask.figures.style import import_matplotlib


def average_precision(
    pairs: Iterable[tuple[Target, Target]], classes: Sequence[str], *, masks: bool = False
) -> dict[str, Any]:
    """Compute COCO's average precision of boxes and, if asked for, of masks.

    AP is the mean over overlaps of 0.50, 0.55, ... 0.95 and over the classes that occur in the
    targets; AP50 and AP75 are those at one overlap. At most 100 detections per image count.
    torchmetrics passes everything to pycocotools.

    Args:
        pairs: Per image a prediction with `boxes` (n, 4), `scores` (n,), `labels` (n,), and a
            target with `boxes`, `labels` and optionally `iscrowd` (n,); with masks, both with
            `masks` (n, H, W).
        classes: Names; label 1 is the first.
        masks: Whether to measure masks too.

    Returns:
        `ap`, `ap50`, `ap75`, each 0 ... 1, and `per_class`: the same three per class, None for a
        class without any object; with masks, theirs under the same names behind `mask_`.

    Example:
        >>> box, one = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([1])
        >>> target = {"boxes": box, "labels": one}
        >>> average_precision([({**target, "scores": torch.ones(1)}, target)], ["cell"])["ap"]
        1.0
    """
    import_matplotlib()  # As torchmetrics does, which fails without MPLBACKEND's backend.
    from torchmetrics.detection import MeanAveragePrecision

    kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
    # torchmetrics' own thresholds are rounded to float32, so that a recall of exactly 0.6 would
    # count for less than it does with pycocotools.
    metric = MeanAveragePrecision(
        iou_type=kinds,
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        extended_summary=True,
        backend="pycocotools",
    )
    for prediction, target in pairs:
        if masks:  # Predicted ones are bool, annotated ones uint8.
            target = {**target, "masks": target["masks"].bool()}
        metric.update([prediction], [target])
    result = metric.compute()
    labels = result["classes"].reshape(-1).tolist()
    summary: dict[str, Any] = {}
    for kind in kinds:
        theirs, ours = f"{kind}_" if masks else "", "mask_" if kind == "segm" else ""
        for name, their_name in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
            summary[ours + name] = float(result[theirs + their_name])
        # (overlaps, recalls, classes, areas, most detections) -> (classes, 10, 101): objects of
        # all areas, 100 detections.
        curves = result[f"{theirs}precision"][:, :, :, 0, -1].permute(2, 0, 1).float()
        of_labels = dict(zip(labels, curves, strict=True))
        summary[f"{ours}per_class"] = {
            name: _summarise(of_labels.get(label)) for label, name in enumerate(classes, start=1)
        }
    return summary


def _summarise(curves: Tensor | None) -> dict[str, float] | None:
    """Average a class's precision (10, 101), which is -1 where it has no objects."""
    if curves is None or curves.max() < 0:
        return None
    parts = {"ap": curves, "ap50": curves[0], "ap75": curves[5]}
    return {name: float(part.mean()) for name, part in parts.items()}


@torch.no_grad()
def predict(detector: nn.Module, images: Sequence[Tensor]) -> list[Target]:
    """Detect objects on images (3, H, W) uint8, in evaluation mode.

    Returns:
        Per image `boxes` (n, 4) in its own pixels, `labels` (n,), `scores` (n,) and, from Mask
        R-CNN, `masks` (n, H, W) bool, on the CPU.
    """
    detector.eval()
    device = next(detector.parameters()).device
    predictions = []
    for output in detector([image.to(device).float() / 255 for image in images]):
        prediction = {name: value.cpu() for name, value in output.items()}
        if "masks" in prediction:
            prediction["masks"] = prediction["masks"][:, 0] > 0.5  # (n, 1, H, W) -> (n, H, W)
        predictions.append(prediction)
    return predictions


def evaluate_detector(
    detector: nn.Module,
    split: DetectionSplit,
    classes: Sequence[str],
    *,
    batch_size: int = 8,
    workers: int = 0,
) -> dict[str, Any]:
    """Test a detector on a split; see `average_precision`."""

    def pairs() -> Iterator[tuple[Target, Target]]:
        for batch in read_batches(split, range(len(split)), batch_size, workers):
            images, targets = zip(*batch, strict=True)
            yield from zip(predict(detector, images), targets, strict=True)

    return average_precision(pairs(), classes, masks=split.masks)


def read_batches(
    split: DetectionSplit, index: Sequence[int], batch_size: int, workers: int
) -> Iterator[list[tuple[Tensor, Target]]]:
    """Read images and targets of a split, in the order of the index, in lists."""
    loader = DataLoader(
        Subset(split, index), batch_size,
        num_workers=workers, collate_fn=list, worker_init_fn=start_worker,
    )  # fmt: skip
    try:
        with explain_dead_workers(*CUT_OFF if workers else ()):
            yield from loader
    except ValueError as error:  # From a worker comes its traceback, which ends in the message.
        raise ValueError(str(error).strip().rpartition("ValueError: ")[2]) from None
