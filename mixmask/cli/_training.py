"""What the commands that train share: threads, and the monitor of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmask.cli._console import labelled_splits

if TYPE_CHECKING:
    from torch import nn

    from mixmask.data.sets import ImageData, Images

# Of a folder that stays on disk, a monitor takes no more images: to read all of ImageNet lasts as
# long as an epoch.
MEASURED = 50_000


def accuracy_monitor(data: ImageData) -> Callable[[nn.Module, bool], dict[str, float]] | None:
    """Measure kNN and linear accuracy on the test split, where there are labels.

    Of images that stay on disk, at most `MEASURED` of each split are taken.
    """
    from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy

    if not data.labelled:
        return None
    train, test = (_some(*split) for split in labelled_splits(data))

    def measure(backbone: nn.Module, thorough: bool) -> dict[str, float]:
        x, x_test = (extract_features(backbone, images) for images in (train[0], test[0]))
        measured = {"knn": knn_accuracy(x, train[1], x_test, test[1])}
        if thorough:
            measured["linear"] = linear_accuracy(x, train[1], x_test, test[1])
        return measured

    return measure


def _some(images: Images, labels: Tensor) -> tuple[Images, Tensor]:
    """Return all images of a split or, of a large folder, some that lie evenly in its order."""
    if isinstance(images, Tensor) or len(images) <= MEASURED:
        return images, labels
    index = torch.linspace(0, len(images) - 1, MEASURED, dtype=torch.float64).long()
    return images.subset(index), labels[index]
