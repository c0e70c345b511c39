"""The queue's log-sum-exp where others stop: second derivatives, and losses next to zero."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask.losses import InfoNCE, info_nce

N, K, C = 5, 300, 8


def _rows(count: int) -> Tensor:
    return F.normalize(torch.randn(count, C, dtype=torch.float64), dim=1)


def _plain(z: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    logits = torch.cat([(z * target).sum(dim=1, keepdim=True), z @ negatives.T], dim=1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long))


def test_second_derivatives_are_those_of_the_formula() -> None:
    z, target, queue = (rows.requires_grad_() for rows in (_rows(N), _rows(N), _rows(K)))
    inputs = z, target, queue
    second = []
    for loss in (info_nce(z, target, queue), _plain(z, target, queue)):
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = torch.stack([(one**2).sum() for one in first]).sum()
        second.append(torch.autograd.grad(penalty, inputs))
    torch.testing.assert_close(*second)


def test_second_derivatives_pass_the_numerical_check() -> None:
    z, target, queue = (rows.requires_grad_() for rows in (_rows(3), _rows(3), _rows(6)))
    lam = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)

    def weigh(z: Tensor, target: Tensor, queue: Tensor) -> Tensor:
        return InfoNCE(queue, 0.5, reduction="none").weighted(z, target, target.flip(0), lam)

    assert torch.autograd.gradgradcheck(weigh, (z, target, queue))


def test_second_derivatives_are_refused_once_the_queue_was_written_to() -> None:
    z, target, queue = _rows(N).requires_grad_(), _rows(N), _rows(K)
    loss = info_nce(z, target, queue)
    queue[:N] = target
    # First derivatives do not read the queue: MoCo enqueues before the backward.
    assert torch.autograd.grad(loss, z, retain_graph=True)[0].any()
    with pytest.raises(RuntimeError, match=r"written to since; enqueue after the backward pass"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_a_queue_from_inference_mode_is_as_good_as_any() -> None:
    z, target = _rows(N).requires_grad_(), _rows(N)
    with torch.inference_mode():
        queue = _rows(K)
    assert torch.autograd.grad(info_nce(z, target, queue), z)[0].any()


@pytest.mark.parametrize("gap", [1.0, 15.0, 19.9, 20.1, 30.0, 60.0])
def test_a_small_or_large_loss_keeps_all_its_digits(gap: float) -> None:
    """One negative, so that the loss is log(1 + exp(± gap)); softplus cuts it off at 20."""
    for sign in (1, -1):
        z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        negative = torch.tensor([[sign * gap, 0.0]], dtype=torch.float64)
        loss = info_nce(z, torch.zeros_like(z), negative, temperature=1.0)
        expected = max(sign * gap, 0.0) + math.log1p(math.exp(-gap))
        torch.testing.assert_close(loss.item(), expected, rtol=1e-15, atol=0)
