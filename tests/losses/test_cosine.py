from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import LambdaWeightedLoss, MixedBatch, lambda_weighted_loss
from mixmask.losses import NegativeCosine, negative_cosine

N, C = 7, 5
PERMUTED = torch.tensor([3, 4, 0, 1, 6, 5, 2])
ARBITRARY = torch.tensor([2, 0, 1, 6, 3, 4, 4])


def _rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _mixed(partner: Tensor, lam: Tensor) -> MixedBatch:
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), lam, partner)


def _term(z: Tensor, target: Tensor) -> list[Tensor]:
    """Minus the cosine of the angle between two rows, coordinate by coordinate."""
    terms = []
    for own, towards in zip(z, target.detach(), strict=True):
        dot, of_z, of_target = (torch.zeros((), dtype=z.dtype) for _ in range(3))
        for j in range(len(own)):
            dot = dot + own[j] * towards[j]
            of_z = of_z + own[j] ** 2
            of_target = of_target + towards[j] ** 2
        terms.append(-dot / (of_z * of_target) ** 0.5)
    return terms


def _plain(z: Tensor, target: Tensor) -> Tensor:
    return -(F.normalize(z, dim=1) * F.normalize(target.detach(), dim=1)).sum(dim=1)


def test_it_agrees_with_a_loop() -> None:
    z, target = _rows(N, C).requires_grad_(), _rows(N, C)
    weights = torch.rand(N, dtype=torch.float64)
    ours, slow = negative_cosine(z, target, reduction="none"), torch.stack(_term(z, target))
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(
        torch.autograd.grad(ours @ weights, z), torch.autograd.grad(slow @ weights, z)
    )
    torch.testing.assert_close(negative_cosine(z, target), slow.mean())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("partner", [PERMUTED, ARBITRARY], ids=["permuted", "arbitrary"])
def test_mixed_terms_agree_with_equation_4(
    partner: Tensor, per_sample: bool, switch: bool, reduction: str
) -> None:
    z, target = _rows(N, C).requires_grad_(), _rows(N, C)
    lam = torch.rand(N if per_sample else (), dtype=torch.float64)
    ours = lambda_weighted_loss(
        NegativeCosine(reduction=reduction), z, target, _mixed(partner, lam), switch=switch
    )
    own, other = _term(z, target), _term(z, target[partner])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        share = lam[i] if per_sample else lam
        total = total + share * own[i] / N
        if switch:
            total = total + (1 - share) * other[i] / N
    torch.testing.assert_close(ours, total)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(total, z))


def test_weighted_returns_a_row_an_image() -> None:
    z, target, other, lam = _rows(N, C), _rows(N, C), _rows(N, C), torch.rand(N).double()
    criterion = NegativeCosine(reduction="none")
    own, rest = torch.stack(_term(z, target)), torch.stack(_term(z, other))
    torch.testing.assert_close(
        criterion.weighted(z, target, other, lam), lam * own + (1 - lam) * rest
    )
    torch.testing.assert_close(criterion.weighted(z, target, None, lam), lam * own)


def test_gradients_pass_gradcheck() -> None:
    z, target, z_mixed = _rows(N, C).requires_grad_(), _rows(N, C), _rows(N, C).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: negative_cosine(z, target), (z,))
    whole = LambdaWeightedLoss(NegativeCosine())
    for lam in (torch.rand(()).double(), torch.rand(N).double()):
        mixed = _mixed(ARBITRARY, lam)
        assert torch.autograd.gradcheck(
            lambda z, m, mixed=mixed: whole(z, target, m, mixed), (z, z_mixed)
        )


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_at_its_limits_one_target_is_left(lam: float) -> None:
    z, target = _rows(N, C), _rows(N, C)
    mixed = _mixed(ARBITRARY, torch.tensor(lam, dtype=torch.float64))
    expected = negative_cosine(z, target if lam == 1 else target[ARBITRARY])
    torch.testing.assert_close(lambda_weighted_loss(NegativeCosine(), z, target, mixed), expected)


def test_the_minimum_lies_towards_the_mixture_of_unit_targets() -> None:
    """Its value is minus the length of that mixture, at any length of z."""
    target, lam = _rows(N, C), torch.rand(N, dtype=torch.float64)
    mixed = _mixed(PERMUTED, lam)
    unit = F.normalize(target, dim=1)
    mixture = lam[:, None] * unit + (1 - lam)[:, None] * unit[PERMUTED]
    best = (3 * mixture).requires_grad_()
    loss = lambda_weighted_loss(NegativeCosine(), best, target, mixed)
    torch.testing.assert_close(loss, -mixture.norm(dim=1).mean())
    assert torch.autograd.grad(loss, best)[0].abs().max() < 1e-12
    nearby = mixture + 0.1 * _rows(N, C)
    assert lambda_weighted_loss(NegativeCosine(), nearby, target, mixed) > loss


def test_lengths_do_not_matter() -> None:
    z, target, scale = _rows(N, C), _rows(N, C), torch.rand(N, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(
        negative_cosine(z * scale, target / scale), negative_cosine(z, target)
    )


def test_it_is_half_of_byols_squared_distance_less_one() -> None:
    z, target = _rows(N, C), _rows(N, C)
    squared = (F.normalize(z, dim=1) - F.normalize(target, dim=1)).square().sum(dim=1)
    torch.testing.assert_close(squared, 2 + 2 * negative_cosine(z, target, reduction="none"))


@pytest.mark.parametrize("given", [True, False], ids=["mixed", "clean"])
def test_no_gradient_goes_to_targets(given: bool) -> None:
    z, target = _rows(N, C).requires_grad_(), _rows(N, C).requires_grad_()
    loss = negative_cosine(z, target)
    if given:
        loss = lambda_weighted_loss(NegativeCosine(), z, target, _mixed(PERMUTED, torch.rand(N)))
    assert torch.autograd.grad(loss, (z, target), allow_unused=True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_stays_within_the_error_of_the_plain_formula(
    dtype: torch.dtype, within_budget: Callable[..., None]
) -> None:
    inputs = [_rows(64, 32).to(dtype), _rows(64, 32).to(dtype)]
    within_budget(lambda z, t: negative_cosine(z, t, reduction="none"), _plain, inputs)
    within_budget(negative_cosine, lambda z, t: _plain(z, t).mean(), inputs)


def test_autocast_stays_within_the_error_of_the_plain_formula(
    within_budget: Callable[..., None],
) -> None:
    inputs = [_rows(64, 32).float(), _rows(64, 32).float()]
    within_budget(negative_cosine, lambda z, t: _plain(z, t).mean(), inputs, autocast=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_rows_have_an_angle(dtype: torch.dtype, scale: float) -> None:
    z, target = ((_rows(N, C) * scale).to(dtype) for _ in range(2))
    z.requires_grad_()
    loss = negative_cosine(z, target, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), _plain(z.double(), target.double()), rtol=1e-5, atol=1e-5
    )
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def test_rows_of_zeros_stay_finite() -> None:
    z = torch.zeros(N, C, requires_grad=True)
    loss = negative_cosine(z, torch.ones(N, C), reduction="none")
    assert not loss.any()
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def test_losses_on_a_device(device: torch.device) -> None:
    z, target = _rows(N, C).float(), _rows(N, C).float()
    mixed = _mixed(PERMUTED, torch.rand(N))
    there = MixedBatch(mixed.images, mixed.lam, mixed.partner.to(device))
    ours = lambda_weighted_loss(NegativeCosine(), z.to(device), target.to(device), there)
    torch.testing.assert_close(ours.cpu(), lambda_weighted_loss(NegativeCosine(), z, target, mixed))


ROWS = torch.rand(4, 8)
LAM = torch.ones(())


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: negative_cosine(ROWS, ROWS[:3]),
            ValueError,
            r"both be \(N, C\), got \(4, 8\) and \(3, 8\); flatten",
        ),
        (
            lambda: negative_cosine(ROWS, ROWS[:, :5]),
            ValueError,
            r"got \(4, 8\) and \(4, 5\); pass both",
        ),
        (lambda: negative_cosine(ROWS[0], ROWS[0]), ValueError, r"got \(8,\) and \(8,\); flatten"),
        (
            lambda: negative_cosine(ROWS[:0], ROWS[:0]),
            ValueError,
            r"z must not be empty, got \(0, 8\); skip empty",
        ),
        (
            lambda: negative_cosine(ROWS.long(), ROWS.long()),
            TypeError,
            "z must be floating, got torch.int64; pass embeddings",
        ),
        (
            lambda: negative_cosine(ROWS, ROWS.to("meta")),
            ValueError,
            r"target must be on the device of z, cpu, got meta; move it with \.to\(z\.device\)",
        ),
        (
            lambda: NegativeCosine(reduction="sum"),
            ValueError,
            "reduction must be one of 'mean', 'none', got 'sum'",
        ),
        (
            lambda: NegativeCosine().weighted(ROWS, ROWS[:2], None, LAM),
            ValueError,
            r"got \(4, 8\) and \(2, 8\)",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
