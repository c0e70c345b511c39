"""Average precision of detectors, by torchmetrics and pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from mixmask.detection.data import DetectionSplit, Target


def average_precision(
    predictions: Sequence[Target], targets: Sequence[Target], classes: Sequence[str]
) -> dict[str, Any]:
    """Compute COCO's average precision of boxes and, where there are masks, of masks.

    AP is the mean over overlaps of 0.50, 0.55, ... 0.95 and over the classes that occur in the
    targets; AP50 and AP75 are those at one overlap. At most 100 detections an image count.
    torchmetrics hands everything to pycocotools.

    Args:
        predictions: For each image `boxes` (n, 4), `scores` (n,), `labels` (n,) and maybe `masks`
            (n, H, W) bool.
        targets: For each image `boxes`, `labels` and maybe `iscrowd` (n,) and `masks`.
        classes: Names; label 1 is the first.

    Returns:
        `ap`, `ap50`, `ap75`, 0 ... 1, and `per_class`, the same for each class, None for one
        without any object; with masks also `mask_ap` and so on.

    Example:
        >>> box, one = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([1])
        >>> target = {"boxes": box, "labels": one}
        >>> average_precision([{**target, "scores": torch.ones(1)}], [target], ["cell"])["ap"]
        1.0
    """
    masks = bool(targets) and all("masks" in item for item in [*predictions, *targets])
    metric = _Precision(classes, masks=masks)
    metric.update(predictions, targets)
    return metric.compute()


class _Precision:
    """torchmetrics' mean average precision, by class."""

    def __init__(self, classes: Sequence[str], *, masks: bool) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self.classes = classes
        self.kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
        # torchmetrics' own thresholds are rounded to float32, so that a recall of exactly 0.6 would
        # count for less than it does with pycocotools.
        self.metric = MeanAveragePrecision(
            iou_type=self.kinds,
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            extended_summary=True,
            backend="pycocotools",
        )

    def update(self, predictions: Sequence[Target], targets: Sequence[Target]) -> None:
        """Count images in."""
        for index, target in enumerate(targets):
            prediction = predictions[index]
            self.metric.update(
                [{k: v.cpu() for k, v in prediction.items()}],
                [{k: v.cpu().bool() if k == "masks" else v.cpu() for k, v in target.items()}],
            )

    def compute(self) -> dict[str, Any]:
        """Return what `average_precision` does."""
        result = self.metric.compute()
        labels = [int(label) for label in result["classes"].reshape(-1)]
        summary: dict[str, Any] = {}
        for kind in self.kinds:
            inner = f"{kind}_" if len(self.kinds) > 1 else ""
            outer = "mask_" if kind == "segm" else ""
            for ours, theirs in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
                summary[outer + ours] = float(result[inner + theirs])
            # Overlaps, recalls, classes, areas (all, small, ...), most detections (1, 10, 100).
            curves = result[f"{inner}precision"][:, :, :, 0, -1]
            found = {label: _class_precision(curves[:, :, i]) for i, label in enumerate(labels)}
            summary[f"{outer}per_class"] = {
                name: found.get(i) for i, name in enumerate(self.classes, start=1)
            }
        return summary


def _class_precision(curve: Tensor) -> dict[str, float] | None:
    """Summarise a class's precision (10 overlaps, 101 recalls), -1 where there is no object."""
    if (curve < 0).all():
        return None
    return {
        "ap": float(curve.mean()), "ap50": float(curve[0].mean()), "ap75": float(curve[5].mean())
    }  # fmt: skip


@torch.no_grad()
def predict(
    detector: nn.Module, images: Sequence[Tensor], device: torch.device | str
) -> list[Target]:
    """Detect objects on images (3, H, W) uint8, in evaluation mode.

    Returns:
        For each image `boxes` (n, 4) in its own pixels, `labels`, `scores` and, from Mask R-CNN,
        `masks` (n, H, W) bool, on the CPU.
    """
    detector.eval()
    found = []
    for output in detector([image.to(device).float() / 255 for image in images]):
        prediction = {name: value.cpu() for name, value in output.items()}
        if "masks" in prediction:
            prediction["masks"] = prediction["masks"][:, 0] > 0.5
        found.append(prediction)
    return found


def evaluate_detector(
    detector: nn.Module,
    split: DetectionSplit,
    classes: Sequence[str],
    *,
    batch_size: int = 8,
    workers: int = 0,
) -> dict[str, Any]:
    """Test a detector on a split; see `average_precision` for what is returned."""
    device = next(detector.parameters()).device
    metric = _Precision(classes, masks=split.masks)
    for batch in batches(split, range(len(split)), batch_size, workers):
        images, targets = zip(*batch, strict=True)
        metric.update(predict(detector, images, device), targets)
    return metric.compute()


def batches(
    split: DetectionSplit, index: Sequence[int], batch_size: int, workers: int
) -> DataLoader[Any]:
    """Read images and targets of a split, in the order of the index, in lists."""
    return DataLoader(
        Subset(split, index), batch_size, num_workers=workers, collate_fn=_as_they_are
    )


def _as_they_are(batch: list[Any]) -> list[Any]:
    return batch
