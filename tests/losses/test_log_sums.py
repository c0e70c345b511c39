"""Log-sum-exps in chunks where others stop: derivatives of all kinds, losses next to zero."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import MixedBatch
from mixmask import lambda_weighted_loss as weigh
from mixmask.losses import InfoNCE, NTXent, _log_sums, _pair_sums, info_nce, nt_xent

N, K, C = 5, 300, 8


def _rows(count: int) -> Tensor:
    return F.normalize(torch.randn(count, C, dtype=torch.float64), dim=1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "queue": lambda z, target: info_nce(z, target, torch.eye(C, dtype=z.dtype)),
    "batch": lambda z, target: info_nce(z, target),
    "views": lambda z, target: nt_xent(z, target),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_second_derivatives_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    z, target = _rows(N).requires_grad_(), _rows(N)
    with pytest.raises(RuntimeError, match=r"no second derivatives, got create_graph=True; leave"):
        torch.autograd.grad(loss(z, target), z, create_graph=True)


@every_loss
def test_transforms_of_torch_func_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"autograd.Function with functorch transforms"):
        torch.func.grad(loss)(_rows(N), _rows(N))


def test_a_queue_may_be_written_to_before_the_backward() -> None:
    z, target, queue = _rows(N).requires_grad_(), _rows(N), _rows(K)
    expected = torch.autograd.grad(info_nce(z, target, queue.clone()), z)
    loss = info_nce(z, target, queue)
    queue[:N] = target
    assert torch.equal(torch.autograd.grad(loss, z)[0], expected[0])


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


# Whom images are mixed with: each once, and some of them twice.
PARTNERS = {"permuted": [4, 0, 3, 1, 2], "chosen twice": [1, 2, 1, 1, 0]}
BATCH: dict[str, Callable[..., Any]] = {
    "InfoNCE": lambda **options: InfoNCE(temperature=0.2, **options),
    "NTXent": lambda **options: NTXent(0.2, **options),
    "NTXent, one direction": lambda **options: NTXent(0.2, one_directional=True, **options),
}


def _in_batch(name: str, z: Tensor, target: Tensor, tau: float = 0.2) -> Tensor:
    """The formula by one matrix of logits: (N,)."""
    if name != "InfoNCE":
        z, target = F.normalize(z, dim=1), F.normalize(target, dim=1)
    n = len(z)
    if name != "NTXent":
        return F.cross_entropy(z @ target.T / tau, torch.arange(n), reduction="none")
    rows = torch.cat([z, target])
    logits = (rows @ rows.T / tau).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    loss = F.cross_entropy(logits, torch.arange(2 * n).roll(n), reduction="none")
    return loss.view(2, n).mean(dim=0)


def _weighted(name: str, z: Tensor, target: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    own, other = _in_batch(name, z, target), _in_batch(name, z, target[partner])
    return (lam * own + (1 - lam) * other).mean()


def _record(partner: list[int] | Tensor, lam: Tensor) -> MixedBatch:
    index = torch.as_tensor(partner)
    return MixedBatch(torch.empty(len(index), 1, 1, 1), lam, index)


batch_losses = pytest.mark.parametrize("name", BATCH)
partners = pytest.mark.parametrize("partner", PARTNERS.values(), ids=PARTNERS)


@batch_losses
@partners
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("elements", [1, 9, 2**18])
def test_chunks_of_any_size_give_the_formula(
    name: str, partner: list[int], reduction: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pair_sums, "_CHUNK_ELEMENTS", {"cpu": elements, "device": elements})
    monkeypatch.setattr(_log_sums, "_FEWEST_ROWS", 2)
    inputs: Any = tuple(_rows(N).requires_grad_() for _ in range(2))
    lam = torch.linspace(0.1, 0.9, N, dtype=torch.float64)
    ours = weigh(BATCH[name](reduction=reduction), inputs[0], inputs[1], _record(partner, lam))
    slow = _weighted(name, inputs[0], inputs[1], torch.tensor(partner), lam)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs))


@batch_losses
@partners
@pytest.mark.parametrize("n, c", [(509, 7), (257, 33)])
def test_odd_sizes_in_single_precision(name: str, partner: list[int], n: int, c: int) -> None:
    z, target = (F.normalize(torch.randn(n, c), dim=1).requires_grad_() for _ in range(2))
    index = torch.arange(n).roll(1)
    if partner == PARTNERS["chosen twice"]:
        index[: n // 3] = 5
    lam = torch.rand(n)
    ours = weigh(BATCH[name](), z, target, _record(index, lam))
    exact: Any = [rows.detach().double().requires_grad_() for rows in (z, target)]
    slow = _weighted(name, exact[0], exact[1], index, lam.double())
    torch.testing.assert_close(ours.double(), slow, rtol=1e-6, atol=1e-6)
    gradients = zip(
        torch.autograd.grad(ours, (z, target)), torch.autograd.grad(slow, exact), strict=True
    )
    for found, expected in gradients:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


@batch_losses
@partners
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_terms_in_bfloat16_stay_within_the_error_of_the_formula(
    name: str, partner: list[int], autocast: bool, within_budget: Callable[..., None]
) -> None:
    repeated = torch.tensor([5 * i + one for i in range(12) for one in partner])
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = [F.normalize(torch.randn(60, 32), dim=1).to(dtype) for _ in range(2)]
    lam = torch.rand(60)
    within_budget(
        lambda z, t: weigh(BATCH[name](), z, t, _record(repeated, lam)),
        lambda z, t: _weighted(name, z, t, repeated, lam),
        inputs,
        autocast=autocast,
    )


@batch_losses
@partners
def test_no_matrix_over_the_batch_is_kept(name: str, partner: list[int]) -> None:
    n, c = 600, 4
    index = torch.tensor([5 * i + one for i in range(n // 5) for one in partner])
    z, target = (torch.randn(n, c).requires_grad_() for _ in range(2))
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.autograd.backward(weigh(BATCH[name](), z, target, _record(index, torch.tensor(0.3))))
    assert max(sizes) <= 2 * n * c


@batch_losses
@partners
@pytest.mark.parametrize("tau", [0.001, 0.01, 0.05])
def test_small_temperatures_neither_overflow_nor_vanish(
    name: str, partner: list[int], tau: float
) -> None:
    z, target = (_rows(N).float().requires_grad_() for _ in range(2))
    criterion = BATCH[name](reduction="none")
    criterion = dataclasses.replace(criterion, temperature=tau)
    lam = torch.tensor(0.3)
    ours = weigh(criterion, z, target, _record(partner, lam))
    wide: Any = (z.double(), target.double())
    index = torch.tensor(partner)
    own, other = (
        _in_batch(name, wide[0], wide[1], tau),
        _in_batch(name, wide[0], wide[1][index], tau),
    )
    slow = (lam * own + (1 - lam) * other).mean()
    torch.testing.assert_close(ours.double(), slow, rtol=1e-5, atol=1e-5)
    assert all(one.isfinite().all() for one in torch.autograd.grad(ours, (z, target)))


@batch_losses
@partners
def test_the_shares_have_a_gradient_too(name: str, partner: list[int]) -> None:
    z, target = _rows(N), _rows(N)
    lam = torch.rand(N, dtype=torch.float64).requires_grad_()
    ours = weigh(BATCH[name](), z, target, _record(partner, lam))
    slow = _weighted(name, z, target, torch.tensor(partner), lam)
    torch.testing.assert_close(torch.autograd.grad(ours, lam), torch.autograd.grad(slow, lam))
