"""SwAV's codes: Sinkhorn-Knopp against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixmask.losses import sinkhorn

N, K = 7, 5
PERMUTED = torch.tensor([3, 4, 0, 1, 6, 5, 2])

low_precision = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)


def _rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


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
