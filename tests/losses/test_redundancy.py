from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixmask import LambdaWeightedLoss, MixedBatch, lambda_weighted_loss
from mixmask.losses import (
    BarlowTwins,
    MatchedBarlowTwins,
    VICReg,
    barlow_twins,
    vicreg,
)

N, C = 7, 5
PERMUTED = torch.tensor([3, 4, 0, 1, 6, 5, 2])
ARBITRARY = torch.tensor([2, 0, 1, 6, 3, 4, 4])
# Of different means and deviations, on either side of VICReg's hinge.
SCALE = torch.tensor([0.2, 0.7, 1.0, 2.0, 5.0], dtype=torch.float64)
SHIFT = torch.tensor([0.0, 3.0, -1.0, 0.5, 2.0], dtype=torch.float64)

partners = pytest.mark.parametrize("partner", [PERMUTED, ARBITRARY], ids=["permuted", "arbitrary"])
switches = pytest.mark.parametrize("switch", [True, False], ids=["switch", "no switch"])


def _rows(n: int = N) -> Tensor:
    return torch.randn(n, C, dtype=torch.float64) * SCALE + SHIFT


def _leaves(count: int) -> tuple[Tensor, ...]:
    return tuple(_rows().requires_grad_() for _ in range(count))


def _mixed(partner: Tensor, lam: Tensor | float) -> MixedBatch:
    shares = torch.as_tensor(lam, dtype=torch.float64)
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), shares, partner)


def _gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def _mean(values: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for value in values:
        total = total + value
    return total / len(values)


def _correlation(z: Tensor, target: Tensor, reference: Tensor | None = None) -> list[list[Tensor]]:
    """C of eq. 2, element by element; z is standardised by the statistics of the reference."""
    reference = z if reference is None else reference
    means = [_mean(list(rows.T[i])) for rows in (reference, target) for i in range(C)]
    matrix: list[list[Tensor]] = []
    for i in range(C):
        matrix.append([])
        for j in range(C):
            of_z = _mean([(row[i] - means[i]) ** 2 for row in reference]) + 1e-5
            of_target = _mean([(row[j] - means[C + j]) ** 2 for row in target]) + 1e-5
            products = [(z[n, i] - means[i]) * (target[n, j] - means[C + j]) for n in range(len(z))]
            matrix[-1].append(_mean(products) / (of_z * of_target) ** 0.5)
    return matrix


def _barlow(z: Tensor, target: Tensor, weight: float) -> Tensor:
    correlation = _correlation(z, target)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(C):
        for j in range(C):
            square = (correlation[i][j] - float(i == j)) ** 2
            total = total + (square if i == j else weight * square)
    return total


def _matched(
    z_mixed: Tensor, target: Tensor, z: Tensor, mixed: MixedBatch, weight: float, switch: bool
) -> Tensor:
    z = z.detach()
    lam = mixed.lam
    ours = _correlation(z_mixed, target, z)
    # One λ a sample is a weight of rows, inside the mean: shares of z, relative to its mean.
    centre = z.mean(dim=0)
    shares = lam.expand(N)[:, None]
    mixture = shares * (z - centre)
    if switch:
        mixture = mixture + (1 - shares) * (z[mixed.partner] - centre)
    wanted = _correlation(mixture + centre, target, z)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(C):
        for j in range(C):
            total = total + (1 if i == j else weight) * (ours[i][j] - wanted[i][j]) ** 2
    return total


def _distance(z: Tensor, target: Tensor) -> list[Tensor]:
    return [_mean([(z[n, i] - target[n, i]) ** 2 for i in range(C)]) for n in range(len(z))]


def _spread(z: Tensor, variance_weight: float, covariance_weight: float) -> Tensor:
    n = len(z)
    means = [_mean(list(z.T[i])) for i in range(C)]

    def covariance(i: int, j: int) -> Tensor:
        products = [(row[i] - means[i]) * (row[j] - means[j]) for row in z]
        return _mean(products) * n / (n - 1)

    total = torch.zeros((), dtype=torch.float64)
    for i in range(C):
        deviation = (covariance(i, i) + 1e-4) ** 0.5
        if deviation < 1:
            total = total + variance_weight * (1 - deviation) / (2 * C)
        for j in range(C):
            if i != j:
                total = total + covariance_weight * covariance(i, j) ** 2 / C
    return total


def _vicreg(z: Tensor, target: Tensor, weights: tuple[float, float, float]) -> Tensor:
    distance = _mean(_distance(z, target))
    return weights[0] * distance + _spread(z, *weights[1:]) + _spread(target, *weights[1:])


@pytest.mark.parametrize("weight", [0, 5e-3, 1.5])
def test_barlow_twins_agrees_with_a_loop(weight: float) -> None:
    inputs = z, target = _leaves(2)
    ours, slow = barlow_twins(z, target, weight), _barlow(z, target, weight)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(_gradients(ours, inputs), _gradients(slow, inputs))


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0, 3, 2), (1, 0, 0), (2, 1, 0)])
def test_vicreg_agrees_with_a_loop(weights: tuple[float, float, float]) -> None:
    inputs = z, target = _leaves(2)
    ours, slow = vicreg(z, target, *weights), _vicreg(z, target, weights)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(_gradients(ours, inputs), _gradients(slow, inputs))


@switches
@partners
def test_mixed_barlow_twins_agrees_with_equation_4(partner: Tensor, switch: bool) -> None:
    inputs = z, target = _leaves(2)
    mixed = _mixed(partner, 0.3)
    ours = lambda_weighted_loss(BarlowTwins(0.1), z, target, mixed, switch=switch)
    slow = 0.3 * _barlow(z, target, 0.1)
    if switch:
        slow = slow + 0.7 * _barlow(z, target[partner], 0.1)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(_gradients(ours, inputs), _gradients(slow, inputs))


@switches
@partners
@pytest.mark.parametrize("per_sample", [True, False])
def test_matched_barlow_twins_agrees_with_a_loop(
    partner: Tensor, switch: bool, per_sample: bool
) -> None:
    z, target, z_mixed = _leaves(3)
    mixed = _mixed(partner, torch.rand(N if per_sample else ()))
    criterion = LambdaWeightedLoss(MatchedBarlowTwins(0.1), switch=switch)
    ours = criterion.mixed_loss(z_mixed, target, mixed, z=z)
    slow = _matched(z_mixed, target, z, mixed, 0.1, switch)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(
        _gradients(ours, (z_mixed, target)), _gradients(slow, (z_mixed, target))
    )
    torch.testing.assert_close(criterion(z, target, z_mixed, mixed), _barlow(z, target, 0.1) + slow)


@switches
@partners
@pytest.mark.parametrize("per_sample", [True, False])
def test_mixed_vicreg_weighs_the_distance_alone(
    partner: Tensor, switch: bool, per_sample: bool
) -> None:
    inputs = z, target = _leaves(2)
    lam = torch.rand(N if per_sample else (), dtype=torch.float64)
    ours = lambda_weighted_loss(VICReg(2, 3, 4), z, target, _mixed(partner, lam), switch=switch)
    own, other = _distance(z, target), _distance(z, target[partner])
    slow = _spread(z, 3, 4)
    for n in range(N):
        share = lam[n] if per_sample else lam
        slow = slow + 2 * share * own[n] / N
        if switch:
            slow = slow + 2 * (1 - share) * other[n] / N
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(_gradients(ours, inputs), _gradients(slow, inputs))


@switches
@partners
def test_gradients_pass_gradcheck(partner: Tensor, switch: bool) -> None:
    z, target, z_mixed = _leaves(3)
    mixed = _mixed(partner, 0.3)
    for criterion in (BarlowTwins(0.1), VICReg()):
        whole = LambdaWeightedLoss(criterion, switch=switch)
        assert torch.autograd.gradcheck(
            lambda z, t, m, whole=whole: whole(z, t, m, mixed), (z, target, z_mixed)
        )
    matched = LambdaWeightedLoss(MatchedBarlowTwins(0.1), switch=switch)
    for lam in (torch.tensor(0.3), torch.rand(N)):
        mixed = _mixed(partner, lam)
        assert torch.autograd.gradcheck(
            lambda t, m, mixed=mixed: matched(z.detach(), t, m, mixed), (target, z_mixed)
        )


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_at_its_limits_barlow_twins_has_one_target(lam: float) -> None:
    z, target = _rows(), _rows()
    left = target if lam == 1 else target[ARBITRARY]
    ours = lambda_weighted_loss(BarlowTwins(), z, target, _mixed(ARBITRARY, lam))
    torch.testing.assert_close(ours, barlow_twins(z, left))


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_at_its_limits_vicreg_lacks_the_spread_of_its_target_alone(lam: float) -> None:
    z, target = _rows(), _rows()
    left = target if lam == 1 else target[ARBITRARY]
    ours = lambda_weighted_loss(VICReg(2, 3, 4), z, target, _mixed(ARBITRARY, lam))
    whole = vicreg(z, left, 2, 3, 4)
    torch.testing.assert_close(whole - ours, _spread(left, 3, 4))
    assert whole - ours > 1


def test_matching_at_its_limits_asks_for_the_clean_correlations() -> None:
    """With λ = 1 the clean view itself is at zero, with λ = 0 its partner is."""
    z, target = _rows(), _rows()
    matched = LambdaWeightedLoss(MatchedBarlowTwins())
    for lam, ideal, wrong in ((1.0, z, z[PERMUTED]), (0.0, z[PERMUTED], z)):
        mixed = _mixed(PERMUTED, lam)
        assert matched.mixed_loss(ideal, target, mixed, z=z) < 1e-24
        assert matched.mixed_loss(wrong, target, mixed, z=z) > 0.1


@partners
@pytest.mark.parametrize("per_sample", [True, False])
def test_an_ideal_mix_brings_matched_barlow_twins_to_zero(
    partner: Tensor, per_sample: bool
) -> None:
    target, z = _leaves(2)
    lam = torch.rand(N if per_sample else (), dtype=torch.float64)
    shares = lam.expand(N)[:, None]
    ideal = (shares * z + (1 - shares) * z[partner]).detach().requires_grad_()
    matched = LambdaWeightedLoss(MatchedBarlowTwins())
    loss = matched.mixed_loss(ideal, target, _mixed(partner, lam), z=z)
    assert loss < 1e-24
    assert all(grad.abs().max() < 1e-10 for grad in _gradients(loss, (ideal, target)))


def test_an_ideal_mix_leaves_weighted_barlow_twins_far_from_zero() -> None:
    """Views without redundancy, which agree: the clean loss is zero, that of their mix is not."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    partner = torch.tensor([3, 2, 1, 0])
    assert barlow_twins(signs, signs) < 1e-8
    ideal = (0.7 * signs + 0.3 * signs[partner]).requires_grad_()
    loss = lambda_weighted_loss(BarlowTwins(), ideal, signs, _mixed(partner, 0.7))
    # Standardised, the mix is the image itself: λ asks for C = I and finds it, 1 - λ finds -I.
    torch.testing.assert_close(loss, torch.tensor(0.3 * 2 * 4.0).double(), rtol=1e-3, atol=0)
    matched = LambdaWeightedLoss(MatchedBarlowTwins())
    assert matched.mixed_loss(ideal, signs, _mixed(partner, 0.7), z=signs) < 1e-24


@partners
@pytest.mark.parametrize("per_sample", [True, False])
def test_an_ideal_mix_is_where_vicregs_distance_is_least(partner: Tensor, per_sample: bool) -> None:
    target = _rows()
    lam = torch.rand(N if per_sample else (), dtype=torch.float64)
    shares = lam.expand(N)
    ideal = shares[:, None] * target + (1 - shares)[:, None] * target[partner]
    ideal.requires_grad_()
    criterion = VICReg(1, 0, 0)
    loss = lambda_weighted_loss(criterion, ideal, target, _mixed(partner, lam))
    apart = (target - target[partner]).square().sum(dim=1)
    torch.testing.assert_close(loss, (shares * (1 - shares) * apart).sum() / (N * C))
    assert torch.autograd.grad(loss, ideal)[0].abs().max() < 1e-12
    nearby = ideal.detach() + 0.1 * _rows()
    assert lambda_weighted_loss(criterion, nearby, target, _mixed(partner, lam)) > loss


def test_matching_sends_no_gradient_to_the_clean_view() -> None:
    z, target, z_mixed = _leaves(3)
    mixed = _mixed(PERMUTED, 0.3)
    matched = LambdaWeightedLoss(MatchedBarlowTwins())
    term = matched.mixed_loss(z_mixed, target, mixed, z=z)
    assert torch.autograd.grad(term, z, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(term, target)[0].abs().max() > 1e-3
    whole = torch.autograd.grad(matched(z, target, z_mixed, mixed), z)[0]
    torch.testing.assert_close(whole, torch.autograd.grad(barlow_twins(z, target), z)[0])


@pytest.mark.parametrize("criterion", [BarlowTwins(), VICReg()], ids=["Barlow Twins", "VICReg"])
def test_gradients_go_to_targets(criterion: Any) -> None:
    z, target = _leaves(2)
    mixed = lambda_weighted_loss(criterion, z, target, _mixed(PERMUTED, 0.3))
    for loss in (criterion(z, target), mixed):
        assert torch.autograd.grad(loss, target)[0].abs().max() > 1e-3


def test_views_change_places() -> None:
    z, target = _rows(), _rows()
    for loss in (barlow_twins, vicreg):
        torch.testing.assert_close(loss(z, target), loss(target, z))


def test_barlow_twins_does_not_mind_scale_and_shift() -> None:
    z, target = _rows(64), _rows(64)
    torch.testing.assert_close(
        barlow_twins(z * 1e3 + 7, target * 1e3), barlow_twins(z, target), rtol=1e-3, atol=1e-3
    )


def test_the_order_of_images_does_not_matter() -> None:
    z, target, order = _rows(), _rows(), torch.randperm(N)
    for loss in (barlow_twins, vicreg):
        torch.testing.assert_close(loss(z[order], target[order]), loss(z, target))
