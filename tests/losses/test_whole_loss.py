"""`LambdaWeightedLoss`: original and mixed terms, at once and one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weighed import EACH, ROWS, SHARED, Bank, C, Criterion, N, as_record, squares

from mixmask import (
    BlockMaskGenerator,
    LambdaWeightedLoss,
    lambda_weighted_loss,
    mix_batch,
    mixup_batch,
)
from mixmask.losses import (
    DINO,
    BarlowTwins,
    InfoNCE,
    MatchedBarlowTwins,
    MatchingCriterion,
    NegativeCosine,
    NTXent,
    SwAV,
    VICReg,
    sinkhorn,
)


def _swav(z: Tensor, target: Tensor) -> Tensor:
    return SwAV()(z, sinkhorn(target))


# By name, with whether each sample may have a λ of its own.
STATELESS: dict[str, tuple[Criterion, bool]] = {
    "a function": (squares, True),
    "a mean": (F.mse_loss, False),
    "a module": (torch.nn.MSELoss(), False),
    "InfoNCE": (InfoNCE(), True),
    "NTXent": (NTXent(), True),
    "NegativeCosine": (NegativeCosine(reduction="none"), True),
    "BarlowTwins": (BarlowTwins(), False),
    "VICReg": (VICReg(), True),
    "SwAV": (_swav, False),
    "DINO": (DINO(torch.zeros(C)), True),
}


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("criterion, per_sample", STATELESS.values(), ids=STATELESS)
def test_the_whole_loss_is_original_plusas_record(
    criterion: Criterion, per_sample: bool, switch: bool
) -> None:
    z, target, z_mixed = (torch.randn(N, C, requires_grad=True) for _ in range(3))
    lam = torch.rand(N) if per_sample else torch.rand(())
    mixed = as_record(torch.tensor([3, 3, 0, 1, 6, 5, 2]), lam)
    whole = LambdaWeightedLoss(criterion, switch=switch)
    original = criterion(z, target).mean()
    term = lambda_weighted_loss(criterion, z_mixed, target, mixed, switch=switch)
    assert whole(z, target, z_mixed, mixed).shape == ()
    torch.testing.assert_close(whole(z, target, z_mixed, mixed), original + term)
    torch.testing.assert_close(whole.mixed_loss(z_mixed, target, mixed), term)
    torch.testing.assert_close(
        torch.autograd.grad(whole(z, target, z_mixed, mixed), (z, z_mixed)),
        torch.autograd.grad(original + term, (z, z_mixed)),
    )


@pytest.mark.parametrize("container", [list, tuple])
def test_every_mixed_view_has_weight_one(container: Callable[[Any], Any]) -> None:
    z, target, *views = torch.randn(5, N, C)
    records = [as_record(torch.randperm(N), torch.rand(N)) for _ in views]
    whole = LambdaWeightedLoss(squares)
    expected = squares(z, target).mean()
    for view, record in zip(views, records, strict=True):
        expected = expected + lambda_weighted_loss(squares, view, target, record)
    torch.testing.assert_close(whole(z, target, container(views), container(records)), expected)
    mixed_terms = whole.mixed_loss(container(views), target, container(records))
    torch.testing.assert_close(mixed_terms, expected - squares(z, target).mean())


def test_without_a_mixed_view_the_criterion_is_left() -> None:
    z, target = torch.randn(2, N, C)
    assert torch.equal(LambdaWeightedLoss(squares)(z, target), squares(z, target).mean())
    assert torch.equal(LambdaWeightedLoss(F.mse_loss)(z, target), F.mse_loss(z, target))


@pytest.mark.parametrize("switch", [True, False])
def test_criteria_that_match_are_given_the_clean_embeddings(switch: bool) -> None:
    class Matching:
        asked: tuple[Tensor | None, ...] = ()

        def __call__(self, z: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(z, target)

        def matched(
            self, z_mixed: Tensor, target: Tensor, z: Tensor, other: Tensor | None, lam: Tensor
        ) -> Tensor:
            self.asked = (z_mixed, target, z, other, lam)
            return torch.tensor(7.0)

    criterion = Matching()
    assert isinstance(criterion, MatchingCriterion)
    z, target, z_mixed = torch.randn(3, N, C)
    mixed = as_record(torch.tensor([3, 3, 0, 1, 6, 5, 2]), torch.rand(N))
    whole = LambdaWeightedLoss(criterion, switch=switch, ignore=["asked"])
    loss = whole(z, target, z_mixed, mixed)
    torch.testing.assert_close(loss, 7 + F.mse_loss(z, target))
    assert whole.mixed_loss(z_mixed, target, mixed, z=z) == 7
    expected = (z_mixed, target, z, z[mixed.partner] if switch else None, mixed.lam)
    for got, wanted in zip(criterion.asked, expected, strict=True):
        assert got is None if wanted is None else got is not None and torch.equal(got, wanted)
    with pytest.raises(TypeError, match=r"Matching compares .*use LambdaWeightedLoss\(criterion\)"):
        lambda_weighted_loss(criterion, z_mixed, target, mixed)
    with pytest.raises(TypeError, match=r"Matching compares .* pass them as z="):
        whole.mixed_loss(z_mixed, target, mixed)


def test_the_options_of_the_module_show() -> None:
    assert repr(LambdaWeightedLoss(NTXent(0.1), switch=False)).startswith(
        "LambdaWeightedLoss(NTXent(temperature=0.1"
    )
    module = repr(LambdaWeightedLoss(torch.nn.MSELoss(), switch=False))
    assert "switch=False" in module
    assert module.count("MSELoss") == 1


SCALAR = ROWS.sum()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda whole: whole(ROWS[:3], ROWS, ROWS, SHARED),
            ValueError,
            r"^z must hold one row for each of the 4 mixed images, got \(3, 5\)",
        ),
        (
            lambda whole: whole(ROWS, ROWS[:3], ROWS, SHARED),
            ValueError,
            r"^target must hold one row for each of the 4 .* got \(3, 5\)",
        ),
        (
            lambda whole: whole(ROWS, ROWS, ROWS[:3], SHARED),
            ValueError,
            r"^z_mixed must hold one row for each of the 4 .* got \(3, 5\)",
        ),
        (
            lambda whole: whole(ROWS, ROWS[:3]),
            ValueError,
            r"^target must hold one row for each of the 4 .* got \(3, 5\)",
        ),
        (
            lambda whole: whole(ROWS, ROWS, ROWS),
            ValueError,
            "z_mixed and mixed belong together, got only one of them",
        ),
        (
            lambda whole: whole(ROWS, ROWS, mixed=SHARED),
            ValueError,
            "z_mixed and mixed belong together, got only one of them",
        ),
        (
            lambda whole: whole(ROWS, ROWS, [ROWS, ROWS], [SHARED]),
            ValueError,
            "the same length, at least one, got 2 and 1; pass one embedding for each mixed view",
        ),
        (
            lambda whole: whole(ROWS, ROWS, [ROWS, ROWS], SHARED),
            ValueError,
            "the same length, at least one, got 2 and 1; pass one embedding for each mixed view",
        ),
        (
            lambda whole: whole(ROWS, ROWS, [], []),
            ValueError,
            "the same length, at least one, got 0 and 0",
        ),
        (
            lambda whole: whole.mixed_loss([], ROWS, []),
            ValueError,
            "the same length, at least one, got 0 and 0",
        ),
        (
            lambda whole: whole(ROWS, ROWS, ROWS, EACH),
            ValueError,
            r"\(N,\), got a scalar; .*reduction='none'",
        ),
    ],
)
def test_bad_input_to_the_module_is_refused(
    call: Callable[[LambdaWeightedLoss], Any], error: type[Exception], text: str
) -> None:
    for switch in (True, False):
        with pytest.raises(error, match=text):
            call(LambdaWeightedLoss(F.mse_loss, switch=switch))


@pytest.mark.parametrize(
    "criterion, error, text",
    [
        (
            lambda z, t: (z - t) ** 2,
            ValueError,
            r"return \(\) or \(N,\) with N = 4, got \(4, 5\); reduce it over all axes except",
        ),
        (
            lambda z, t: [F.mse_loss(z, t)],
            TypeError,
            r"must return a tensor, \(\) or \(N,\), got list; wrap it",
        ),
        (lambda z, t: float(F.mse_loss(z, t)), TypeError, "must return a tensor.* got float"),
    ],
)
def test_what_a_criterion_returns_is_checked_in_every_term(
    criterion: Any, error: type[Exception], text: str
) -> None:
    whole = LambdaWeightedLoss(criterion)
    for arguments in ((ROWS, ROWS), (ROWS, ROWS, ROWS, SHARED)):
        with pytest.raises(error, match=text):
            whole(*arguments)


def test_bad_options_of_the_module_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be callable as \(z, target\), got Tensor; pass the"):
        LambdaWeightedLoss(SCALAR)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a sequence of names, got 'calls'; use \['calls'\]"):
        LambdaWeightedLoss(F.mse_loss, ignore="calls")


def test_matched_barlow_twins_weighs_samples_and_shares() -> None:
    z, target, z_mixed = torch.randn(3, N, C)
    whole = LambdaWeightedLoss(MatchedBarlowTwins())
    partner = torch.randperm(N)
    shared = whole(z, target, z_mixed, as_record(partner, torch.tensor(0.3)))
    each = whole(z, target, z_mixed, as_record(partner, torch.full((N,), 0.3)))
    torch.testing.assert_close(shared, each)


def test_terms_taken_one_by_one_are_the_whole_loss() -> None:
    encode = nn.Linear(12, 5)
    alive: list[int] = []

    def counting(images: Tensor) -> Tensor:
        alive.append(len(images))
        z: Tensor = encode(images.flatten(1))
        return z

    images, target = torch.rand(4, 3, 2, 2), torch.randn(4, 5)
    mixed = [mix_batch(images, BlockMaskGenerator(2)), mixup_batch(images)]
    whole, parts = (LambdaWeightedLoss(Bank()) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    embedded = [counting(one.images) for one in mixed]
    loss = whole(counting(images), target, embedded, mixed)
    expected = torch.autograd.grad(loss, list(encode.parameters()))

    alive.clear()
    total = 0.0
    for number, term in enumerate(parts.terms(counting, images, target, mixed), start=1):
        assert len(alive) == number  # No view is embedded before its turn.
        term.backward()
        total += float(term.detach())
    assert number == 3
    assert total == pytest.approx(float(loss.detach()), rel=1e-6)
    for parameter, gradient in zip(encode.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert torch.equal(parts.state_dict()["criterion.keys"], whole.state_dict()["criterion.keys"])


def test_terms_that_cannot_be_taken_one_by_one_are_refused_at_once() -> None:
    images, target = torch.rand(4, 3, 2, 2), torch.randn(4, 5)
    mixed = mix_batch(images, BlockMaskGenerator(2))

    def encode(images: Tensor) -> Tensor:
        raise AssertionError(f"{len(images)} images were embedded before the check")

    with pytest.raises(TypeError, match="MatchedBarlowTwins compares mixed with clean"):
        LambdaWeightedLoss(MatchedBarlowTwins()).terms(encode, images, target, mixed)
    with pytest.raises(ValueError, match=r"no gradient where terms .* pass target.detach\(\)"):
        LambdaWeightedLoss(InfoNCE()).terms(encode, images, target.requires_grad_(), mixed)
    with pytest.raises(ValueError, match="images must hold one row for each of the 4"):
        LambdaWeightedLoss(InfoNCE()).terms(encode, images[:3], target.detach(), mixed)
