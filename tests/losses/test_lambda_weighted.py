from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import BlockMaskGenerator, MixedBatch, erase_batch, lambda_weighted_loss, mix_batch
from mixmask.losses import InfoNCE, SharingCriterion, info_nce

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
