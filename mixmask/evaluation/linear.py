"""A linear probe on frozen features, by L-BFGS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1),
    held_out: float = 0.2,
    seed: int = 0,
) -> float:
    """Fit multinomial logistic regression on standardised features and test it.

    The L2 penalty is the one that does best on a held-out part of the training features; the
    probe is then fitted on all of them.

    Args:
        train: (N, D) features.
        train_labels: (N,) int64.
        test: (M, D) features.
        test_labels: (M,) int64.
        penalties: Weights of half the squared norm, beside the mean cross-entropy.
        held_out: Share of the training features that chooses the penalty.
        seed: Of the choice of that part.

    Returns:
        Top-1 accuracy, 0 ... 1.

    Example:
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
        >>> x[:, :3] += 9 * F.one_hot(y, 3)
        >>> linear_accuracy(x, y, x, y)
        1.0
    """
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    train_labels, test_labels = train_labels.to(train.device), test_labels.to(train.device)
    classes = int(train_labels.max()) + 1
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    order = order.to(train.device)
    held, kept = order[: round(held_out * len(train))], order[round(held_out * len(train)) :]

    def score(penalty: float) -> float:
        probe = _fit(train[kept], train_labels[kept], classes, penalty)
        return _accuracy(probe, train[held], train_labels[held])

    best = max(penalties, key=score)
    return _accuracy(_fit(train, train_labels, classes, best), test, test_labels)


def _fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(probe: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    weight, bias = probe
    return ((x @ weight.T + bias).argmax(dim=1) == y).float().mean().item()
