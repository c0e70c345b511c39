"""Average precision of boxes and masks, as pycocotools has it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_detection import write_coco
from torch import Tensor, nn

from mixmask.detection.data import load_detection
from mixmask.detection.metrics import average_precision, evaluate_detector


def boxes(count: int, generator: np.random.Generator) -> Tensor:
    corner = generator.uniform(0, 60, (count, 2))
    return torch.tensor(np.hstack([corner, corner + generator.uniform(8, 40, (count, 2))])).float()


def crowded_images(count: int = 6) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Annotations, and detections scattered around them, with false ones and a crowd."""
    rng = np.random.default_rng(0)
    targets, predictions = [], []
    for i in range(count):
        annotated = boxes(5, rng)
        near = annotated + torch.tensor(rng.normal(0, 3, (5, 4))).float()
        labels = torch.tensor(rng.integers(1, 4, 5))
        crowd = torch.tensor([i % 2, 0, 0, 0, 0])
        targets.append({"boxes": annotated, "labels": labels, "iscrowd": crowd})
        found = {
            "boxes": torch.cat([near, boxes(4, rng)]),
            "labels": torch.cat([labels, torch.tensor(rng.integers(1, 4, 4))]),
            "scores": torch.tensor(rng.permutation(9) / 9 + i / 99).float(),
        }
        predictions.append(found)
    return predictions, targets


def with_pycocotools(
    predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]], label: int | None
) -> list[float]:
    """AP, AP50 and AP75 by pycocotools alone, of one class or all."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for i, (found, target) in enumerate(zip(predictions, targets, strict=True)):
        for record, out in ((target, annotations), (found, detections)):
            for n, (left, top, right, bottom) in enumerate(record["boxes"].double().tolist()):
                item = {
                    "id": len(out) + 1, "image_id": i, "category_id": int(record["labels"][n]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top), "iscrowd": 0,
                }  # fmt: skip
                if record is target:
                    item["iscrowd"] = int(target["iscrowd"][n])
                else:
                    item["score"] = float(found["scores"][n])
                out.append(item)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(targets))],
            "annotations": annotations,
            "categories": [{"id": i} for i in (1, 2, 3)],
        }
        truth.createIndex()
        found_coco = COCO()
        found_coco.dataset = {**truth.dataset, "annotations": detections}
        found_coco.createIndex()
        evaluation = COCOeval(truth, found_coco, "bbox")
        if label is not None:
            evaluation.params.catIds = [label]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:3]]


def test_average_precision_equals_pycocotools() -> None:
    predictions, targets = crowded_images()
    pairs = zip(predictions, targets, strict=True)
    ours: Any = average_precision(pairs, ["a", "b", "c", "unseen"])
    expected = with_pycocotools(predictions, targets, None)
    assert 0.1 < expected[0] < 0.9
    assert [ours[name] for name in ("ap", "ap50", "ap75")] == pytest.approx(expected, abs=1e-6)
    for label, name in enumerate("abc", start=1):
        expected = with_pycocotools(predictions, targets, label)
        assert list(ours["per_class"][name].values()) == pytest.approx(expected, abs=1e-6)
    assert ours["per_class"]["unseen"] is None


def test_average_precision_by_hand() -> None:
    box = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    target = {"boxes": box, "labels": torch.tensor([1, 1])}
    found = {"boxes": box[:1] + torch.tensor([0, 0, 0, 3]), "labels": torch.tensor([1]),
             "scores": torch.tensor([0.9])}  # fmt: skip
    # One of two found, with an overlap of 10/13 = 0.769: precision 1 up to a recall of one half,
    # 51 of the 101 places, at six overlaps of ten.
    ours = average_precision([(found, target)], ["a"])
    assert ours["ap50"] == pytest.approx(51 / 101)
    assert ours["ap"] == pytest.approx(0.6 * 51 / 101)


def test_masks_are_judged(tmp_path: Path) -> None:
    """A detector that repeats the annotations is right in boxes and masks."""
    split = load_detection(write_coco(tmp_path / "data")).test.with_masks()

    class Oracle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            targets = [split[i][1] for i in range(len(images))]
            return [
                {
                    "boxes": target["boxes"],
                    "labels": target["labels"],
                    "scores": torch.ones(2),
                    "masks": target["masks"][:, None].float(),
                }
                for target in targets
            ]

    measured: Any = evaluate_detector(Oracle(), split, ["red", "blue"])
    assert measured["ap"] == measured["mask_ap"] == pytest.approx(1.0)
    assert measured["mask_per_class"]["blue"]["ap75"] == pytest.approx(1.0)
