"""Training loops taken again slowly, after the papers; shared by the tests of others' loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import codebases
import torch
from codebases import Run, SlowSGD, Step
from torch import Tensor

N, STEPS = 8, 3
# The loss of one step from a copy of the model, its two views, the mixed view and its share.
SlowLoss = Callable[[Any, Sequence[Tensor], Tensor, float], Tensor]


def slowly(
    run: Run, batches: Sequence[Any], loss_of: SlowLoss, optimizer: SlowSGD
) -> tuple[list[Step], dict[str, Tensor]]:
    """Take the steps of a run again, with a loss written out, and return them and the end state."""
    model, steps = copy.deepcopy(run.initial), []
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for (views, _), cells in zip(batches, run.masks, strict=True):
        loss = loss_of(model, views, *codebases.mixed_slowly(views[0], cells))
        gradients = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))
        optimizer.step(weights, gradients)
        steps.append(Step(loss.detach(), gradients))
    return steps, model.state_dict()


def toward(z: Tensor, target: Tensor, lam: float, loss: Callable[..., Tensor]) -> Tensor:
    """Eq. 4: the mixed rows towards their own targets and their partners', image by image."""
    total = torch.zeros(())
    for i in range(N):
        total = total + lam * loss(z[i], target[i]) + (1 - lam) * loss(z[i], target[N - 1 - i])
    return total / N


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """SimCLR, eq. 1 over the 2N rows."""
    rows = [z / z.norm() for z in [*z1, *z2]]
    total = torch.zeros(())
    for i, row in enumerate(rows):
        others = torch.stack([row @ rows[j] for j in range(2 * N) if j != i]) / temperature
        positive = row @ rows[(i + N) % (2 * N)] / temperature
        total = total + others.exp().sum().log() - positive
    return total / (2 * N)
