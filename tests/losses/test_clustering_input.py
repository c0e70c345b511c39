"""Bad input to SwAV and DINO, and centers that a function returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmask.losses import DINO, SwAV, dino, sinkhorn, swav, update_center

ROWS = torch.rand(4, 8)
LAM = torch.ones(())


@pytest.mark.parametrize("loss", [swav, dino])
@pytest.mark.parametrize(
    "z, target, error, text",
    [
        (ROWS, ROWS[:3], ValueError, r"both be \(N, C\), got \(4, 8\) and \(3, 8\); flatten"),
        (ROWS, ROWS[:, :5], ValueError, r"got \(4, 8\) and \(4, 5\); pass both"),
        (ROWS[0], ROWS[0], ValueError, r"got \(8,\) and \(8,\); flatten"),
        (ROWS[:0], ROWS[:0], ValueError, r"z must not be empty, got \(0, 8\)"),
        (ROWS.long(), ROWS, TypeError, "z must be floating, got torch.int64"),
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
            r"center must be on the device of target, cpu, got meta; move it",
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
            "center must be on the device of target, cpu, got meta",
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
