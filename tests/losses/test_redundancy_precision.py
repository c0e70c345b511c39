"""Barlow Twins and VICReg in low precision, under autocast, on a device, and with bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmask import LambdaWeightedLoss, MixedBatch, lambda_weighted_loss
from mixmask.losses import (
    BarlowTwins,
    MatchedBarlowTwins,
    MatchingCriterion,
    VICReg,
    barlow_twins,
    vicreg,
)

N, C = 7, 5
PERMUTED = torch.tensor([3, 4, 0, 1, 6, 5, 2])
# Of different means and deviations, on either side of VICReg's hinge.
SCALE = torch.tensor([0.2, 0.7, 1.0, 2.0, 5.0], dtype=torch.float64)
SHIFT = torch.tensor([0.0, 3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
low_precision = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)


def _rows(n: int = N) -> Tensor:
    return torch.randn(n, C, dtype=torch.float64) * SCALE + SHIFT


def _mixed(partner: Tensor, lam: Tensor | float) -> MixedBatch:
    shares = torch.as_tensor(lam, dtype=torch.float64)
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), shares, partner)


def _plain_barlow(z: Tensor, target: Tensor) -> Tensor:
    """Algorithm 1 of the paper, in the dtype of its inputs."""
    z, target = (
        (rows - rows.mean(dim=0)) / (rows.var(dim=0, correction=0) + 1e-5).sqrt()
        for rows in (z, target)
    )
    difference = z.T @ target / len(z) - torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.full_like(difference, 5e-3).fill_diagonal_(1)
    return (weight * difference**2).sum()


def _plain_spread(z: Tensor) -> Tensor:
    deviation = (z.var(dim=0) + 1e-4).sqrt()
    centred = z - z.mean(dim=0)
    covariance = centred.T @ centred / (len(z) - 1)
    off_diagonal = covariance[~torch.eye(z.shape[1], dtype=torch.bool)]
    return 25 * (1 - deviation).relu().mean() / 2 + off_diagonal.square().sum() / z.shape[1]


def _plain_vicreg(z: Tensor, target: Tensor) -> Tensor:
    """Algorithm 1 of the paper, in the dtype of its inputs."""
    return 25 * (z - target).square().mean() + _plain_spread(z) + _plain_spread(target)


def _standard(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _spread_alone(z: Tensor, target: Tensor) -> Tensor:
    return vicreg(z, target, 0)


def _plain_spread_alone(z: Tensor, target: Tensor) -> Tensor:
    return _plain_spread(z) + _plain_spread(target)


formulas = pytest.mark.parametrize(
    "ours, plain",
    [
        (barlow_twins, _plain_barlow),
        (vicreg, _plain_vicreg),
        (_spread_alone, _plain_spread_alone),
    ],
    ids=["Barlow Twins", "VICReg", "VICReg's spread"],
)
scales = pytest.mark.parametrize("scale", [0.5, 1.0, 30.0])


@formulas
@scales
@low_precision
def test_low_precision_stays_within_the_error_of_the_plain_formula(
    dtype: torch.dtype, scale: float, ours: Any, plain: Any, within_budget: Callable[..., None]
) -> None:
    if scale == 30 and dtype == torch.float16:
        scale = 10  # Beyond that the plain formula overflows.
    z = scale * _standard(256, 32)
    within_budget(ours, plain, [z.to(dtype), (z + scale * _standard(256, 32)).to(dtype)])


@formulas
@scales
def test_autocast_stays_within_the_error_of_the_plain_formula(
    scale: float, ours: Any, plain: Any, within_budget: Callable[..., None]
) -> None:
    z = scale * _standard(256, 32)
    within_budget(ours, plain, [z, z + scale * _standard(256, 32)], autocast=True)


def test_mixed_terms_under_autocast_are_in_float32() -> None:
    z, target, z_mixed = _standard(3, 64, 32).unbind()
    mixed = MixedBatch(torch.empty(64, 1, 1, 1), torch.tensor(0.3), torch.randperm(64))
    for criterion in (BarlowTwins(), MatchedBarlowTwins(), VICReg()):
        whole = LambdaWeightedLoss(criterion)
        with torch.autocast("cpu", torch.bfloat16):
            loss = whole.mixed_loss(z_mixed, target, mixed, z=z)
        assert loss.dtype == torch.float32
        expected = whole.mixed_loss(z_mixed, target, mixed, z=z)
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


@low_precision
@pytest.mark.parametrize("loss", [barlow_twins, vicreg])
def test_huge_values_do_not_overflow(dtype: torch.dtype, loss: Any) -> None:
    z, target = ((_standard(N, C) * 1e4).to(dtype) for _ in range(2))
    value = loss(z, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(z.double(), target.double()), rtol=1e-4, atol=0)
    z.requires_grad_()
    assert torch.autograd.grad(barlow_twins(z, target), z)[0].isfinite().all()


def test_collapsed_features_have_a_loss_and_a_gradient() -> None:
    z = torch.ones(N, C, requires_grad=True)
    for loss in (barlow_twins, vicreg):
        value = loss(z, torch.ones(N, C))
        assert value > 0.1
        assert torch.autograd.grad(value, z)[0].isfinite().all()
    torch.testing.assert_close(barlow_twins(z, z), torch.tensor(float(C)))


def test_matching_is_told_from_weighing() -> None:
    assert isinstance(MatchedBarlowTwins(), MatchingCriterion)
    assert not isinstance(BarlowTwins(), MatchingCriterion)
    text = "MatchedBarlowTwins compares with the clean embeddings.*use LambdaWeightedLoss"
    with pytest.raises(TypeError, match=text):
        lambda_weighted_loss(MatchedBarlowTwins(), _rows(), _rows(), _mixed(PERMUTED, 0.3))
    whole = LambdaWeightedLoss(MatchedBarlowTwins())
    with pytest.raises(TypeError, match="compares with the clean embeddings; pass them as z="):
        whole.mixed_loss(_rows(), _rows(), _mixed(PERMUTED, 0.3))


def test_weighted_barlow_twins_needs_a_shared_lam() -> None:
    with pytest.raises(ValueError, match=r"needs a criterion that returns \(N,\), got a scalar"):
        lambda_weighted_loss(BarlowTwins(), _rows(), _rows(), _mixed(PERMUTED, torch.rand(N)))


def test_losses_on_a_device(device: torch.device) -> None:
    z, target, z_mixed = _standard(3, N, C).unbind()
    here = MixedBatch(torch.empty(N, 1, 1, 1), torch.tensor(0.3), PERMUTED)
    there = MixedBatch(here.images, here.lam, PERMUTED.to(device))
    for criterion in (BarlowTwins(), MatchedBarlowTwins(), VICReg()):
        whole = LambdaWeightedLoss(criterion)
        ours = whole(z.to(device), target.to(device), z_mixed.to(device), there)
        expected = whole(z, target, z_mixed, here)
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


ROWS = torch.rand(4, 8)
LAM = torch.tensor(0.5)


@pytest.mark.parametrize("loss", [barlow_twins, vicreg])
@pytest.mark.parametrize(
    "z, target, error, text",
    [
        (ROWS, ROWS[:3], ValueError, r"both be \(N, C\), got \(4, 8\) and \(3, 8\); flatten"),
        (ROWS, ROWS[:, :5], ValueError, r"got \(4, 8\) and \(4, 5\); pass both"),
        (ROWS[0], ROWS[0], ValueError, r"got \(8,\) and \(8,\); flatten"),
        (ROWS[:0], ROWS[:0], ValueError, r"z must not be empty, got \(0, 8\)"),
        (ROWS[:1], ROWS[:1], ValueError, "needs at least 2 images, got 1; use drop_last=True"),
        (ROWS.long(), ROWS.long(), TypeError, "z must be floating, got torch.int64"),
        (ROWS, ROWS.to("meta"), ValueError, "target must be on the device of z, cpu, got meta"),
    ],
)
def test_bad_rows_are_refused(
    loss: Any, z: Tensor, target: Tensor, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        loss(z, target)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: BarlowTwins(-1), ValueError, "redundancy_weight must be at least 0 .*got -1"),
        (lambda: BarlowTwins("1"), TypeError, "redundancy_weight must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: VICReg(-1.0), ValueError, "invariance_weight must be at least 0 .*got -1.0"),
        (lambda: VICReg(1, float("inf")), ValueError, "variance_weight must be .*got inf"),
        (lambda: VICReg(1, 1, True), TypeError, "covariance_weight must be a number, got True"),
        (
            lambda: VICReg().weighted(ROWS[:1], ROWS[:1], None, LAM),
            ValueError,
            "needs at least 2 images, got 1",
        ),
        (
            lambda: VICReg().weighted(ROWS, ROWS[:2], None, LAM),
            ValueError,
            r"z and target must both be \(N, C\), got \(4, 8\) and \(2, 8\)",
        ),
        (
            lambda: MatchedBarlowTwins().matched(ROWS, ROWS, ROWS[:, :5], None, LAM),
            ValueError,
            r"z_mixed and z must both be \(N, C\), got \(4, 8\) and \(4, 5\)",
        ),
        (
            lambda: MatchedBarlowTwins().matched(ROWS[:1], ROWS[:1], ROWS[:1], None, LAM),
            ValueError,
            "needs at least 2 images, got 1",
        ),
        (
            lambda: MatchedBarlowTwins().matched(ROWS, ROWS, ROWS.to("meta"), None, LAM),
            ValueError,
            "z must be on the device of z_mixed, cpu, got meta",
        ),
    ],
)
def test_bad_options_are_refused(
    call: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()
