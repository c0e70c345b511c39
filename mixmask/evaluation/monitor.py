"""The accuracies that are measured during a training run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixmask.data.sets import ImageData, Split
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
    train, test = map(_sample, data.labelled_splits())
    labels, test_labels = train.labels, test.labels
    assert labels is not None
    assert test_labels is not None

    def measure(backbone: nn.Module, thorough: bool) -> Row:
        x, x_test = (
            extract_features(backbone, split.images, size=image_size) for split in (train, test)
        )
        measured = {"knn": knn_accuracy(x, labels, x_test, test_labels)}
        if thorough:
            measured["linear"] = linear_accuracy(x, labels, x_test, test_labels)
        return measured

    return measure


def _sample(split: Split) -> Split:
    """Return a split or, of a large folder, images that lie evenly in its order."""
    count = len(split.images)
    if isinstance(split.images, Tensor) or count <= MEASURED:
        return split
    return split.subset(torch.linspace(0, count - 1, MEASURED, dtype=torch.float64).long())
