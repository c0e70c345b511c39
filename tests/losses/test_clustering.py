from __future__ import annotations

import math
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


def _slow_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Algorithm of SwAV's appendix in Python numbers; columns and rows in turn."""
    n, k = scores.shape
    codes = [[math.exp(float(scores[i, j]) / epsilon) for j in range(k)] for i in range(n)]
    for _ in range(iterations):
        for j in range(k):
            used = sum(codes[i][j] for i in range(n))
            for i in range(n):
                codes[i][j] /= used * k
        for i in range(n):
            given = sum(codes[i])
            for j in range(k):
                codes[i][j] /= given * n
    return torch.tensor(codes, dtype=torch.float64) * n


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("n, k", [(N, K), (K, N), (1, K), (N, 1)])
def test_codes_agree_with_a_loop(n: int, k: int, epsilon: float, iterations: int) -> None:
    scores = _rows(n, k)
    codes = sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(codes, _slow_sinkhorn(scores, epsilon, iterations))


def test_codes_sum_to_one_and_use_all_prototypes_equally() -> None:
    codes = sinkhorn(_rows(63, K), epsilon=1.0, iterations=50)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(63, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((K,), 63 / K, dtype=torch.float64))


def test_codes_do_not_mind_shifts() -> None:
    """Of all scores at any time, of a prototype's or an image's once they have converged."""
    scores = _rows(N, K)
    torch.testing.assert_close(sinkhorn(scores + 100), sinkhorn(scores))
    torch.testing.assert_close(sinkhorn(scores + _rows(K)), sinkhorn(scores))
    moved = sinkhorn(scores + _rows(N, 1), 1.0, 100)
    torch.testing.assert_close(moved, sinkhorn(scores, 1.0, 100))


def test_codes_of_permuted_images_are_permuted_codes() -> None:
    scores = _rows(N, K)
    torch.testing.assert_close(sinkhorn(scores[PERMUTED]), sinkhorn(scores)[PERMUTED])


def test_codes_carry_no_gradient_and_leave_scores_alone() -> None:
    scores = _rows(N, K).requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad
    assert torch.equal(scores, before)


@low_precision
def test_codes_are_at_least_float32(dtype: torch.dtype) -> None:
    scores = _rows(N, K).to(dtype)
    codes = sinkhorn(scores, 0.5)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(
        codes.double(), _slow_sinkhorn(scores.double(), 0.5, 3), rtol=1e-5, atol=1e-6
    )


@low_precision
@pytest.mark.parametrize("scale", [10, 1e3, 1e4])
def test_codes_of_scores_far_apart_are_codes(dtype: torch.dtype, scale: float) -> None:
    """Prototypes that are not normalised: whole rows lie far below the largest score."""
    scores = (_rows(N, K) * scale).to(dtype)
    codes = sinkhorn(scores)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(N))
    exact = sinkhorn(scores.double())
    torch.testing.assert_close(codes.double(), exact, rtol=1e-3, atol=1e-2)


def test_autocast_leaves_codes_alone() -> None:
    scores = _rows(N, K).float()
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores)
    torch.testing.assert_close(codes, sinkhorn(scores))


def test_a_queue_makes_codes_of_more_scores() -> None:
    scores, queue = _rows(N, K), _rows(40, K)
    codes = sinkhorn(torch.cat([scores, queue]))[:N]
    torch.testing.assert_close(codes, _slow_sinkhorn(torch.cat([scores, queue]), 0.05, 3)[:N])
    assert not torch.allclose(codes, sinkhorn(scores), atol=1e-2)


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


ROWS = torch.rand(4, 8)
LAM = torch.ones(())


@pytest.mark.parametrize("loss", [swav, dino])
@pytest.mark.parametrize(
    "z, target, error, text",
    [
        (ROWS, ROWS[:3], ValueError, r"both be \(N, C\), got \(4, 8\) and \(3, 8\); flatten"),
        (ROWS, ROWS[:, :5], ValueError, r"got \(4, 8\) and \(4, 5\); flatten"),
        (ROWS[0], ROWS[0], ValueError, r"got \(8,\) and \(8,\); flatten"),
        (ROWS[:0], ROWS[:0], ValueError, r"z must not be empty, got \(0, 8\)"),
        (ROWS.long(), ROWS, TypeError, "z must be floating, got torch.int64"),
        (ROWS, ROWS.to("meta"), ValueError, "target must lie where z does, on cpu, got meta"),
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
        (lambda: SwAV(0.0), ValueError, r"^temperature must be positive .* got 0\.0"),
        (lambda: SwAV("1"), TypeError, "temperature must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: SwAV(reduction="sum"), ValueError, "one of 'mean', 'none', got 'sum'"),
        (lambda: DINO(None, -1), ValueError, "^temperature must be positive .* got -1"),
        (lambda: DINO(None, 1, 0), ValueError, "target_temperature must be positive .* got 0"),
        (lambda: DINO(reduction="sum"), ValueError, "one of 'mean', 'none', got 'sum'"),
        (
            lambda: dino(ROWS, ROWS, torch.zeros(5)),
            ValueError,
            r"center must be \(8,\), got \(5,\); start with torch\.zeros",
        ),
        (
            lambda: dino(ROWS, ROWS, torch.zeros(4, 8)),
            ValueError,
            r"center must be \(8,\), got \(4, 8\); start with torch\.zeros",
        ),
        (
            lambda: dino(ROWS, ROWS, torch.zeros(8, device="meta")),
            ValueError,
            r"center must lie where target does, on cpu, got meta; move it",
        ),
        (
            lambda: DINO([0.0] * 8),  # type: ignore[arg-type]
            TypeError,
            r"center must be a tensor \(K,\), got list",
        ),
        (
            lambda: SwAV().weighted(ROWS, ROWS[:2], None, LAM),
            ValueError,
            r"got \(4, 8\) and \(2, 8\)",
        ),
        (
            lambda: DINO().weighted(ROWS, ROWS[:2], None, LAM),
            ValueError,
            r"got \(4, 8\) and \(2, 8\)",
        ),
        (lambda: sinkhorn(ROWS[0]), ValueError, r"scores must be \(N, K\), got \(8,\)"),
        (lambda: sinkhorn(ROWS[:0]), ValueError, r"scores must not be empty, got \(0, 8\)"),
        (lambda: sinkhorn(ROWS.long()), TypeError, "scores must be floating, got torch.int64"),
        (lambda: sinkhorn(ROWS, 0), ValueError, "epsilon must be positive and finite, got 0"),
        (lambda: sinkhorn(ROWS, iterations=0), ValueError, "iterations must be .* got 0"),
        (
            lambda: update_center(torch.zeros(5), ROWS),
            ValueError,
            r"center must be \(8,\), got \(5,\); start with torch\.zeros",
        ),
        (
            lambda: update_center(torch.zeros(8), ROWS[0]),
            ValueError,
            r"target must be \(N, K\), got \(8,\)",
        ),
        (
            lambda: update_center(torch.zeros(8), ROWS.long()),
            TypeError,
            "target must be floating, got torch.int64",
        ),
        (
            lambda: update_center(torch.zeros(8, device="meta"), ROWS),
            ValueError,
            "center must lie where target does, on cpu, got meta",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_function_is_asked_for_the_center_at_every_call() -> None:
    """`update_center` returns a new tensor, which a criterion built before does not know."""
    center = torch.zeros(8)

    def read() -> Tensor:
        return center

    criterion, stale = DINO(read), DINO(center)
    lam = torch.tensor(0.3)
    for _ in range(3):
        z, target, other = torch.randn(3, 6, 8)
        fresh = DINO(center)
        assert torch.equal(criterion(z, target), fresh(z, target))
        assert torch.equal(dino(z, target, read), fresh(z, target))
        ours = criterion.weighted(z, target, other, lam)
        assert torch.equal(ours, fresh.weighted(z, target, other, lam))
        center = update_center(center, target + 1)
    assert not torch.equal(criterion(z, target), stale(z, target))


@pytest.mark.parametrize(
    "center, error, text",
    [
        (None, TypeError, r"center must be a tensor \(K,\), got NoneType; .* a function"),
        (torch.zeros(5), ValueError, r"center must be \(8,\), got \(5,\)"),
    ],
)
def test_what_the_function_returns_is_checked_at_the_call(
    center: Any, error: type[Exception], text: str
) -> None:
    criterion = DINO(lambda: center)
    with pytest.raises(error, match=text):
        criterion(ROWS, ROWS)
    with pytest.raises(error, match=text):
        criterion.weighted(ROWS, ROWS, ROWS, torch.tensor(0.5))
