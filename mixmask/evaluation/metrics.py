"""Accuracies from class scores, and checks of features and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# With five classes the right one is always among the five best.
_TOP = 5
# A matrix of more classes would fill the JSON; the picture shows it all the same.
_MATRIX_CLASSES = 100
# The normal distribution's quantile of a two-sided interval of 95 %.
_QUANTILE = 1.959963984540054
INTERVAL = "95 %, Wilson"

# Low and high end of an accuracy, 0 ... 1.
Interval = tuple[float, float]


@dataclass(frozen=True)
class Accuracy:
    """How often predictions are right.

    Attributes:
        top1: Share of images whose best class is the right one, 0 ... 1.
        top5: Share whose right class is among the five best; None up to five classes, where it
            says nothing.
        mean_class: Mean over the classes that occur of their shares of right predictions.
        per_class: (C,) float64 shares; NaN for classes that do not occur.
        confusion: (C, C) int64 counts: rows are the right classes, columns the predicted ones.
    """

    top1: float
    top5: float | None
    mean_class: float
    per_class: Tensor = field(repr=False)
    confusion: Tensor = field(repr=False)

    def intervals(self) -> dict[str, Interval]:
        """Return the 95 % intervals of `top1`, `top5` where there is one, and `mean_class`.

        They tell how far other test images might move an accuracy, not another seed of the run.

        Source:
            `wilson_interval`; the classes' intervals make that of their mean as in Zou, Huang and
            Zhang, "... confidence interval estimation for a linear function of ... proportions".
        """
        images = int(self.confusion.sum())
        found = {"top1": wilson_interval(self.top1, images)}
        if self.top5 is not None:
            found["top5"] = wilson_interval(self.top5, images)
        pairs = zip(self.per_class.tolist(), self.class_intervals(), strict=True)
        each = [(share, *ends) for share, ends in pairs if ends]
        below = math.hypot(*(share - low for share, low, _ in each)) / len(each)
        above = math.hypot(*(high - share for share, _, high in each)) / len(each)
        return found | {"mean_class": (self.mean_class - below, self.mean_class + above)}

    def class_intervals(self) -> list[Interval | None]:
        """Return those of `per_class`; None for classes that do not occur."""
        counts = self.confusion.sum(dim=1).tolist()  # (C,)
        pairs = zip(self.per_class.tolist(), counts, strict=True)
        return [wilson_interval(share, count) if count else None for share, count in pairs]

    def to_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Return all that JSON can hold; a matrix of more than 100 classes is left out."""
        shares = [None if math.isnan(share) else share for share in self.per_class.tolist()]
        results: dict[str, object] = {
            "top1": self.top1,
            "top5": self.top5,
            "mean_class": self.mean_class,
            "intervals": {
                "kind": INTERVAL,
                **self.intervals(),
                "per_class": dict(zip(classes, self.class_intervals(), strict=True)),
            },
            "per_class": dict(zip(classes, shares, strict=True)),
            "confusion": self.confusion.tolist() if len(classes) <= _MATRIX_CLASSES else None,
        }
        return {name: value for name, value in results.items() if value is not None}


def measure_accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """Compare the scores of classes with the labels.

    Of classes with equal scores, the one with the lower number comes first.

    Args:
        scores: (M, C), larger for likelier classes.
        labels: (M,) int64 below C.

    Raises:
        ValueError: If shapes do not fit, there are no rows, a label has no score, or a score is
            not finite.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
        >>> measured = measure_accuracy(scores, torch.tensor([0, 1, 1]))
        >>> measured.confusion.tolist(), measured.mean_class
        ([[1, 0], [1, 1]], 0.75)
    """
    check_features("scores", scores, labels)
    if not scores.isfinite().all():
        raise ValueError("scores must be finite, got NaN or infinity; the training has diverged")
    classes = count_classes(labels, scores.shape[1])
    labels = labels.to(scores.device)
    own = scores.gather(1, labels[:, None])  # (M, 1)
    before = torch.arange(classes, device=scores.device) < labels[:, None]  # (M, C)
    # Counting what comes before the right class needs no sorting.
    rank = ((scores > own) | ((scores == own) & before)).sum(dim=1)
    best = (scores == scores.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    confusion = torch.bincount(labels * classes + best, minlength=classes**2)
    confusion = confusion.view(classes, classes).cpu()  # (C * C,) -> (C, C)
    per_class = confusion.diagonal().double() / confusion.sum(dim=1)  # (C,)
    return Accuracy(
        # Counted in integers: some devices have no float64.
        top1=int((rank == 0).sum()) / len(rank),
        top5=int((rank < _TOP).sum()) / len(rank) if classes > _TOP else None,
        mean_class=float(per_class.nanmean()),
        per_class=per_class,
        confusion=confusion,
    )


def wilson_interval(share: float, images: int) -> Interval:
    """Return the 95 % interval of a share of independent images, 0 ... 1.

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n) with z = 1.96.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Example:
        >>> low, high = wilson_interval(0.44, 372)
        >>> round(low, 3), round(high, 3)
        (0.39, 0.491)
    """
    square = _QUANTILE**2 / images
    half = math.sqrt(square * share * (1 - share) + square**2 / 4)
    low, high = ((share + square / 2 + side) / (1 + square) for side in (-half, half))
    return max(0.0, low), min(1.0, high)


def top1_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of rows of (M, C) scores whose largest is that of the label."""
    return float((scores.argmax(dim=1) == labels.to(scores.device)).float().mean())


def check_features(name: str, features: Tensor, labels: Tensor | None = None) -> None:
    """Check for floating features (N, D), N and D of at least 1, and N non-negative labels."""
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(
            f"{name} must be (N, D) and not be empty, got {tuple(features.shape)}; both splits "
            "need at least one image"
        )
    if not features.is_floating_point():
        raise TypeError(f"{name} must be floating, got {features.dtype}; convert with .float()")
    if labels is None:
        return
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels of {name} must be ({len(features)},), one for each row, got "
            f"{tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels of {name} must be int64, got {labels.dtype}; use .long()")
    if int(labels.min()) < 0:
        raise ValueError(
            f"labels of {name} must be at least 0, got {int(labels.min())}; leave unlabelled "
            "images out"
        )


def count_classes(labels: Tensor, classes: int | None = None) -> int:
    """Return the number of classes; labels must lie below it where it is given."""
    largest = int(labels.max())
    if classes is not None and largest >= classes:
        raise ValueError(
            f"labels must lie below the number of classes, {classes}, got {largest}; both splits "
            "need the same classes"
        )
    return largest + 1 if classes is None else classes
