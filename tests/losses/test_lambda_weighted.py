from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weighed import EACH, SHARED, C, Criterion, N, as_record, squares

from mixmask import (
    BlockMaskGenerator,
    LambdaWeightedLoss,
    erase_batch,
    lambda_weighted_loss,
    mix_batch,
)
from mixmask.losses import (
    InfoNCE,
    MatchedBarlowTwins,
    SharingCriterion,
    info_nce,
)

Golden = Callable[[str], dict[str, Tensor]]


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

    unmix = as_record(reverse, numbers["lam_unmix"].float())
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

    def flat_squares(z: Tensor, target: Tensor) -> Tensor:
        return squares(z.reshape(N, -1), target.reshape(N, -1))

    ours = lambda_weighted_loss(flat_squares, z, target, as_record(partner, lam), switch=switch)
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
    z, target, mixed = (
        torch.rand(N, C),
        torch.rand(N, C),
        as_record(torch.randperm(N), torch.rand(())),
    )
    ours = lambda_weighted_loss(F.mse_loss, z, target, mixed)
    rows = lambda_weighted_loss(lambda z, t: squares(z, t) / C, z, target, mixed)
    torch.testing.assert_close(ours, rows)
    assert lambda_weighted_loss(squares, z, target, mixed).shape == ()


@pytest.mark.parametrize("switch", [True, False])
def test_without_the_switch_the_partner_is_not_looked_at(switch: bool) -> None:
    calls = []

    def criterion(z: Tensor, target: Tensor) -> Tensor:
        calls.append(target)
        return squares(z, target)

    z, target, partner = torch.rand(N, C), torch.rand(N, C), torch.randperm(N)
    lambda_weighted_loss(criterion, z, target, as_record(partner, torch.rand(N)), switch=switch)
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
    z, target, mixed = (
        torch.rand(N, C),
        torch.rand(N, C),
        as_record(torch.randperm(N), torch.rand(N)),
    )
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
        return squares(z, target)

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
        return squares(z, target)


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
    mixed = as_record(partner, lam)
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
    z, mixed = torch.rand(N, C), as_record(torch.randperm(N), torch.tensor(0.5))
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
        "list": [as_record(torch.randperm(N), torch.tensor(0.5)), images],
    }[kind]
    z = torch.rand(N, C)
    whole, message = (
        LambdaWeightedLoss(squares),
        "mixed must be a MixedBatch, got .*not its images",
    )
    z_mixed = [z] * len(mixed) if kind != "images" else z
    with pytest.raises(TypeError, match=message):
        lambda_weighted_loss(squares, z, z, mixed)
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
    mixed = as_record(torch.randperm(N), torch.rand(N))
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
        lambda_weighted_loss(squares, z, target, mixed), squares(z, target).mean()
    )


def test_inputs_are_not_changed() -> None:
    z, target = torch.rand(N, C), torch.rand(N, C)
    mixed = as_record(torch.randperm(N), torch.rand(N))
    negatives = torch.rand(300, C)
    tensors = (z, target, mixed.lam, mixed.partner, negatives)
    before = [tensor.clone() for tensor in tensors]
    lambda_weighted_loss(InfoNCE(negatives), z, target, mixed)
    lambda_weighted_loss(squares, z, target, mixed)
    assert all(map(torch.equal, tensors, before))


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


@pytest.mark.parametrize("criterion", [squares, InfoNCE()], ids=["two calls", "one call"])
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
    for criterion in (squares, InfoNCE()):
        expected = lambda_weighted_loss(criterion, z, target, EACH)
        ours = lambda_weighted_loss(criterion, z.to(device), target.to(device), EACH)
        torch.testing.assert_close(ours.cpu(), expected)
        ours = lambda_weighted_loss(criterion, z, target, EACH.to(device))
        torch.testing.assert_close(ours, expected)
