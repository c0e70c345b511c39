from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import LambdaWeightedLoss, MixedBatch, lambda_weighted_loss
from mixmask.losses import DINO, SwAV, dino, sinkhorn, swav, update_center

N, K = 7, 5
PERMUTED = torch.tensor([3, 4, 0, 1, 6, 5, 2])
ARBITRARY = torch.tensor([2, 0, 1, 6, 3, 4, 4])
CENTER = torch.tensor([0.1, -0.2, 0.3, 0.0, -0.4], dtype=torch.float64)

low_precision = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)


def _rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _codes(*shape: int) -> Tensor:
    return _rows(*shape).softmax(dim=1)


def _mixed(partner: Tensor, lam: Tensor) -> MixedBatch:
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), lam, partner)


def _shares(logits: Tensor, tau: float) -> list[Tensor]:
    powers = [(logits[k] / tau).exp() for k in range(len(logits))]
    total = torch.zeros((), dtype=logits.dtype)
    for power in powers:
        total = total + power
    return [power / total for power in powers]


def _cross_entropy(z: Tensor, target: Tensor, tau: float) -> list[Tensor]:
    """Of each row, class by class; the target is a distribution."""
    terms = []
    for own, wanted in zip(z, target, strict=True):
        term = torch.zeros((), dtype=z.dtype)
        for share, t in zip(_shares(own, tau), wanted, strict=True):
            term = term - t * share.log()
        terms.append(term)
    return terms


def _teacher(target: Tensor, center: Tensor | None, tau: float) -> Tensor:
    rows = [row if center is None else row - center.view(-1) for row in target]
    return torch.stack([torch.stack(_shares(row, tau)) for row in rows])


# By name: the criterion, its targets as it is given them, and as distributions.
CRITERIA: dict[str, tuple[Any, Callable[[], Tensor], Callable[[Tensor], Tensor], float]] = {
    "SwAV": (SwAV(0.3, reduction="none"), lambda: _codes(N, K), lambda t: t, 0.3),
    "DINO": (
        DINO(CENTER, 0.3, 0.5, reduction="none"),
        lambda: _rows(N, K),
        lambda t: _teacher(t, CENTER, 0.5),
        0.3,
    ),
    "DINO without center": (
        DINO(None, 0.3, 0.5, reduction="none"),
        lambda: _rows(N, K),
        lambda t: _teacher(t, None, 0.5),
        0.3,
    ),
}
criteria = pytest.mark.parametrize(
    "criterion, draw, distribution, tau", CRITERIA.values(), ids=CRITERIA
)


@criteria
def test_it_agrees_with_a_loop(criterion: Any, draw: Any, distribution: Any, tau: float) -> None:
    z, target = _rows(N, K).requires_grad_(), draw()
    weights = torch.rand(N, dtype=torch.float64)
    ours = criterion(z, target)
    slow = torch.stack(_cross_entropy(z, distribution(target), tau))
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(
        torch.autograd.grad(ours @ weights, z), torch.autograd.grad(slow @ weights, z)
    )


def test_functions_take_the_mean_by_default() -> None:
    z, codes, logits = _rows(N, K), _codes(N, K), _rows(N, K)
    torch.testing.assert_close(swav(z, codes, 0.3), swav(z, codes, 0.3, reduction="none").mean())
    torch.testing.assert_close(
        dino(z, logits, CENTER, 0.3, 0.5), CRITERIA["DINO"][0](z, logits).mean()
    )


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("partner", [PERMUTED, ARBITRARY], ids=["permuted", "arbitrary"])
@criteria
def test_mixed_terms_agree_with_equation_4(
    criterion: Any,
    draw: Any,
    distribution: Any,
    tau: float,
    partner: Tensor,
    per_sample: bool,
    switch: bool,
) -> None:
    z, target = _rows(N, K).requires_grad_(), draw()
    lam = torch.rand(N if per_sample else (), dtype=torch.float64)
    ours = lambda_weighted_loss(criterion, z, target, _mixed(partner, lam), switch=switch)
    own = _cross_entropy(z, distribution(target), tau)
    other = _cross_entropy(z, distribution(target[partner]), tau)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        share = lam[i] if per_sample else lam
        total = total + share * own[i] / N
        if switch:
            total = total + (1 - share) * other[i] / N
    torch.testing.assert_close(ours, total)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(total, z))


@criteria
def test_gradients_pass_gradcheck(criterion: Any, draw: Any, distribution: Any, tau: float) -> None:
    del distribution, tau
    z, target, z_mixed = _rows(N, K).requires_grad_(), draw(), _rows(N, K).requires_grad_()
    for switch in (True, False):
        whole = LambdaWeightedLoss(criterion, switch=switch)
        for lam in (torch.rand(()), torch.rand(N)):
            mixed = _mixed(ARBITRARY, lam.double())
            assert torch.autograd.gradcheck(
                lambda z, m, mixed=mixed, whole=whole: whole(z, target, m, mixed), (z, z_mixed)
            )


@pytest.mark.parametrize("lam", [0.0, 1.0])
@criteria
def test_at_its_limits_one_target_is_left(
    criterion: Any, draw: Any, distribution: Any, tau: float, lam: float
) -> None:
    del distribution, tau
    z, target = _rows(N, K), draw()
    mixed = _mixed(ARBITRARY, torch.tensor(lam, dtype=torch.float64))
    expected = criterion(z, target if lam == 1 else target[ARBITRARY]).mean()
    torch.testing.assert_close(lambda_weighted_loss(criterion, z, target, mixed), expected)


@pytest.mark.parametrize("per_sample", [True, False])
@criteria
def test_the_minimum_is_the_entropy_of_the_mixed_target(
    criterion: Any, draw: Any, distribution: Any, tau: float, per_sample: bool
) -> None:
    target = draw()
    lam = torch.rand(N if per_sample else (), dtype=torch.float64)
    shares = lam.expand(N)[:, None]
    wanted = distribution(target)
    mixture = shares * wanted + (1 - shares) * wanted[PERMUTED]
    best = (tau * mixture.log() + 3).requires_grad_()
    loss = lambda_weighted_loss(criterion, best, target, _mixed(PERMUTED, lam))
    torch.testing.assert_close(loss, -(mixture * mixture.log()).sum(dim=1).mean())
    assert torch.autograd.grad(loss, best)[0].abs().max() < 1e-12
    nearby = best.detach() + 0.1 * _rows(N, K)
    assert lambda_weighted_loss(criterion, nearby, target, _mixed(PERMUTED, lam)) > loss


@criteria
def test_no_gradient_goes_to_targets(
    criterion: Any, draw: Any, distribution: Any, tau: float
) -> None:
    del distribution, tau
    z, target = _rows(N, K).requires_grad_(), draw().requires_grad_()
    mixed = lambda_weighted_loss(criterion, z, target, _mixed(PERMUTED, torch.rand(N)))
    for loss in (criterion(z, target).mean(), mixed):
        assert torch.autograd.grad(loss, (z, target), allow_unused=True)[1] is None


def test_a_shift_of_all_logits_of_a_row_does_not_matter() -> None:
    z, target, shift = _rows(N, K), _rows(N, K), _rows(N, 1)
    expected = dino(z, target, CENTER)
    torch.testing.assert_close(dino(z + shift, target - shift, CENTER), expected)


def test_a_center_may_have_an_axis_of_its_own() -> None:
    z, target = _rows(N, K), _rows(N, K)
    torch.testing.assert_close(dino(z, target, CENTER[None]), dino(z, target, CENTER))
    assert dino(z, target, CENTER) != dino(z, target)


def _plain_swav(z: Tensor, target: Tensor) -> Tensor:
    return -(target.detach() * F.log_softmax(z / 0.1, dim=1)).sum(dim=1)


def _plain_dino(z: Tensor, target: Tensor) -> Tensor:
    center = CENTER.repeat(8)[:32].to(target.dtype)
    wanted = ((target.detach() - center) / 0.04).softmax(dim=1)
    return -(wanted * F.log_softmax(z / 0.1, dim=1)).sum(dim=1)


def _dino(z: Tensor, target: Tensor) -> Tensor:
    return dino(z, target, CENTER.repeat(8)[:32].to(target.dtype), reduction="none")


@low_precision
@pytest.mark.parametrize(
    "ours, plain",
    [(lambda z, t: swav(z, t, reduction="none"), _plain_swav), (_dino, _plain_dino)],
    ids=["SwAV", "DINO"],
)
def test_low_precision_stays_within_the_error_of_the_plain_formula(
    dtype: torch.dtype, ours: Any, plain: Any, within_budget: Callable[..., None]
) -> None:
    target = _codes(64, 32) if plain is _plain_swav else _rows(64, 32)
    within_budget(ours, plain, [_rows(64, 32).to(dtype), target.to(dtype)])


@pytest.mark.parametrize(
    "ours, plain",
    [(lambda z, t: swav(z, t, reduction="none"), _plain_swav), (_dino, _plain_dino)],
    ids=["SwAV", "DINO"],
)
def test_autocast_stays_within_the_error_of_the_plain_formula(
    ours: Any, plain: Any, within_budget: Callable[..., None]
) -> None:
    target = _codes(64, 32) if plain is _plain_swav else _rows(64, 32)
    within_budget(ours, plain, [_rows(64, 32).float(), target.float()], autocast=True)


@low_precision
@pytest.mark.parametrize("tau", [0.04, 0.1, 1.0])
def test_huge_logits_do_not_overflow(dtype: torch.dtype, tau: float) -> None:
    z, target = ((_rows(N, K) * 1e4).to(dtype) for _ in range(2))
    z.requires_grad_()
    codes, mixed = sinkhorn(target), _mixed(PERMUTED, torch.rand(N))

    def weighted(criterion: Any, z: Tensor, target: Tensor) -> Tensor:
        return lambda_weighted_loss(criterion, z, target, mixed)

    teacher = DINO(None, tau, tau)
    for ours, exact in (
        (weighted(SwAV(tau), z, codes), weighted(SwAV(tau), z.double(), codes.double())),
        (weighted(teacher, z, target), weighted(teacher, z.double(), target.double())),
        (swav(z, codes, tau), swav(z.double(), codes.double(), tau)),
        (dino(z, target, None, tau, tau), dino(z.double(), target.double(), None, tau, tau)),
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(ours, z)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(K,), (1, K)])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_center_moves_towards_the_mean(shape: tuple[int, ...], momentum: float) -> None:
    center, target = CENTER.view(shape), _rows(N, K).requires_grad_()
    before = center.clone()
    moved = update_center(center, target, momentum)
    assert moved.shape == shape
    assert not moved.requires_grad
    for k in range(K):
        mean = sum(float(row[k]) for row in target.detach()) / N
        expected = momentum * float(before.view(-1)[k]) + (1 - momentum) * mean
        assert float(moved.view(-1)[k]) == pytest.approx(expected)
    assert torch.equal(center, before)


@low_precision
def test_the_center_stays_in_its_dtype(dtype: torch.dtype) -> None:
    target = (_rows(64, K) + 100).to(dtype)
    moved = update_center(torch.zeros(K), target)
    assert moved.dtype == torch.float32
    expected = 0.1 * target.double().mean(dim=0)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-6, atol=0)


def test_losses_on_a_device(device: torch.device) -> None:
    z, target = _rows(N, K).float(), _rows(N, K).float()
    lam = torch.rand(N)
    there = _mixed(PERMUTED.to(device), lam)
    center = update_center(torch.zeros(K, device=device), target.to(device))
    expected = update_center(torch.zeros(K), target)
    torch.testing.assert_close(center.cpu(), expected)
    codes = sinkhorn(target.to(device))
    torch.testing.assert_close(codes.cpu(), sinkhorn(target))
    for ours, goal, plain, aim in (
        (SwAV(), codes, SwAV(), sinkhorn(target)),
        (DINO(center), target.to(device), DINO(expected), target),
    ):
        loss = lambda_weighted_loss(ours, z.to(device), goal, there)
        torch.testing.assert_close(
            loss.cpu(), lambda_weighted_loss(plain, z, aim, _mixed(PERMUTED, lam))
        )
