from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import LambdaWeightedLoss, MixedBatch, lambda_weighted_loss
from mixmask.losses import InfoNCE, NTXent, info_nce, nt_xent

N, C = 7, 5
PERMUTED = torch.tensor([3, 4, 0, 1, 6, 5, 2])
ARBITRARY = torch.tensor([2, 0, 1, 6, 3, 4, 4])

directions = pytest.mark.parametrize(
    "one_directional", [False, True], ids=["both directions", "one direction"]
)
low_precision = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)


def _rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _mixed(partner: Tensor, lam: Tensor | float) -> MixedBatch:
    shares = torch.as_tensor(lam, dtype=torch.float64)
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), shares, partner)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()) ** 0.5


def _contrast(row: Tensor, positive: Tensor, others: list[Tensor], tau: float) -> Tensor:
    """-log of the positive's share among it and the others."""
    own = (_cosine(row, positive) / tau).exp()
    total = own
    for other in others:
        total = total + (_cosine(row, other) / tau).exp()
    return -(own / total).log()


def _term(z: Tensor, target: Tensor, tau: float, one_directional: bool) -> list[Tensor]:
    terms = []
    for i in range(len(z)):
        targets = [target[j] for j in range(len(z)) if j != i]
        if one_directional:
            terms.append(_contrast(z[i], target[i], targets, tau))
            continue
        others = targets + [z[j] for j in range(len(z)) if j != i]
        there = _contrast(z[i], target[i], others, tau)
        terms.append((there + _contrast(target[i], z[i], others, tau)) / 2)
    return terms


def _plain(z: Tensor, target: Tensor, tau: float, one_directional: bool) -> Tensor:
    """The formula as everybody writes it, in the dtype of its inputs: (N,)."""
    n = len(z)
    z, target = F.normalize(z, dim=1), F.normalize(target, dim=1)
    if one_directional:
        return F.cross_entropy(z @ target.T / tau, torch.arange(n), reduction="none")
    rows = torch.cat([z, target])
    logits = (rows @ rows.T / tau).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    loss = F.cross_entropy(logits, torch.arange(2 * n).roll(n), reduction="none")
    return loss.view(2, n).mean(dim=0)


@directions
@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0])
def test_it_agrees_with_a_loop(n: int, tau: float, one_directional: bool) -> None:
    inputs = z, target = _rows(n, C).requires_grad_(), _rows(n, C).requires_grad_()
    weights = torch.rand(n, dtype=torch.float64)
    ours = nt_xent(z, target, tau, one_directional=one_directional, reduction="none")
    slow = torch.stack(_term(z, target, tau, one_directional))
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(
        torch.autograd.grad(ours @ weights, inputs), torch.autograd.grad(slow @ weights, inputs)
    )
    mean = nt_xent(z, target, tau, one_directional=one_directional)
    torch.testing.assert_close(mean, slow.mean())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("partner", [PERMUTED, ARBITRARY], ids=["permuted", "arbitrary"])
@directions
def test_mixed_terms_agree_with_equation_4(
    partner: Tensor, per_sample: bool, switch: bool, reduction: str, one_directional: bool
) -> None:
    inputs = z, target = _rows(N, C).requires_grad_(), _rows(N, C).requires_grad_()
    lam = torch.rand(N if per_sample else (), dtype=torch.float64)
    criterion = NTXent(0.3, one_directional=one_directional, reduction=reduction)
    ours = lambda_weighted_loss(criterion, z, target, _mixed(partner, lam), switch=switch)
    own = _term(z, target, 0.3, one_directional)
    other = _term(z, target[partner], 0.3, one_directional)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        share = lam[i] if per_sample else lam
        total = total + share * own[i] / N
        if switch:
            total = total + (1 - share) * other[i] / N
    torch.testing.assert_close(ours, total)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(total, inputs)
    )


@directions
def test_weighted_returns_a_row_an_image(one_directional: bool) -> None:
    z, target, other, lam = _rows(N, C), _rows(N, C), _rows(N, C), torch.rand(N).double()
    criterion = NTXent(0.3, one_directional=one_directional, reduction="none")
    own = torch.stack(_term(z, target, 0.3, one_directional))
    rest = torch.stack(_term(z, other, 0.3, one_directional))
    torch.testing.assert_close(
        criterion.weighted(z, target, other, lam), lam * own + (1 - lam) * rest
    )
    torch.testing.assert_close(criterion.weighted(z, target, None, lam), lam * own)


@directions
@pytest.mark.parametrize("switch", [True, False])
def test_gradients_pass_gradcheck(switch: bool, one_directional: bool) -> None:
    inputs = tuple(_rows(N, C).requires_grad_() for _ in range(3))
    whole = LambdaWeightedLoss(NTXent(0.3, one_directional=one_directional), switch=switch)
    for lam in (torch.rand(()), torch.rand(N)):
        mixed = _mixed(ARBITRARY, lam)
        assert torch.autograd.gradcheck(lambda z, t, m, mixed=mixed: whole(z, t, m, mixed), inputs)


@directions
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_at_its_limits_one_target_is_left(lam: float, one_directional: bool) -> None:
    z, target = _rows(N, C), _rows(N, C)
    criterion = NTXent(one_directional=one_directional)
    expected = criterion(z, target if lam == 1 else target[ARBITRARY])
    ours = lambda_weighted_loss(criterion, z, target, _mixed(ARBITRARY, lam))
    torch.testing.assert_close(ours, expected)


def test_one_direction_is_a_soft_cross_entropy_with_the_shares_as_labels() -> None:
    """i-Mix, eq. 3: the partner is a positive, and no negative of its own term."""
    z, target, lam = _rows(N, C), _rows(N, C), torch.rand(N, dtype=torch.float64)
    labels = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        labels[i, i] += lam[i]
        labels[i, PERMUTED[i]] += 1 - lam[i]
    logits = F.normalize(z, dim=1) @ F.normalize(target, dim=1).T / 0.3
    ours = lambda_weighted_loss(NTXent(0.3, one_directional=True), z, target, _mixed(PERMUTED, lam))
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("lam", [0.6, 0.7, 0.8])
def test_one_direction_is_least_where_its_distribution_is_the_labels(lam: float) -> None:
    """Two orthogonal targets: the difference of a row's cosines is to be τ logit λ."""
    tau, target = 0.4, torch.eye(2, dtype=torch.float64)
    # cos φ - sin φ = √2 cos(φ + π/4), of the angle φ to one's own target.
    angle = math.acos(tau * math.log(lam / (1 - lam)) / 2**0.5) - math.pi / 4
    towards = [math.cos(angle), math.sin(angle)]
    z = torch.tensor([towards, towards[::-1]], dtype=torch.float64, requires_grad=True)
    mixed = _mixed(torch.tensor([1, 0]), lam)
    criterion = NTXent(tau, one_directional=True)
    loss = lambda_weighted_loss(criterion, z, target, mixed)
    entropy = -lam * math.log(lam) - (1 - lam) * math.log(1 - lam)
    assert float(loss.detach()) == pytest.approx(entropy)
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-12
    nearby = z.detach() + 0.1 * _rows(2, 2)
    assert lambda_weighted_loss(criterion, nearby, target, mixed) > loss
    # In both directions the partner is also a negative, and pushes away from there.
    both = lambda_weighted_loss(NTXent(tau), z, target, mixed)
    assert torch.autograd.grad(both, z)[0].abs().max() > 1e-3


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_views_change_places(tau: float) -> None:
    z, target = _rows(N, C), _rows(N, C)
    torch.testing.assert_close(nt_xent(z, target, tau), nt_xent(target, z, tau))
    there = nt_xent(z, target, tau, one_directional=True)
    back = nt_xent(target, z, tau, one_directional=True)
    assert abs(float(there - back)) > 1e-3


@directions
def test_lengths_and_the_order_of_images_do_not_matter(one_directional: bool) -> None:
    z, target, scale = _rows(N, C), _rows(N, C), torch.rand(N, 1, dtype=torch.float64) + 0.1
    expected = nt_xent(z, target, one_directional=one_directional)
    scaled = nt_xent(z * scale, target / scale, one_directional=one_directional)
    torch.testing.assert_close(scaled, expected)
    permuted = nt_xent(z[PERMUTED], target[PERMUTED], one_directional=one_directional)
    torch.testing.assert_close(permuted, expected)


def test_one_direction_is_info_nce_of_unit_rows() -> None:
    z, target = _rows(N, C), _rows(N, C)
    torch.testing.assert_close(
        nt_xent(z, target, 0.2, one_directional=True),
        info_nce(F.normalize(z, dim=1), F.normalize(target, dim=1), temperature=0.2),
    )


@directions
def test_gradients_go_to_targets_unless_they_are_detached(one_directional: bool) -> None:
    z, target = _rows(N, C).requires_grad_(), _rows(N, C).requires_grad_()
    criterion = NTXent(one_directional=one_directional)
    mixed = _mixed(PERMUTED, 0.3)
    for loss in (criterion(z, target), lambda_weighted_loss(criterion, z, target, mixed)):
        assert torch.autograd.grad(loss, target)[0].abs().max() > 1e-3
    constant = lambda_weighted_loss(criterion, z, target.detach(), mixed)
    assert torch.autograd.grad(constant, target, allow_unused=True)[0] is None


@directions
@low_precision
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_low_precision_stays_within_the_error_of_the_plain_formula(
    dtype: torch.dtype, one_directional: bool, tau: float, within_budget: Callable[..., None]
) -> None:
    inputs = [_rows(64, 32).to(dtype), _rows(64, 32).to(dtype)]
    criterion = NTXent(tau, one_directional=one_directional, reduction="none")
    within_budget(criterion, lambda z, t: _plain(z, t, tau, one_directional), inputs)


@directions
def test_autocast_stays_within_the_error_of_the_plain_formula(
    one_directional: bool, within_budget: Callable[..., None]
) -> None:
    inputs = [_rows(64, 32).float(), _rows(64, 32).float()]
    criterion = NTXent(0.1, one_directional=one_directional, reduction="none")
    within_budget(criterion, lambda z, t: _plain(z, t, 0.1, one_directional), inputs, autocast=True)


@directions
@low_precision
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_rows_have_an_angle(
    dtype: torch.dtype, scale: float, one_directional: bool
) -> None:
    z, target = ((_rows(N, 64).clamp(-3, 3) * scale).to(dtype) for _ in range(2))
    z.requires_grad_()
    loss = nt_xent(z, target, 0.1, one_directional=one_directional, reduction="none")
    exact = torch.stack(_term(z.double(), target.double(), 0.1, one_directional))
    step = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), exact, rtol=step, atol=step)


@directions
@low_precision
def test_rows_of_zeros_stay_finite(dtype: torch.dtype, one_directional: bool) -> None:
    z, target = _rows(N, C).to(dtype), _rows(N, C).to(dtype)
    z[0] = 0
    assert nt_xent(z, target, one_directional=one_directional, reduction="none").isfinite().all()


@directions
def test_dtypes_may_differ_between_the_views(one_directional: bool) -> None:
    z, target = _rows(N, C).bfloat16(), _rows(N, C).float()
    for a, b in ((z, target), (target, z)):
        ours = nt_xent(a, b, one_directional=one_directional)
        exact = nt_xent(a.double(), b.double(), one_directional=one_directional)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)


@directions
def test_one_image_has_nothing_to_contrast_with(one_directional: bool) -> None:
    z = _rows(1, C).requires_grad_()
    loss = nt_xent(z, _rows(1, C), one_directional=one_directional)
    # The sum over one row, and that row's own logit, are rounded each by itself.
    assert loss.abs() < 1e-15
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-15


@directions
def test_without_other_processes_gathering_changes_nothing(one_directional: bool) -> None:
    z, target = _rows(N, C), _rows(N, C)
    gathered = nt_xent(z, target, one_directional=one_directional, gather_distributed=True)
    assert torch.equal(gathered, nt_xent(z, target, one_directional=one_directional))
    gathered = info_nce(z, target, gather_distributed=True)
    assert torch.equal(gathered, info_nce(z, target))


@directions
def test_losses_on_a_device(device: torch.device, one_directional: bool) -> None:
    z, target = _rows(N, C).float(), _rows(N, C).float()
    criterion, lam = NTXent(one_directional=one_directional), torch.rand(N)
    here = MixedBatch(torch.empty(N, 1, 1, 1), lam, PERMUTED)
    there = MixedBatch(here.images, lam, PERMUTED.to(device))
    ours = lambda_weighted_loss(criterion, z.to(device), target.to(device), there)
    expected = lambda_weighted_loss(criterion, z, target, here)
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


ROWS = torch.rand(4, 8)
LAM = torch.ones(())


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: nt_xent(ROWS, ROWS[:3]),
            ValueError,
            r"both be \(N, C\), got \(4, 8\) and \(3, 8\); flatten",
        ),
        (lambda: nt_xent(ROWS, ROWS[:, :5]), ValueError, r"got \(4, 8\) and \(4, 5\); pass both"),
        (lambda: nt_xent(ROWS[0], ROWS[0]), ValueError, r"got \(8,\) and \(8,\); flatten"),
        (lambda: nt_xent(ROWS[:0], ROWS[:0]), ValueError, r"z must not be empty, got \(0, 8\)"),
        (lambda: nt_xent(ROWS.long(), ROWS.long()), TypeError, "z must be floating, got torch.int"),
        (
            lambda: nt_xent(ROWS, ROWS.to("meta")),
            ValueError,
            "target must be on the device of z, cpu, got meta; move it",
        ),
        (lambda: NTXent(0.0), ValueError, r"temperature must be positive .* got 0\.0"),
        (lambda: NTXent("1"), TypeError, "temperature must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: NTXent(reduction="sum"), ValueError, "one of 'mean', 'none', got 'sum'"),
        (
            lambda: NTXent().weighted(ROWS, ROWS[:2], None, LAM),
            ValueError,
            r"got \(4, 8\) and \(2, 8\)",
        ),
        (
            lambda: InfoNCE(ROWS, gather_distributed=True),
            ValueError,
            "targets as negatives, which a queue replaces; leave one of them out",
        ),
        (
            lambda: info_nce(ROWS, ROWS, ROWS, gather_distributed=True),
            ValueError,
            "targets as negatives, which a queue replaces",
        ),
        (
            lambda: InfoNCE([[0.0]]),  # type: ignore[arg-type]
            TypeError,
            r"negatives must be a tensor \(K, C\) of normalised rows, got list",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
