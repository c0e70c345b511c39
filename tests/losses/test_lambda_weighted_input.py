"""Bad input to the λ-weighted loss is refused before any state moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weighed import EACH, ROWS, SHARED, Bank, squares

from mixmask import (
    LambdaWeightedLoss,
    MixedBatch,
    lambda_weighted_loss,
)
from mixmask.losses import (
    InfoNCE,
)


@pytest.mark.parametrize(
    "criterion, z, target, mixed, error, text",
    [
        (
            F.mse_loss,
            ROWS[:3],
            ROWS,
            SHARED,
            ValueError,
            r"z_mixed must hold .* 4 .* \(3, 5\); pass",
        ),
        (
            F.mse_loss,
            ROWS,
            ROWS[:2],
            SHARED,
            ValueError,
            r"target must hold .* 4 .* \(2, 5\); pass",
        ),
        (F.mse_loss, ROWS.sum(), ROWS, SHARED, ValueError, r"z_mixed must hold .* got \(\); pass"),
        (InfoNCE(), ROWS, ROWS[:2], SHARED, ValueError, r"target must hold .* got \(2, 5\); pass"),
        (F.mse_loss, ROWS, ROWS, EACH, ValueError, r"\(N,\), got a scalar; .*reduction='none'"),
        (
            lambda z, t: (z - t) ** 2,
            ROWS,
            ROWS,
            SHARED,
            ValueError,
            r"return \(\) or \(N,\) with N = 4, got \(4, 5\); reduce it over all axes except",
        ),
        (
            lambda z, t: squares(z, t)[:2],
            ROWS,
            ROWS,
            EACH,
            ValueError,
            r"return \(\) or \(N,\) with N = 4, got \(2,\); reduce it",
        ),
        (
            lambda z, t: (squares(z, t), {}),
            ROWS,
            ROWS,
            EACH,
            TypeError,
            r"must return a tensor, \(\) or \(N,\), got tuple; wrap it so that it returns the",
        ),
        (
            lambda z, t: float(F.mse_loss(z, t)),
            ROWS,
            ROWS,
            SHARED,
            TypeError,
            r"must return a tensor, \(\) or \(N,\), got float; wrap it",
        ),
    ],
)
def test_bad_input_is_refused(
    criterion: Any,
    z: Tensor,
    target: Tensor,
    mixed: MixedBatch,
    error: type[Exception],
    text: str,
) -> None:
    for switch in (True, False):
        with pytest.raises(error, match=text):
            lambda_weighted_loss(criterion, z, target, mixed, switch=switch)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (((ROWS, ROWS), ROWS), TypeError, r"both be tensors, .* per direction, got tuple of 2 and"),
        ((ROWS, [ROWS]), TypeError, r"got Tensor of 4 and list of 1; .* as in z\[0\]"),
        (((ROWS,) * 8, (ROWS,) * 2), ValueError, r"one entry per direction, got 8 and 2; pair"),
        (((), ()), ValueError, "one entry per direction, got 0 and 0"),
        (({"z": ROWS}, ROWS), TypeError, r"^z must be .* got dict; pass .* out of 'z'"),
        ((ROWS, ROWS, (ROWS, ROWS), SHARED), ValueError, r"got 2 and 1; .* as in z_mixed\[0\]"),
        ((ROWS, ROWS, {"z": ROWS}, SHARED), TypeError, r"^z_mixed must be .* got dict"),
        (((ROWS, ROWS[:3]), (ROWS, ROWS)), ValueError, r"^z must hold .* got \(3, 5\)"),
        (
            ((ROWS, ROWS), (ROWS, ROWS), [ROWS] * 3, [SHARED] * 3),
            ValueError,
            "one mixed view, or one per direction, got 3 for 2 directions",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_before_the_state_moves(
    arguments: Any, error: type[Exception], text: str
) -> None:
    whole = LambdaWeightedLoss(Bank())
    before = whole.state_dict()["criterion.keys"].clone()
    with pytest.raises(error, match=text):
        whole(*arguments)
    assert torch.equal(whole.state_dict()["criterion.keys"], before)


@pytest.mark.parametrize("lend", [True, False])
@pytest.mark.parametrize(
    "criterion",
    [
        lambda z, target: squares(z.detach(), target),
        lambda _, target: (target**2).mean(),
        lambda z, target: squares(z.detach(), target).mean(),
    ],
)
def test_a_term_that_trains_nothing_is_refused(criterion: Any, lend: bool) -> None:
    z = ROWS.clone().requires_grad_()
    whole = LambdaWeightedLoss(criterion)

    def term(z: Tensor) -> Tensor:
        if lend:
            return whole.mixed_loss(z, ROWS, SHARED)
        return lambda_weighted_loss(criterion, z, ROWS, SHARED)

    with pytest.raises(ValueError, match=r"mixed term has no gradient, though .* pass a function"):
        term(z)
    with torch.no_grad():
        assert term(z).isfinite()
    assert term(ROWS).isfinite()  # Nothing here asks for a gradient.


def test_rows_of_different_layers_are_told_from_unflattened_ones() -> None:
    for z, fix in ((ROWS[:, :3], "from the same layer"), (ROWS[..., None], "one row per image")):
        with pytest.raises(ValueError, match=fix):
            InfoNCE()(z, ROWS)
