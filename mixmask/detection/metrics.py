"""Average precision of detectors, by torchmetrics and pycocotools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from mixmask.detection.data import DetectionSplit, Target
from mixmask.figures.style import import_matplotlib


class Precision(TypedDict):
    """Average precision, 0 ... 1: over ten overlaps, and at one of 0.50 and of 0.75."""

    ap: float
    ap50: float
    ap75: float


class Precisions(TypedDict, total=False):
    """Average precision of boxes and, where there are masks, of masks.

    `per_class` has None for a class without any object.
    """

    ap: float
    ap50: float
    ap75: float
    per_class: dict[str, Precision | None]
    mask_ap: float
    mask_ap50: float
    mask_ap75: float
    mask_per_class: dict[str, Precision | None]


def average_precision(
    pairs: Iterable[tuple[Target, Target]], classes: Sequence[str], *, masks: bool = False
) -> Precisions:
    """Compute COCO's average precision of boxes and, if asked for, of masks.

    AP is the mean over overlaps of 0.50, 0.55, ... 0.95 and over the classes that occur in the
    targets; AP50 and AP75 are those at one overlap. At most 100 detections per image count.
    torchmetrics hands everything to pycocotools.

    Args:
        pairs: Per image a prediction with `boxes` (n, 4), `scores` (n,), `labels` (n,), and a
            target with `boxes`, `labels` and optionally `iscrowd` (n,); with masks, both with
            `masks` (n, H, W).
        classes: Names; label 1 is the first.
        masks: Whether to judge masks too.

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
        bools = {"masks": target["masks"].bool()} if masks else {}
        metric.update([prediction], [{**target, **bools}])
    result = metric.compute()
    labels = result["classes"].reshape(-1).tolist()
    summary: dict[str, object] = {}
    for kind in kinds:
        theirs, ours = f"{kind}_" if masks else "", "mask_" if kind == "segm" else ""
        for name, key in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
            summary[ours + name] = float(result[theirs + key])
        # Overlaps, recalls, classes, areas (all, small, ...), most detections (1, 10, 100).
        curves = result[f"{theirs}precision"][:, :, :, 0, -1]
        summary[f"{ours}per_class"] = {
            name: _class_precision(curves[:, :, labels.index(label)]) if label in labels else None
            for label, name in enumerate(classes, start=1)
        }
    return cast("Precisions", summary)


def _class_precision(curve: Tensor) -> Precision | None:
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
        Per image `boxes` (n, 4) in its own pixels, `labels` (n,), `scores` (n,) and, from Mask
        R-CNN, `masks` (n, H, W) bool, on the CPU.
    """
    detector.eval()
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
) -> Precisions:
    """Test a detector on a split; see `average_precision`."""
    device = next(detector.parameters()).device

    def pairs() -> Iterator[tuple[Target, Target]]:
        for batch in read_batches(split, range(len(split)), batch_size, workers):
            images, targets = zip(*batch, strict=True)
            yield from zip(predict(detector, images, device), targets, strict=True)

    return average_precision(pairs(), classes, masks=split.masks)


def read_batches(
    split: DetectionSplit, index: Sequence[int], batch_size: int, workers: int
) -> Iterator[list[tuple[Tensor, Target]]]:
    """Read images and targets of a split, in the order of the index, in lists."""
    loader = DataLoader(Subset(split, index), batch_size, num_workers=workers, collate_fn=list)
    try:
        yield from loader
    except ValueError as error:  # From a worker comes its traceback, which ends in the message.
        raise ValueError(str(error).strip().rpartition("ValueError: ")[2]) from None
