"""The same numbers as lightly's criteria, in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixmask import losses

reason = "lightly is not installed; it comes with mixmask[lightly]"
pytest.importorskip("lightly", reason=reason)

from lightly import loss as lightly  # noqa: E402
from lightly.loss.swav_loss import sinkhorn  # noqa: E402

N, C = 17, 9


def _dino(z: Tensor, target: Tensor) -> Tensor:
    """lightly takes all views of both branches, and leaves out pairs of the same view."""
    criterion = lightly.DINOLoss(C)
    criterion.center.copy_(torch.linspace(-1, 1, C).view(1, 1, C))
    loss: Tensor = criterion([target, target.flip(1)], [z.flip(1), z])
    return loss


def _our_dino(z: Tensor, target: Tensor) -> Tensor:
    criterion = losses.DINO(torch.linspace(-1, 1, C))
    return (criterion(z, target) + criterion(z.flip(1), target.flip(1))) / 2


def _our_swav(z: Tensor, target: Tensor) -> Tensor:
    there = losses.swav(z, losses.sinkhorn(target))
    return (there + losses.swav(target, losses.sinkhorn(z))) / 2


PAIRS: dict[str, tuple[Any, Any]] = {
    "NTXentLoss": (losses.NTXent(0.2), lightly.NTXentLoss(0.2)),
    "BarlowTwinsLoss": (losses.BarlowTwins(0.1), lightly.BarlowTwinsLoss(0.1)),
    "VICRegLoss": (losses.VICReg(2, 3, 4), lightly.VICRegLoss(2, 3, 4)),
    "NegativeCosineSimilarity": (
        losses.NegativeCosine(),
        lambda z, target: lightly.NegativeCosineSimilarity()(z, target.detach()),
    ),
    "DINOLoss": (_our_dino, lambda z, target: _dino(z, target.detach())),
    "SwaVLoss": (_our_swav, lambda z, target: lightly.SwaVLoss()([target, z], [])),
}


@pytest.mark.parametrize("ours, theirs", PAIRS.values(), ids=PAIRS)
def test_it_agrees_with_lightly(ours: Any, theirs: Any) -> None:
    inputs = [torch.randn(N, C, requires_grad=True) for _ in range(2)]
    mine, their = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(mine, their.squeeze(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(mine, inputs, allow_unused=True),
        torch.autograd.grad(their, inputs, allow_unused=True),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("iterations", [1, 3, 7])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_sinkhorn_agrees_with_lightly(epsilon: float, iterations: int) -> None:
    scores = torch.randn(N, C).clamp(-1, 1)
    theirs = sinkhorn(scores, iterations, epsilon)
    torch.testing.assert_close(
        losses.sinkhorn(scores, epsilon, iterations), theirs, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_center_moves_as_lightlys_does(momentum: float) -> None:
    teacher = torch.randn(2, N, C)
    criterion = lightly.DINOLoss(C, center_momentum=momentum)
    center = torch.zeros(C)
    for step in range(3):
        criterion(list(teacher + step), list(teacher))
        center = losses.update_center(center, (teacher + step).flatten(0, 1), momentum)
    torch.testing.assert_close(center, criterion.center.view(-1))
