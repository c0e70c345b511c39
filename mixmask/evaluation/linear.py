"""A linear probe on frozen features, by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask._seeds import check_seed
from mixmask.evaluation.metrics import check_features, count_classes, top1_accuracy
from mixmask.evaluation.tasks import Details, ProtocolOptions, Task
from mixmask.runs.options import HELP, option

# From strong to weak; at 1e-6 features of usual widths are fitted almost freely.
PENALTIES = (1.0, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
# Weaker penalties are not tried once so many in a row have done no better.
_PATIENCE = 3
# Share of the training features that chooses the penalty, drawn at random.
_HELD_OUT = 0.2
# Where a fit stops: the gradient's largest entry, and iterations. Choosing needs less than testing.
_CHOOSING, _TESTING = (1e-4, 100), (1e-6, 1000)
# Rows whose logits are alive at once.
_ROWS = 2**16


@dataclass(frozen=True)
class Linear(ProtocolOptions):
    """Logistic regression on frozen features of whole images, see `linear_scores`."""

    seed: int = option(0, HELP["seed"], low=0, high=2**31 - 1)
    name: ClassVar[str] = "linear"

    def measure(self, task: Task, progress: bool) -> tuple[Tensor, Details]:
        """Return scores (M, C) of the test images."""
        del progress
        (x, x_test), labels = task.features(), task.labels[0]
        scores, penalty = linear_scores(
            x, labels, x_test, classes=len(task.classes), seed=self.seed
        )
        return scores, {"n_train": len(x), "dim": x.shape[1], "penalty": penalty}


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> float:
    """Return the top-1 accuracy, 0 ... 1, of the probe that `linear_scores` fits.

    Takes the arguments of `linear_scores`, and the test labels (M,) int64; raises the same errors.

    Example:
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
        >>> x[:, :3] += 9 * F.one_hot(y, 3)
        >>> linear_accuracy(x, y, x, y)
        1.0
    """
    check_features("test", test, test_labels)
    scores, _ = linear_scores(train, train_labels, test, penalties=penalties, seed=seed)
    return top1_accuracy(scores, test_labels)


@torch.no_grad()
def linear_scores(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    classes: int | None = None,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Fit multinomial logistic regression on standardised features.

    The L2 penalty is the one that does best on a held-out part of the training features, the
    strongest of equals; the probe is then fitted on all of them. A penalty p is scikit-learn's
    C = 1 / (p N).

    Args:
        train: (N, D) floating features.
        train_labels: (N,) int64, from 0.
        test: (M, D) floating features.
        classes: Number of classes. Default: one more than the largest label.
        penalties: Weights of half the squared norm, beside the mean cross-entropy.
        seed: Of the choice of the held-out part, a fifth.

    Returns:
        (M, classes) float32 logits on the device of `train`, and the penalty.

    Raises:
        ValueError: If a split is empty, unlabelled or not finite, or an option is out of range.
    """
    check_features("train", train, train_labels)
    check_features("test", test)
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties must be positive numbers, got {penalties}; use for instance 1")
    check_seed(seed)
    classes, device = count_classes(train_labels, classes), train.device
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(device)
    # Deviations of constant features are 0, and a single row has none.
    std, mean = torch.std_mean(train.float(), dim=0, correction=0)
    if not (mean.isfinite().all() and test.sum().isfinite()):
        raise ValueError("features must be finite, got NaN or infinity; the run may have diverged")
    std.clamp_min_(1e-6)
    x, y = (train[order].float() - mean) / std, train_labels.to(device)[order]
    held = round(_HELD_OUT * len(x))
    if len(penalties) == 1 or held in (0, len(x)):
        best = penalties[0]
    else:
        best = _choose(x[held:], y[held:], x[:held], y[:held], classes, penalties)
    weight, bias = _fit(x, y, classes, best, _TESTING)
    # Test features are standardised as the training ones were: (M, D) -> (M, C).
    return ((test.to(device).float() - mean) / std) @ weight.T + bias, best


def _choose(
    x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor, classes: int, penalties: Sequence[float]
) -> float:
    """Return the penalty that does best on held-out rows, each fit starting from the one before."""
    best, most, waited = max(penalties), -1, 0
    start = None
    for penalty in sorted(penalties, reverse=True):
        start = _fit(x, y, classes, penalty, _CHOOSING, start)
        logits = x_held @ start[0].T + start[1]  # (H, C)
        right = int((logits.argmax(dim=1) == y_held).sum())
        waited += 1
        if right > most:
            best, most, waited = penalty, right, 0
        if waited == _PATIENCE:
            break
    return best


def _fit(
    x: Tensor,
    y: Tensor,
    classes: int,
    penalty: float,
    stop: tuple[float, int],
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    if start is None:
        start = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=stop[1],
        history_size=20,
        tolerance_grad=stop[0],
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalty / 2 * weight.square().sum()
        loss.backward()
        # The gradient of each part is added before the next one's logits are made.
        for rows, right in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            part = F.cross_entropy(rows @ weight.T + bias, right, reduction="sum") / len(x)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
