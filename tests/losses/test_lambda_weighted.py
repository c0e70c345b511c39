from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask import (
    BlockMaskGenerator,
    LambdaWeightedLoss,
    MixedBatch,
    erase_batch,
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
    SharingCriterion,
    SwAV,
    VICReg,
    info_nce,
    sinkhorn,
)

Golden = Callable[[str], dict[str, Tensor]]
Criterion = Callable[[Tensor, Tensor], Tensor]

N, C = 7, 5


def _squares(z: Tensor, target: Tensor) -> Tensor:
    return ((z - target) ** 2).flatten(1).sum(dim=1)


def _mixed(partner: Tensor, lam: Tensor) -> MixedBatch:
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), lam, partner)


def _golden_criterion(numbers: dict[str, Tensor], *, sharing: bool) -> Criterion:
    negatives, tau = numbers["queue"].T, float(numbers["temperature"])
    if sharing:
        return InfoNCE(negatives, tau)
    return lambda z, target: info_nce(z, target, negatives, tau)


@pytest.mark.parametrize("sharing", [True, False])
def test_mixmask_matches_the_published_code(golden: Golden, sharing: bool) -> None:
    numbers = golden("moco_mixmask")
    criterion = _golden_criterion(numbers, sharing=sharing)
    mixed = mix_batch(numbers["x_q"], numbers["cell_mask"].bool())
    k = numbers["k"]
    original = criterion(numbers["q"], k).double()
    loss = lambda_weighted_loss(criterion, numbers["q_mixed"], k, mixed).double()
    own = lambda_weighted_loss(criterion, numbers["q_mixed"], k, mixed, switch=False).double()
    lam = float(numbers["lam"])
    for ours, theirs in (
        (original, numbers["loss_original"]),
        (own, lam * numbers["loss_mixed"]),
        (loss - own, (1 - lam) * numbers["loss_mixed_flip"]),
        (original + loss, numbers["loss_total"]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharing", [True, False])
def test_both_mixtures_match_the_published_code(golden: Golden, sharing: bool) -> None:
    """Their last term is of queries un-permuted by argsort(p): our targets permuted by p."""
    numbers = golden("moco_both")
    criterion = _golden_criterion(numbers, sharing=sharing)
    q, k, p = numbers["q"], numbers["k"], numbers["permutation"]
    q_unmix, q_mask = numbers["q_unmix"], numbers["q_mask"]
    reverse = torch.arange(len(q) - 1, -1, -1)
    terms = torch.stack(
        [
            criterion(q, k),
            criterion(q_unmix, k),
            criterion(q_unmix, k[reverse]),
            criterion(q_mask, k),
            criterion(q_mask, k[p]),
        ]
    ).double()
    torch.testing.assert_close(terms, numbers["losses"], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        criterion(q_mask[p.argsort()], k), criterion(q_mask, k[p]), rtol=0, atol=1e-6
    )
    # The other way round is another number: the direction is what is tested here.
    assert abs(float(criterion(q_mask, k[p.argsort()])) - float(numbers["losses"][4])) > 0.01

    unmix = _mixed(reverse, numbers["lam_unmix"].float())
    mask = mix_batch(numbers["x_q"], numbers["mask"].bool(), partner=p)
    total = (
        criterion(q, k)
        + lambda_weighted_loss(criterion, q_unmix, k, unmix)
        + lambda_weighted_loss(criterion, q_mask, k, mask)
    )
    torch.testing.assert_close(total.double(), numbers["loss_total"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(N,), (N, C), (N, 2, 3)])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("switch", [True, False])
def test_any_criterion_is_weighed_as_in_equation_4(
    shape: tuple[int, ...], per_sample: bool, switch: bool
) -> None:
    z, target = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    partner = torch.tensor([3, 3, 0, 1, 6, 5, 2])
    lam = torch.rand(N) if per_sample else torch.rand(())

    def squares(z: Tensor, target: Tensor) -> Tensor:
        return _squares(z.reshape(N, -1), target.reshape(N, -1))

    ours = lambda_weighted_loss(squares, z, target, _mixed(partner, lam), switch=switch)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        share = lam[i] if per_sample else lam
        total = total + share * ((z[i] - target[i]) ** 2).sum() / N
        if switch:
            total = total + (1 - share) * ((z[i] - target[partner[i]]) ** 2).sum() / N
    torch.testing.assert_close(ours, total)
    for mine, slow in zip(
        torch.autograd.grad(ours, (z, target)), torch.autograd.grad(total, (z, target)), strict=True
    ):
        torch.testing.assert_close(mine, slow)


def test_a_shared_lam_serves_criteria_that_return_a_scalar() -> None:
    z, target, mixed = torch.rand(N, C), torch.rand(N, C), _mixed(torch.randperm(N), torch.rand(()))
    ours = lambda_weighted_loss(F.mse_loss, z, target, mixed)
    rows = lambda_weighted_loss(lambda z, t: _squares(z, t) / C, z, target, mixed)
    torch.testing.assert_close(ours, rows)
    assert lambda_weighted_loss(_squares, z, target, mixed).shape == ()


@pytest.mark.parametrize("switch", [True, False])
def test_without_the_switch_the_partner_is_not_looked_at(switch: bool) -> None:
    calls = []

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        calls.append(target)
        return _squares(z, target)

    z, target, partner = torch.rand(N, C), torch.rand(N, C), torch.randperm(N)
    lambda_weighted_loss(criterion, z, target, _mixed(partner, torch.rand(N)), switch=switch)
    assert len(calls) == 1 + switch
    assert torch.equal(calls[-1], target[partner] if switch else target)


def test_criteria_that_share_are_asked_once() -> None:
    class Sharing:
        asked: tuple[Tensor | None, ...] = ()

        def __call__(self, z: Tensor, target: Tensor) -> Tensor:
            raise AssertionError(z, target)

        def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
            self.asked = (z, target, other, lam)
            return torch.arange(float(N))

    criterion = Sharing()
    assert isinstance(criterion, SharingCriterion)
    z, target, mixed = torch.rand(N, C), torch.rand(N, C), _mixed(torch.randperm(N), torch.rand(N))
    assert lambda_weighted_loss(criterion, z, target, mixed) == (N - 1) / 2
    expected = (z, target, target[mixed.partner], mixed.lam)
    for got, wanted in zip(criterion.asked, expected, strict=True):
        assert got is not None
        assert torch.equal(got, wanted)
    lambda_weighted_loss(criterion, z, target, mixed, switch=False)
    assert criterion.asked[2] is None


class _Scaled(InfoNCE):
    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        return 0.5 * super().__call__(z, target)


class _Renamed(InfoNCE):
    """Nothing of its own."""


class _ScaledModule(nn.Module):
    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return _squares(z, target)

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        raise AssertionError(z, target, other, lam)


class _OwnForward(_ScaledModule):
    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(z, target)


class _Proxy:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = 0.5 * self.inner(z, target)
        return loss


class _Unrelated(nn.Module):
    """A method of that name with a meaning of its own, and one with another number of inputs."""

    def weighted(self, z: Tensor, target: Tensor, w: Any = None, eps: float = 1e-3) -> Tensor:
        raise AssertionError(z, target, w, eps)

    def matched(self, z: Tensor) -> Tensor:
        raise AssertionError(z)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return _squares(z, target)


@pytest.mark.parametrize(
    "criterion",
    [
        _Scaled(reduction="none"),
        _OwnForward(),
        _Proxy(InfoNCE(reduction="none")),
        _Proxy(MatchedBarlowTwins()),
        _Unrelated(),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_the_call_of_a_subclass_or_a_proxy_is_what_counts(criterion: Any) -> None:
    z, target = F.normalize(torch.randn(2, N, C), dim=2)
    partner, lam = torch.randperm(N), torch.tensor(0.3)
    expected = lam * criterion(z, target) + (1 - lam) * criterion(z, target[partner])
    mixed = _mixed(partner, lam)
    torch.testing.assert_close(
        lambda_weighted_loss(criterion, z, target, mixed), expected.mean(), rtol=1e-5, atol=1e-6
    )
    whole = LambdaWeightedLoss(criterion)
    torch.testing.assert_close(
        whole.mixed_loss(z, target, mixed), expected.mean(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "criterion, message",
    [
        (InfoNCE, r"must be an instance, got the class InfoNCE; pass InfoNCE\(\.\.\.\)"),
        (nn.MSELoss, r"must be an instance, got the class MSELoss; pass MSELoss\(\.\.\.\)"),
        (torch.ones(()), "got Tensor; pass the criterion itself, not the loss that it returned"),
        (0.5, r"must be callable as \(z, target\), got float; pass for instance losses.InfoNCE"),
    ],
)
def test_what_is_no_criterion_is_named(criterion: Any, message: str) -> None:
    z, mixed = torch.rand(N, C), _mixed(torch.randperm(N), torch.tensor(0.5))
    with pytest.raises(TypeError, match=message):
        lambda_weighted_loss(criterion, z, z, mixed)
    with pytest.raises(TypeError, match=message):
        LambdaWeightedLoss(criterion)


@pytest.mark.parametrize("kind", ["images", "tuple", "list"])
def test_what_was_mixed_is_passed_as_a_whole(kind: str) -> None:
    images = torch.rand(N, 3, 8, 8)
    mixed: Any = {
        "images": images,
        "tuple": (images, torch.tensor(0.5)),
        "list": [_mixed(torch.randperm(N), torch.tensor(0.5)), images],
    }[kind]
    z = torch.rand(N, C)
    whole, message = (
        LambdaWeightedLoss(_squares),
        "mixed must be a MixedBatch, got .*not its images",
    )
    z_mixed = [z] * len(mixed) if kind != "images" else z
    with pytest.raises(TypeError, match=message):
        lambda_weighted_loss(_squares, z, z, mixed)
    with pytest.raises(TypeError, match=message):
        whole(z, z, z_mixed, mixed)
    with pytest.raises(TypeError, match=message):
        next(whole.terms(lambda x: x.flatten(1), images, z, mixed))


def test_a_subclass_may_inherit_both_or_replace_the_shared_terms_alone() -> None:
    class Counting(_Renamed):
        # As the protocol asks; `partner` is an offer.
        def weighted(  # type: ignore[override]
            self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor
        ) -> Tensor:
            calls.append(lam)
            return super().weighted(z, target, other, lam)

    calls: list[Tensor] = []
    z, target = F.normalize(torch.randn(2, N, C), dim=2)
    mixed = _mixed(torch.randperm(N), torch.rand(N))
    # A scalar per sample's λ: only the shared terms can give it.
    for criterion in (InfoNCE(), _Renamed(), Counting()):
        loss = lambda_weighted_loss(criterion, z, target, mixed)
        # Without the partners it sums in another order.
        torch.testing.assert_close(loss, lambda_weighted_loss(InfoNCE(), z, target, mixed))
    assert len(calls) == 1


def test_erased_images_ask_for_themselves() -> None:
    mixed = erase_batch(torch.rand(N, 3, 8, 8), BlockMaskGenerator(4, (0.1, 0.9))(N))
    z, target = torch.rand(N, C), torch.rand(N, C)
    torch.testing.assert_close(
        lambda_weighted_loss(_squares, z, target, mixed), _squares(z, target).mean()
    )


def test_inputs_are_not_changed() -> None:
    z, target = torch.rand(N, C), torch.rand(N, C)
    mixed = _mixed(torch.randperm(N), torch.rand(N))
    negatives = torch.rand(300, C)
    tensors = (z, target, mixed.lam, mixed.partner, negatives)
    before = [tensor.clone() for tensor in tensors]
    lambda_weighted_loss(InfoNCE(negatives), z, target, mixed)
    lambda_weighted_loss(_squares, z, target, mixed)
    assert all(map(torch.equal, tensors, before))


ROWS = torch.rand(4, C)
SHARED = _mixed(torch.arange(3, -1, -1), torch.tensor(0.5))
EACH = _mixed(torch.arange(3, -1, -1), torch.full((4,), 0.5))


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
            r"return \(\) or \(N,\) with N = 4, got \(4, 5\); reduce it over all axes but",
        ),
        (
            lambda z, t: _squares(z, t)[:2],
            ROWS,
            ROWS,
            EACH,
            ValueError,
            r"return \(\) or \(N,\) with N = 4, got \(2,\); reduce it",
        ),
        (
            lambda z, t: (_squares(z, t), {}),
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


@pytest.mark.parametrize("queue", [True, False])
def test_mixing_and_loss_compile_in_one_graph(queue: bool) -> None:
    negatives = F.normalize(torch.randn(509, 16), dim=1) if queue else None
    criterion = InfoNCE(negatives)
    weight = torch.randn(3 * 16 * 16, 16) / 28
    masks = BlockMaskGenerator(4)(6)

    def step(images: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        mixed = mix_batch(images, masks)
        z = F.normalize(mixed.images.flatten(1) @ weight, dim=1)
        return lambda_weighted_loss(criterion, z, target, mixed)

    images = torch.rand(6, 3, 16, 16)
    target = F.normalize(torch.randn(6, 16), dim=1)
    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        loss = run(images, target, leaf)
        torch.autograd.backward(loss)
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def _swav(z: Tensor, target: Tensor) -> Tensor:
    return SwAV()(z, sinkhorn(target))


# By name, with whether each sample may have a λ of its own.
STATELESS: dict[str, tuple[Criterion, bool]] = {
    "a function": (_squares, True),
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
def test_the_whole_loss_is_original_plus_mixed(
    criterion: Criterion, per_sample: bool, switch: bool
) -> None:
    z, target, z_mixed = (torch.randn(N, C, requires_grad=True) for _ in range(3))
    lam = torch.rand(N) if per_sample else torch.rand(())
    mixed = _mixed(torch.tensor([3, 3, 0, 1, 6, 5, 2]), lam)
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
    records = [_mixed(torch.randperm(N), torch.rand(N)) for _ in views]
    whole = LambdaWeightedLoss(_squares)
    expected = _squares(z, target).mean()
    for view, record in zip(views, records, strict=True):
        expected = expected + lambda_weighted_loss(_squares, view, target, record)
    torch.testing.assert_close(whole(z, target, container(views), container(records)), expected)
    mixed_terms = whole.mixed_loss(container(views), target, container(records))
    torch.testing.assert_close(mixed_terms, expected - _squares(z, target).mean())


def test_without_a_mixed_view_the_criterion_is_left() -> None:
    z, target = torch.randn(2, N, C)
    assert torch.equal(LambdaWeightedLoss(_squares)(z, target), _squares(z, target).mean())
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
    mixed = _mixed(torch.tensor([3, 3, 0, 1, 6, 5, 2]), torch.rand(N))
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
            "as many, at least one, got 2 and 1; pass one embedding for each mixed view",
        ),
        (
            lambda whole: whole(ROWS, ROWS, [ROWS, ROWS], SHARED),
            ValueError,
            "as many, at least one, got 2 and 1; pass one embedding for each mixed view",
        ),
        (
            lambda whole: whole(ROWS, ROWS, [], []),
            ValueError,
            "as many, at least one, got 0 and 0",
        ),
        (
            lambda whole: whole.mixed_loss([], ROWS, []),
            ValueError,
            "as many, at least one, got 0 and 0",
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
            r"return \(\) or \(N,\) with N = 4, got \(4, 5\); reduce it over all axes but",
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
    shared = whole(z, target, z_mixed, _mixed(partner, torch.tensor(0.3)))
    each = whole(z, target, z_mixed, _mixed(partner, torch.full((N,), 0.3)))
    torch.testing.assert_close(shared, each)


class Bank(nn.Module):
    """A criterion whose buffer moves at every call."""

    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(6, 5))

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        loss = InfoNCE(self.keys.clone(), 0.5)(z, target)
        self.keys.copy_(torch.cat([target, self.keys])[:6].detach())
        return loss


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


# What is passed as criterion, and what to it.


class Model(nn.Module):
    """A whole model, which takes views and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3 * 8 * 8, C)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return _squares(self.encoder(x1.flatten(1)), self.encoder(x2.flatten(1)))


class Projecting(nn.Module):
    """A criterion with a layer of its own, over dense embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(C, C)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return _squares(self.layer(z.movedim(1, -1)), target.movedim(1, -1))


class Distance(nn.CosineSimilarity):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return 1 - super().forward(x1, x2)


PROBABILITIES = torch.rand(4, C).softmax(dim=1)
LOGITS = torch.randn(4, 9)
IMAGES = torch.rand(4, 3, 8, 8)
NEITHER = torch.randn(4, C)
WRONG: dict[str, tuple[Any, Tensor, Tensor, type[Exception], str]] = {
    "similarity": (nn.CosineSimilarity(), ROWS, ROWS, TypeError, r"use losses\.NegativeCosine"),
    "similarity's function": (F.cosine_similarity, ROWS, ROWS, TypeError, "must be a loss, got a"),
    "similarity's partial": (
        functools.partial(F.cosine_similarity, dim=1),
        ROWS,
        ROWS,
        TypeError,
        "must be a loss, got a cosine similarity",
    ),
    "cross-entropy with keys": (
        nn.CrossEntropyLoss(),
        ROWS,
        NEITHER,
        ValueError,
        "must be distributions .* look like embeddings",
    ),
    "its function": (F.cross_entropy, ROWS, NEITHER, ValueError, "must be distributions"),
    "its partial": (
        functools.partial(F.cross_entropy, reduction="none"),
        ROWS,
        NEITHER,
        ValueError,
        "must be distributions",
    ),
    "positive keys": (nn.CrossEntropyLoss(), ROWS, ROWS + 1, ValueError, "must be distributions"),
    "MoCo's logits and labels": (
        nn.CrossEntropyLoss(),
        LOGITS,
        torch.zeros(4, dtype=torch.long),
        ValueError,
        "all class 0.* MoCo's logits and labels; pass losses.InfoNCE",
    ),
    "the same after log_softmax": (
        nn.NLLLoss(),
        LOGITS.log_softmax(dim=1),
        torch.zeros(4, dtype=torch.long),
        ValueError,
        "all class 0",
    ),
    "KL with keys": (
        nn.KLDivLoss(reduction="batchmean"),
        ROWS.log_softmax(dim=1),
        NEITHER,
        ValueError,
        "targets of a KL divergence must be distributions",
    ),
    "KL of embeddings": (
        nn.KLDivLoss(reduction="batchmean"),
        ROWS + 1,
        PROBABILITIES,
        ValueError,
        "needs log-probabilities as z",
    ),
    "binary": (nn.BCEWithLogitsLoss(), ROWS, NEITHER, ValueError, r"lie within 0 \.\.\. 1"),
    "whole model": (
        Model(),
        IMAGES,
        IMAGES,
        TypeError,
        r"got the module Model, .* images \(4, 3, 8, 8\); pass the loss alone, and encode\(mixed",
    ),
}
RIGHT: dict[str, tuple[Any, Tensor, Tensor]] = {
    "distance": (nn.PairwiseDistance(), ROWS, ROWS),
    "similarity turned round": (Distance(), ROWS, ROWS),
    "probabilities": (nn.CrossEntropyLoss(), ROWS, PROBABILITIES),
    "probabilities in bfloat16": (nn.CrossEntropyLoss(), ROWS, PROBABILITIES.bfloat16().float()),
    "labels": (nn.CrossEntropyLoss(reduction="none"), LOGITS, torch.arange(4)),
    "one class of few": (nn.CrossEntropyLoss(), LOGITS[:, :2], torch.zeros(4, dtype=torch.long)),
    "KL": (nn.KLDivLoss(reduction="batchmean"), ROWS.log_softmax(dim=1), PROBABILITIES),
    "KL of logarithms": (
        functools.partial(F.kl_div, log_target=True, reduction="batchmean"),
        ROWS.log_softmax(dim=1),
        PROBABILITIES.log(),
    ),
    "binary": (nn.BCEWithLogitsLoss(), ROWS, PROBABILITIES),
    "dense embeddings": (
        Projecting(),
        torch.randn(4, C, 2, 2, requires_grad=True),
        torch.randn(4, C, 2, 2),
    ),
    "images, nothing trained": (nn.MSELoss(), IMAGES, IMAGES),
}


@pytest.mark.parametrize("criterion, z, target, error, text", WRONG.values(), ids=WRONG)
def test_what_is_no_criterion_is_refused(
    criterion: Any, z: Tensor, target: Tensor, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        lambda_weighted_loss(criterion, z, target, SHARED)
    for arguments in ((z, target), (z, target, z, SHARED)):
        with pytest.raises(error, match=text):
            LambdaWeightedLoss(criterion)(*arguments)
    if isinstance(criterion, Model):
        assert all(p.grad is None for p in criterion.parameters())


@pytest.mark.parametrize("criterion, z, target", RIGHT.values(), ids=RIGHT)
def test_what_is_a_criterion_is_not_refused(criterion: Any, z: Tensor, target: Tensor) -> None:
    plain = 0.5 * criterion(z, target) + 0.5 * criterion(z, target[SHARED.partner])
    torch.testing.assert_close(lambda_weighted_loss(criterion, z, target, SHARED), plain.mean())
    loss = LambdaWeightedLoss(criterion)(z, target, z, SHARED)
    torch.testing.assert_close(loss, plain.mean() + criterion(z, target).mean())


@pytest.mark.parametrize(
    "z, target, error, text",
    [
        ((ROWS, ROWS), ROWS, TypeError, r"^z_mixed must be .* got tuple; .* z_mixed\[0\]"),
        ([ROWS], ROWS, TypeError, r"^z_mixed must be a tensor \(N, \.\.\.\), got list"),
        ({"z": ROWS}, ROWS, TypeError, r"^z_mixed must be .* got dict; pass .* out of 'z'"),
        (ROWS, (ROWS, ROWS), TypeError, r"^target must be .* got tuple; .* target\[0\]"),
        (ROWS, None, TypeError, r"^target must be a tensor .* got NoneType"),
        (torch.rand(8, C), ROWS, ValueError, r"^z_mixed must .* \(8, 5\); both .*z_mixed\.chunk"),
        (ROWS, torch.rand(8, C), ValueError, r"^target must .* \(8, 5\); both .*target\.chunk"),
    ],
)
def test_what_is_no_embedding_is_refused(
    z: Any, target: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        lambda_weighted_loss(F.mse_loss, z, target, SHARED)


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


@pytest.mark.parametrize("criterion", [_squares, InfoNCE()], ids=["two calls", "one call"])
def test_the_record_is_moved_to_the_embeddings(criterion: Criterion) -> None:
    """A record that a loader made lies on the host; a device of no content stands for any."""
    z, target = torch.zeros(2, 4, C, device="meta")
    for record in (SHARED, EACH):
        assert lambda_weighted_loss(criterion, z, target, record).device.type == "meta"
        assert LambdaWeightedLoss(criterion)(z, target, z, record).device.type == "meta"


def test_the_record_is_moved_to_embeddings_that_are_matched() -> None:
    class Matching:
        def __call__(self, z: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(z, target)

        def matched(
            self, z_mixed: Tensor, target: Tensor, z: Tensor, other: Tensor | None, lam: Tensor
        ) -> Tensor:
            assert other is not None
            return ((z_mixed - z) * lam[:, None] + other - target).mean()

    z, target = torch.zeros(2, 4, C, device="meta")
    assert LambdaWeightedLoss(Matching())(z, target, z, EACH).device.type == "meta"


def test_a_record_on_another_device_gives_the_same_loss(device: torch.device) -> None:
    z, target = torch.randn(2, 4, C)
    for criterion in (_squares, InfoNCE()):
        expected = lambda_weighted_loss(criterion, z, target, EACH)
        ours = lambda_weighted_loss(criterion, z.to(device), target.to(device), EACH)
        torch.testing.assert_close(ours.cpu(), expected)
        ours = lambda_weighted_loss(criterion, z, target, EACH.to(device))
        torch.testing.assert_close(ours, expected)


# Both directions of a symmetric method in one call.


def _cosine(p: Tensor, target: Tensor) -> Tensor:
    """-cos, row by row."""
    return torch.stack([-(a @ b) / a.norm() / b.norm() for a, b in zip(p, target, strict=True)])


def _cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """SwAV's, row by row."""
    rows = zip(z, target, strict=True)
    return torch.stack([-(t * (s / 0.1 - (s / 0.1).logsumexp(0))).sum() for s, t in rows])


def _centred(z: Tensor, target: Tensor) -> Tensor:
    """DINO's, row by row."""
    return _cross_entropy(z, ((target - CENTRE) / 0.04).softmax(dim=1))


def _contrastive(z: Tensor, target: Tensor) -> Tensor:
    """MoCo v3's, row by row, without its factor of 2 tau."""
    logits = [torch.stack([q @ k / 0.2 for k in target]) for q in z]
    return torch.stack([row.logsumexp(0) - row[i] for i, row in enumerate(logits)])


CENTRE = torch.linspace(-1, 1, C, dtype=torch.float64)
SYMMETRIC: dict[str, tuple[Criterion, Criterion, str]] = {
    "BYOL": (NegativeCosine(), _cosine, "sum"),
    "SimSiam": (NegativeCosine(), _cosine, "mean"),
    "SwAV": (SwAV(), _cross_entropy, "sum"),
    "DINO": (DINO(CENTRE), _centred, "mean"),
    "MoCo v3": (InfoNCE(), _contrastive, "sum"),
    "a criterion of one's own": (_squares, _squares, "mean"),
}
symmetric = pytest.mark.parametrize(
    "criterion, slow, directions", SYMMETRIC.values(), ids=SYMMETRIC
)


def _views(name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Online, target and mixed embeddings of two views, in float64."""
    online, mixed = (list(torch.randn(2, N, C, dtype=torch.float64)) for _ in range(2))
    targets = list(torch.randn(2, N, C, dtype=torch.float64))
    if name == "sharpened":
        targets = [t.softmax(dim=1) for t in targets]
    return [z.requires_grad_() for z in online], targets, [z.requires_grad_() for z in mixed]


def _slow_symmetric(
    slow: Criterion,
    directions: str,
    pairs: list[tuple[Tensor, Tensor]],
    mixed: list[tuple[Tensor, Tensor, MixedBatch]],
) -> Tensor:
    """Original terms and those of eq. 4, sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    for z, target in pairs:
        share = 1 / len(pairs) if directions == "mean" else 1
        total = total + share * slow(z, target).mean()
    for z, target, record in mixed:
        own, other = slow(z, target), slow(z, target[record.partner])
        for i in range(N):
            lam = record.lam[i] if record.lam.ndim else record.lam
            total = total + (lam.double() * own[i] + (1 - lam.double()) * other[i]) / N
    return total


@symmetric
@pytest.mark.parametrize("views", [1, 2])
def test_both_directions_are_met_by_their_own_targets(
    criterion: Criterion, slow: Criterion, directions: str, views: int
) -> None:
    online, targets, z_mixed = _views("sharpened" if criterion == SwAV() else "")
    if not isinstance(criterion, NegativeCosine | SwAV | DINO):
        targets = [t.requires_grad_() for t in targets]
    crossed = targets[1], targets[0]
    per_sample = isinstance(criterion, InfoNCE) or criterion is _squares
    lams = torch.rand(2, N) if per_sample else torch.rand(2)
    records = [_mixed(torch.randperm(N), lam) for lam in lams]
    whole = LambdaWeightedLoss(criterion, directions=directions)
    given = (z_mixed[0], records[0]) if views == 1 else (z_mixed, records)
    loss = whole(tuple(online), crossed, *given)
    triples = list(zip(z_mixed, crossed, records, strict=True))[:views]
    expected = _slow_symmetric(slow, directions, list(zip(online, crossed, strict=True)), triples)
    torch.testing.assert_close(loss, expected)
    leaves = [leaf for leaf in (*online, *targets, *z_mixed[:views]) if leaf.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves, retain_graph=True),
        torch.autograd.grad(expected, leaves, retain_graph=True),
    )
    torch.testing.assert_close(
        whole.mixed_loss(given[0], crossed, given[1]),
        _slow_symmetric(slow, directions, [], triples),
    )


@symmetric
@pytest.mark.parametrize("views", [1, 2])
def test_both_directions_term_by_term(
    criterion: Criterion, slow: Criterion, directions: str, views: int
) -> None:
    del slow
    encode = nn.Linear(12, C).double()
    alive: list[int] = []

    def counting(images: Tensor) -> Tensor:
        alive.append(len(images))
        z: Tensor = encode(images.flatten(1))
        return z

    x = list(torch.rand(2, N, 3, 2, 2, dtype=torch.float64))
    crossed = tuple(torch.rand(2, N, C, dtype=torch.float64).softmax(dim=2))
    records = [mix_batch(one, BlockMaskGenerator(2)) for one in x][:views]
    whole = LambdaWeightedLoss(criterion, directions=directions)
    loss = whole(
        [counting(one) for one in x], crossed, [counting(one.images) for one in records], records
    )
    expected = torch.autograd.grad(loss, list(encode.parameters()))

    alive.clear()
    total = 0.0
    given = records if views == 2 else records[0]
    for number, term in enumerate(whole.terms(counting, tuple(x), crossed, given), start=1):
        assert len(alive) == number  # No view is embedded before its turn.
        term.backward()
        total += float(term.detach())
    assert number == 2 + views
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    for parameter, gradient in zip(encode.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("by_term", [True, False])
def test_both_directions_move_the_state_as_two_plain_calls_do(by_term: bool) -> None:
    whole = LambdaWeightedLoss(Bank())
    criterion = whole.criterion
    assert isinstance(criterion, Bank)
    plain = copy.deepcopy(criterion)
    for _ in range(3):
        z1, z2, t1, t2, zm1, zm2 = torch.randn(6, 4, 5)
        before = copy.deepcopy(plain)
        expected = torch.zeros(())
        for z_mixed, target in ((zm1, t2), (zm2, t1)):
            for lam, its_target in ((0.5, target), (0.5, target[SHARED.partner])):
                expected = expected + lam * copy.deepcopy(before)(z_mixed, its_target)
        expected = expected + plain(z1, t2) + plain(z2, t1)
        if by_term:
            images, records = _encoded([z1, z2]), [_encoded_record(zm) for zm in (zm1, zm2)]
            terms = whole.terms(lambda x: x.flatten(1), images, (t2, t1), records)
            loss = torch.stack(list(terms)).sum()
        else:
            loss = whole((z1, z2), (t2, t1), (zm1, zm2), (SHARED, SHARED))
        torch.testing.assert_close(loss, expected)
        assert torch.equal(criterion.keys, plain.keys)


def _encoded(rows: list[Tensor]) -> list[Tensor]:
    return [row.view(4, 5, 1, 1) for row in rows]


def _encoded_record(rows: Tensor) -> MixedBatch:
    return MixedBatch(rows.view(4, 5, 1, 1), SHARED.lam, SHARED.partner)


def test_matching_criteria_are_given_the_clean_embeddings_of_their_direction() -> None:
    criterion = MatchedBarlowTwins(0.1)
    z1, z2, m1, m2 = torch.randn(4, N, C, dtype=torch.float64)
    records = [_mixed(torch.randperm(N), torch.rand(N)) for _ in range(2)]
    whole = LambdaWeightedLoss(criterion)
    expected = criterion(z1, z2) + criterion(z2, z1)
    for mixed, target, z, record in ((m1, z2, z1, records[0]), (m2, z1, z2, records[1])):
        expected = expected + criterion.matched(mixed, target, z, z[record.partner], record.lam)
    torch.testing.assert_close(whole((z1, z2), (z2, z1), (m1, m2), records), expected)


def test_directions_are_checked_where_terms_are_taken_one_by_one() -> None:
    images = torch.rand(4, 3, 2, 2)
    mixed = mix_batch(images, BlockMaskGenerator(2))
    rows = torch.randn(4, C)
    whole = LambdaWeightedLoss(InfoNCE())

    def encode(images: Tensor) -> Tensor:
        raise AssertionError(f"{len(images)} images were embedded before the check")

    with pytest.raises(TypeError, match=r"^images and target must both be tensors"):
        whole.terms(encode, [images, images], rows, mixed)
    with pytest.raises(ValueError, match="one mixed view, or one per direction, got 3 for 2"):
        whole.terms(encode, (images, images), (rows, rows), [mixed] * 3)
    with pytest.raises(ValueError, match=r"no gradient where terms .* pass target.detach\(\)"):
        whole.terms(encode, (images, images), (rows, rows.clone().requires_grad_()), mixed)
    with pytest.raises(TypeError, match=r"^z_mixed must be a tensor .* got tuple"):
        next(whole.terms(lambda x: (x, x), images, rows, mixed))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="directions must be one of 'sum', 'mean', got 'both'"):
        LambdaWeightedLoss(InfoNCE(), directions="both")
    assert "directions='mean'" in repr(LambdaWeightedLoss(InfoNCE(), directions="mean"))
