"""The accuracies that are measured during a training run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixmask.data.sets import ImageData, Images
from mixmask.evaluation.features import extract_features
from mixmask.evaluation.linear import linear_accuracy
from mixmask.evaluation.neighbours import knn_accuracy
from mixmask.runs.folder import Row

# Of a folder on disk, at most this many images per split are used: to read all of ImageNet takes
# as long as an epoch.
MEASURED = 50_000


def accuracy_monitor(data: ImageData, image_size: int) -> Callable[[nn.Module, bool], Row] | None:
    """Return what measures a backbone on the test split; None without labels.

    It returns "knn" and, if its second argument is true, "linear": accuracies of 0 ... 1. Of
    images on disk, at most `MEASURED` per split are used. The backbone sees them at `image_size`
    pixels, as in the evaluation of the run; see `extract_features`.
    """
    if not data.labelled:
        return None
    train, test = (_sample(*split) for split in data.labelled_splits())

    def measure(backbone: nn.Module, thorough: bool) -> Row:
        x, x_test = (
            extract_features(backbone, each, size=image_size) for each in (train[0], test[0])
        )
        measured = {"knn": knn_accuracy(x, train[1], x_test, test[1])}
        if thorough:
            measured["linear"] = linear_accuracy(x, train[1], x_test, test[1])
        return measured

    return measure


def _sample(images: Images, labels: Tensor) -> tuple[Images, Tensor]:
    """Return a split or, of a large folder, images that lie evenly in its order."""
    if isinstance(images, Tensor) or len(images) <= MEASURED:
        return images, labels
    index = torch.linspace(0, len(images) - 1, MEASURED, dtype=torch.float64).long()
    return images.subset(index), labels[index]
