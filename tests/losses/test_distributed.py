"""Two processes with half of the batch each, against one with the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from processes import run_in_processes
from torch import Tensor, nn

from mixmask import LambdaWeightedLoss, MixedBatch
from mixmask._distributed import average, gather_rows
from mixmask.losses import (
    DINO,
    BarlowTwins,
    InfoNCE,
    MatchedBarlowTwins,
    NTXent,
    SwAV,
    VICReg,
    sinkhorn,
    update_center,
)

WORLD, N, PIXELS, C = 2, 5, 6, 4
# Partners within each half; those of the second one are counted from its own first image.
HALVES = torch.tensor([[3, 4, 0, 2, 1], [2, 2, 0, 4, 3]])
SHARES = torch.linspace(0.1, 0.9, WORLD * N, dtype=torch.float64).view(WORLD, N)

Results = list[dict[str, Any]]

# What gathering makes equal to one process: by name, whether each sample has a λ of its own.
CRITERIA: dict[str, tuple[Callable[[bool], Any], bool]] = {
    "InfoNCE": (lambda gather: InfoNCE(temperature=0.3, gather_distributed=gather), True),
    "NTXent": (lambda gather: NTXent(0.3, gather_distributed=gather), True),
    "NTXent, one direction": (
        lambda gather: NTXent(0.3, one_directional=True, gather_distributed=gather),
        True,
    ),
    "VICReg": (lambda gather: VICReg(gather_distributed=gather), True),
}
# Here features are standardised by the half batch.
LOCAL: dict[str, Callable[[bool], Any]] = {
    "BarlowTwins": lambda gather: BarlowTwins(0.1, gather_distributed=gather),
    "MatchedBarlowTwins": lambda gather: MatchedBarlowTwins(0.1, gather_distributed=gather),
}
UNEVEN: dict[str, Callable[[Tensor], Any]] = {
    "InfoNCE": lambda z: InfoNCE(gather_distributed=True)(z, z),
    "NTXent": lambda z: NTXent(gather_distributed=True)(z, z),
    "VICReg": lambda z: VICReg(gather_distributed=True)(z, z),
    "sinkhorn": lambda z: sinkhorn(z, gather_distributed=True),
    "BarlowTwins": lambda z: BarlowTwins(gather_distributed=True)(z, z),
}


def _encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(PIXELS, 8), nn.Tanh(), nn.Linear(8, C)).double()


def _images() -> Tensor:
    """Two clean views and a mixed one: (3, WORLD, N, PIXELS)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, WORLD, N, PIXELS, dtype=torch.float64, generator=generator)


def _record(rank: int | None, *, per_sample: bool) -> MixedBatch:
    """What was mixed in one half, or in both."""
    partner = (HALVES + torch.arange(WORLD)[:, None] * N).flatten()
    lam = SHARES.flatten()
    if rank is not None:
        partner, lam = HALVES[rank], SHARES[rank]
    return MixedBatch(
        torch.empty(len(partner), 1, 1, 1), lam if per_sample else SHARES[0, 2], partner
    )


def _step(
    criterion: Any, encoder: nn.Module, images: Tensor, mixed: MixedBatch
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a step, original and mixed terms, and the encoder's gradients."""
    encoder.zero_grad()
    z, target, z_mixed = encoder(images.flatten(0, -2)).view(*images.shape[:-1], C)
    loss = LambdaWeightedLoss(criterion)(z, target, z_mixed, mixed)
    torch.autograd.backward(loss)
    return loss.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


def _work(rank: int) -> dict[str, Any]:
    """Run everything once in one of the processes."""
    images = _images()[:, rank]
    encoder = nn.parallel.DistributedDataParallel(_encoder())
    results: dict[str, Any] = {}
    for name, (make, per_sample) in CRITERIA.items():
        mixed = _record(rank, per_sample=per_sample)
        results[name] = _step(make(True), encoder, images, mixed)
        results[f"{name}, not gathered"] = _step(make(False), encoder, images, mixed)
    same = _record(0, per_sample=False)
    for name, make_local in LOCAL.items():
        results[name] = _step(make_local(True), encoder, images, _record(rank, per_sample=False))
        results[f"{name}, same rows"] = _step(make_local(True), encoder, _images()[:, 0], same)
    with torch.no_grad():
        scores = encoder(images[0])
    results["codes"] = sinkhorn(5 * scores, gather_distributed=True)
    results["codes, not gathered"] = sinkhorn(5 * scores)
    results["codes far apart"] = sinkhorn(1e4 * scores * (1 + rank), gather_distributed=True)
    results["center"] = update_center(torch.ones(C, dtype=torch.float64), scores)
    results["soft"] = [
        _step(SwAVOfScores(), encoder, images, _record(rank, per_sample=True)),
        _step(DINO(results["center"]), encoder, images, _record(rank, per_sample=True)),
    ]
    rows = (torch.arange(6.0).view(3, 2) + 10 * rank).requires_grad_()
    weights = torch.arange(12.0).view(6, 2) * (rank + 1)
    stacked, mean = gather_rows(rows), average(rows)
    results["stacked"] = stacked.detach(), torch.autograd.grad((stacked * weights).sum(), rows)[0]
    results["mean"] = mean.detach(), torch.autograd.grad((mean * weights[:3]).sum(), rows)[0]
    for name, call in UNEVEN.items():
        results[f"{name}, uneven"] = _refusal(partial(call, torch.randn(3 + rank, C)))
    # After the errors the processes still understand each other.
    results["afterwards"] = sinkhorn(5 * scores, gather_distributed=True)
    return results


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


class SwAVOfScores(SwAV):
    """SwAV with the codes made of the other view's scores, by all processes."""

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        return super().__call__(z, sinkhorn(target, gather_distributed=True))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        codes = sinkhorn(target, gather_distributed=True)
        others = None if other is None else sinkhorn(other, gather_distributed=True)
        return super().weighted(z, codes, others, lam)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Start two processes and return what each of them found."""
    return run_in_processes(_work, tmp_path_factory.mktemp("processes"), WORLD)


def _whole(criterion: Any, *, per_sample: bool) -> tuple[Tensor, list[Tensor]]:
    return _step(
        criterion, _encoder(), _images().flatten(1, 2), _record(None, per_sample=per_sample)
    )


def _mean_loss(halves: Results, name: str) -> Tensor:
    return torch.stack([half[name][0] for half in halves]).mean()


def test_rows_and_averages_come_with_the_gradients_of_every_process(halves: Results) -> None:
    rows = torch.stack([torch.arange(6.0).view(3, 2) + 10 * rank for rank in range(WORLD)])
    # Each process weighs what it has gathered by its number.
    weights = torch.arange(12.0).view(WORLD, 3, 2) * 3
    for rank, half in enumerate(halves):
        assert torch.equal(half["stacked"][0], rows.flatten(0, 1))
        assert torch.equal(half["stacked"][1], weights[rank])
        assert torch.equal(half["mean"][0], rows.mean(dim=0))
        assert torch.equal(half["mean"][1], weights[0] / WORLD)


@pytest.mark.parametrize("name", CRITERIA)
def test_two_halves_are_one_batch(halves: Results, name: str) -> None:
    make, per_sample = CRITERIA[name]
    loss, gradients = _whole(make(False), per_sample=per_sample)
    torch.testing.assert_close(_mean_loss(halves, name), loss)
    for half in halves:
        torch.testing.assert_close(half[name][1], gradients)


@pytest.mark.parametrize("name", CRITERIA)
def test_without_gathering_two_halves_are_two_batches(halves: Results, name: str) -> None:
    make, per_sample = CRITERIA[name]
    alone = [
        _step(make(False), _encoder(), _images()[:, rank], _record(rank, per_sample=per_sample))
        for rank in range(WORLD)
    ]
    for half, (loss, _) in zip(halves, alone, strict=True):
        torch.testing.assert_close(half[f"{name}, not gathered"][0], loss)
        mean = [sum(both) / WORLD for both in zip(*(grads for _, grads in alone), strict=True)]
        torch.testing.assert_close(half[f"{name}, not gathered"][1], mean)
    assert abs(_mean_loss(halves, f"{name}, not gathered") - _mean_loss(halves, name)) > 1e-2


def _averaged_barlow_twins() -> tuple[Tensor, list[Tensor]]:
    """The clean and the λ-weighted terms of the mean of both halves' correlations."""
    encoder = _encoder()
    views = encoder(_images())
    lam = SHARES[0, 2]

    def correlation(z: Tensor, target: Tensor) -> Tensor:
        z, target = (
            (rows - rows.mean(dim=0)) / (rows.var(dim=0, correction=0) + 1e-5).sqrt()
            for rows in (z, target)
        )
        return z.T @ target / N

    def loss(terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        mean = torch.stack([correlation(z, target) for z, target in terms]).mean(dim=0)
        squares = (mean - torch.eye(C)) ** 2
        return 0.1 * squares.sum() + 0.9 * squares.diagonal().sum()

    z, target, z_mixed = views
    pairs = [(z_mixed[rank], target[rank][HALVES[rank]]) for rank in range(WORLD)]
    total = loss(list(zip(z, target, strict=True)))
    total = total + lam * loss(list(zip(z_mixed, target, strict=True))) + (1 - lam) * loss(pairs)
    torch.autograd.backward(total)
    return total.detach(), [p.grad for p in encoder.parameters() if p.grad is not None]


def test_barlow_twins_averages_correlations_of_features_standardised_apart(halves: Results) -> None:
    loss, gradients = _averaged_barlow_twins()
    for half in halves:
        torch.testing.assert_close(half["BarlowTwins"][0], loss)
        torch.testing.assert_close(half["BarlowTwins"][1], gradients)
    whole, _ = _whole(BarlowTwins(0.1), per_sample=False)
    assert abs(whole - loss) > 1e-2


@pytest.mark.parametrize("name", LOCAL)
def test_barlow_twins_of_the_same_rows_twice_is_that_of_one_batch(
    halves: Results, name: str
) -> None:
    images, mixed = _images()[:, 0], _record(0, per_sample=False)
    loss, gradients = _step(LOCAL[name](False), _encoder(), images, mixed)
    for half in halves:
        torch.testing.assert_close(half[f"{name}, same rows"][0], loss)
        torch.testing.assert_close(half[f"{name}, same rows"][1], gradients)
    assert abs(_mean_loss(halves, name) - loss) > 1e-3


def test_codes_are_those_of_the_whole_batch(halves: Results) -> None:
    with torch.no_grad():
        scores = _encoder()(_images()[0])
    codes = torch.cat([half["codes"] for half in halves])
    torch.testing.assert_close(codes, sinkhorn(5 * scores.flatten(0, 1)))
    alone = torch.cat([half["codes, not gathered"] for half in halves])
    torch.testing.assert_close(alone, torch.cat([sinkhorn(5 * half) for half in scores]))
    assert (codes - alone).abs().max() > 0.1
    assert all(torch.equal(half["afterwards"], half["codes"]) for half in halves)
    far = torch.cat([half["codes far apart"] for half in halves])
    expected = sinkhorn(1e4 * torch.cat([scores[0], 2 * scores[1]]))
    torch.testing.assert_close(far, expected, rtol=1e-6, atol=1e-6)


def test_the_center_is_that_of_the_whole_batch(halves: Results) -> None:
    with torch.no_grad():
        scores = _encoder()(_images()[0]).flatten(0, 1)
    expected = update_center(torch.ones(C, dtype=torch.float64), scores)
    for half in halves:
        torch.testing.assert_close(half["center"], expected)


@pytest.mark.parametrize("which", [0, 1], ids=["SwAV", "DINO"])
def test_soft_assignments_by_all_are_those_of_one_batch(halves: Results, which: int) -> None:
    criterion = [SwAVOfScores(), DINO(halves[0]["center"])][which]
    loss, gradients = _whole(criterion, per_sample=True)
    torch.testing.assert_close(
        torch.stack([half["soft"][which][0] for half in halves]).mean(), loss
    )
    for half in halves:
        torch.testing.assert_close(half["soft"][which][1], gradients)


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_batches_are_refused_by_every_process(halves: Results, name: str) -> None:
    for half in halves:
        text = half[f"{name}, uneven"]
        assert text.startswith(
            "every process must hold the same number of images, got [3, 4] by rank;"
        )
