"""The two lines in loops as people have them, beside slow versions; others: test_examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from torch import Tensor, nn

import mixmask
from mixmask import MixedBatch, losses
from mixmask._distributed import gather_rows
from mixmask.data.sets import load_data
from mixmask.examples import parts

N, C, K, TAU = 8, 16, 32, 0.2
MASKS = mixmask.BlockMaskGenerator(grid_size=4, ratio=0.4)


class Encoder(nn.Module):
    """A small network, with batch norm as real ones have it, or without."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=4)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.head = nn.Linear(8 * 49, C)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(images))).flatten(1))  # type: ignore[no-any-return]


class MoCo(nn.Module):
    """Two encoders and a queue (C, K), as MoCo's own code keeps them; the loss is the caller's."""

    queue: Tensor
    pointer: Tensor

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.encoder_q = Encoder(norm=norm)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(C, K), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def query(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder_q(images), dim=1)

    @torch.no_grad()
    def key(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder_k(images), dim=1)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        start = int(self.pointer)
        self.queue[:, start : start + len(keys)] = keys.T
        self.pointer[0] = (start + len(keys)) % K


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Give real images, (64, 3, 32, 32), about standardised."""
    images = load_data("clothing64", 32).train.images[::50][:64]
    return F.interpolate(images.float(), size=32).sub(128).div(64)


@pytest.fixture
def batches(photographs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return _views(photographs)


def _views(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of views: shifted and mirrored."""
    for batch in images.split(N):
        shift = [int(s) for s in torch.randint(-4, 5, (2,))]
        yield batch.roll(shift, (2, 3)), batch.flip(3) * 0.9


def slow_moco(q: Tensor, k: Tensor, q_mixed: Tensor, queue: Tensor, mixed: MixedBatch) -> Tensor:
    """MoCo's loss plus eq. 4, image by image; queue (C, K)."""

    def one(row: Tensor, key: Tensor) -> Tensor:
        logits = torch.cat([(row @ key)[None], row @ queue]) / TAU
        return -logits.log_softmax(dim=0)[0]

    total = torch.zeros(())
    for i in range(len(q)):
        j, lam = int(mixed.partner[i]), float(mixed.lam)
        total = total + one(q[i], k[i])
        total = total + lam * one(q_mixed[i], k[i]) + (1 - lam) * one(q_mixed[i], k[j])
    return total / len(q)


def test_moco_written_by_hand(batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Keys are enqueued before backward, as MoCo's own forward does."""
    ours = MoCo()
    plain = copy.deepcopy(ours)
    steps = [torch.optim.SGD(model.encoder_q.parameters(), lr=0.1) for model in (ours, plain)]
    for step, (x_q, x_k) in enumerate(batches):
        torch.manual_seed(step)
        info_nce = losses.InfoNCE(ours.queue.T, TAU)
        q, k = ours.query(x_q), ours.key(x_k)
        mixed = mixmask.mix_batch(x_q, MASKS)
        loss = info_nce(q, k) + mixmask.lambda_weighted_loss(
            info_nce, ours.query(mixed.images), k, mixed
        )
        ours.enqueue(k)

        torch.manual_seed(step)
        record = mixmask.mix_batch(x_q, MASKS)
        q, k = plain.query(x_q), plain.key(x_k)
        slow = slow_moco(q, k, plain.query(record.images), plain.queue.clone(), record)
        plain.enqueue(k)

        torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-5)
        for model, optimizer, total in zip((ours, plain), steps, (loss, slow), strict=True):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            parts.update_momentum(model.encoder_q, model.encoder_k)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_queue_that_the_loop_rebinds(batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """As many loops keep it: a criterion built above the loop must ask for the queue of now."""
    model = MoCo(norm=False)
    queue = F.normalize(torch.randn(K, C), dim=1)
    info_nce = losses.InfoNCE(lambda: queue, TAU)
    stale = losses.InfoNCE(queue, TAU)
    for step, (x_q, x_k) in enumerate(batches):
        q, k = model.query(x_q), model.key(x_k)
        mixed = mixmask.mix_batch(x_q, MASKS)
        q_mixed = model.query(mixed.images)
        loss = info_nce(q, k) + mixmask.lambda_weighted_loss(info_nce, q_mixed, k, mixed)
        slow = slow_moco(q, k, q_mixed, queue.T, mixed)
        torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-5)
        if step > 0:
            late = stale(q, k) + mixmask.lambda_weighted_loss(stale, q_mixed, k, mixed)
            assert abs(float((late - slow).detach())) > 1e-2
        queue = torch.cat([queue, k])[N:]


def test_a_criterion_in_the_loops_own_function_keeps_a_ring_with_an_int(
    batches: Iterator[tuple[Tensor, Tensor]],
) -> None:
    """State in a closure: a buffer, and a pointer that is a plain int."""

    class Ring(nn.Module):
        queue: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", F.normalize(torch.randn(K, C), dim=1))
            self.pointer = 0

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            loss = losses.info_nce(q, k, self.queue.clone(), TAU)
            self.queue[self.pointer : self.pointer + len(k)] = k
            self.pointer = (self.pointer + len(k)) % K
            return loss

    model, ring = MoCo(norm=False), Ring()
    plain = copy.deepcopy(ring)
    whole = mixmask.LambdaWeightedLoss(lambda z, target: ring(z, target))
    for x_q, x_k in batches:
        q, k = model.query(x_q), model.key(x_k)
        mixed = mixmask.mix_batch(x_q, MASKS)
        q_mixed = model.query(mixed.images)
        slow = slow_moco(q, k, q_mixed, plain.queue.T.clone(), mixed)
        torch.testing.assert_close(whole(q, k, q_mixed, mixed), slow, rtol=1e-5, atol=1e-5)
        plain(q, k)
        assert ring.pointer == plain.pointer
        assert torch.equal(ring.queue, plain.queue)


def test_backward_term_by_term_gives_the_same_gradients(
    batches: Iterator[tuple[Tensor, Tensor]],
) -> None:
    """What the README says about holding one forward pass at a time."""
    model = MoCo()
    info_nce = losses.InfoNCE(model.queue.T, TAU)
    x_q, x_k = next(batches)
    k = model.key(x_k)
    mixed = mixmask.mix_batch(x_q, MASKS)

    def mixed_loss() -> Tensor:
        return mixmask.lambda_weighted_loss(info_nce, model.query(mixed.images), k, mixed)

    (info_nce(model.query(x_q), k) + mixed_loss()).backward()
    together = [p.grad.clone() for p in model.encoder_q.parameters() if p.grad is not None]
    model.zero_grad()
    info_nce(model.query(x_q), k).backward()
    mixed_loss().backward()
    apart = [p.grad for p in model.encoder_q.parameters()]
    torch.testing.assert_close(apart, together)


Terms = tuple[losses.Criterion, Tensor, Tensor, Tensor]


def _pair(criterion: losses.Criterion) -> Callable[..., Terms]:
    """A method whose target is the other view's embedding, with its gradient."""

    def terms(encoder: nn.Module, x1: Tensor, x2: Tensor, mixed: Tensor) -> Terms:
        return criterion, encoder(x1), encoder(x2), encoder(mixed)

    return terms


def _byol(encoder: nn.Module, x1: Tensor, x2: Tensor, mixed: Tensor) -> Terms:
    with torch.no_grad():
        target = encoder(x2)
    return losses.NegativeCosine(), encoder(x1), target, encoder(mixed)


def _swav(encoder: nn.Module, x1: Tensor, x2: Tensor, mixed: Tensor) -> Terms:
    def scores(images: Tensor) -> Tensor:
        return F.normalize(encoder(images), dim=1)

    return losses.SwAV(), scores(x1), losses.sinkhorn(scores(x2)), scores(mixed)


def _dino(encoder: nn.Module, x1: Tensor, x2: Tensor, mixed: Tensor) -> Terms:
    with torch.no_grad():
        teacher = encoder(x2)
    center = losses.update_center(torch.zeros(C), teacher)
    return losses.DINO(center), encoder(x1), teacher, encoder(mixed)


METHODS: dict[str, Callable[..., Terms]] = {
    "SimCLR": _pair(losses.NTXent(0.2)),
    "SimCLR, one direction": _pair(losses.NTXent(0.2, one_directional=True)),
    "BYOL": _byol,
    "SimSiam": _pair(losses.NegativeCosine()),
    "Barlow Twins": _pair(losses.BarlowTwins()),
    "Barlow Twins, matched": _pair(losses.MatchedBarlowTwins()),
    "VICReg": _pair(losses.VICReg()),
    "SwAV": _swav,
    "DINO": _dino,
}


@pytest.mark.parametrize("terms", METHODS.values(), ids=METHODS)
def test_every_method_trains(terms: Callable[..., Terms], photographs: Tensor) -> None:
    """Twenty steps on the same images bring the whole loss down, the mixed terms included."""
    encoder = Encoder()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    x1, x2 = next(_views(photographs[:N]))
    mixed = mixmask.mix_batch(x1, MASKS)
    seen, mixed_seen = [], []
    for _ in range(20):
        criterion, z, target, z_mixed = terms(encoder, x1, x2, mixed.images)
        whole = mixmask.LambdaWeightedLoss(criterion)
        loss = whole(z, target, z_mixed, mixed)
        seen.append(loss.item())
        mixed_seen.append(whole.mixed_loss(z_mixed, target, mixed, z=z).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(map(torch.isfinite, map(torch.tensor, seen)))
    assert seen[-1] < seen[0]
    assert mixed_seen[-1] < mixed_seen[0]


def test_several_mixed_views_and_small_crops_left_alone(photographs: Tensor) -> None:
    """Multi-crop: both large crops are mixed, each for the other's codes; small ones are not."""
    encoder = Encoder()
    x1, x2 = next(_views(photographs[:N]))
    small = F.interpolate(x1[..., 8:24, 8:24], size=32)
    scores = [F.normalize(encoder(x), dim=1) for x in (x1, x2, small)]
    codes = [losses.sinkhorn(s) for s in scores[:2]]
    swav = losses.SwAV()
    loss = swav(scores[0], codes[1]) + swav(scores[1], codes[0])
    loss = loss + swav(scores[2], codes[0]) + swav(scores[2], codes[1])
    plain = loss
    for x, target in ((x1, codes[1]), (x2, codes[0])):
        mixed = mixmask.mix_batch(x, MASKS)
        z_mixed = F.normalize(encoder(mixed.images), dim=1)
        loss = loss + mixmask.lambda_weighted_loss(swav, z_mixed, target, mixed)
        lam, other = float(mixed.lam), target[mixed.partner]
        plain = plain + lam * swav(z_mixed, target) + (1 - lam) * swav(z_mixed, other)
    torch.testing.assert_close(loss, plain)


def test_halves_of_a_batch_accumulate_to_its_gradient(photographs: Tensor) -> None:
    """One mask, partners within each half: the sum of two backward passes is that of one."""
    model = MoCo(norm=False)
    info_nce = losses.InfoNCE(model.queue.T, TAU)
    x_q, x_k = next(_views(photographs[:N]))
    cells, k, half = MASKS(), model.key(x_k), N // 2

    def loss(rows: slice, partner: Tensor) -> Tensor:
        mixed = mixmask.mix_batch(x_q[rows], cells, partner=partner)
        return info_nce(model.query(x_q[rows]), k[rows]) + mixmask.lambda_weighted_loss(
            info_nce, model.query(mixed.images), k[rows], mixed
        )

    within = torch.arange(half - 1, -1, -1)
    whole = loss(slice(None), torch.cat([within, within + half]))
    whole.backward()
    expected = [p.grad.clone() for p in model.encoder_q.parameters() if p.grad is not None]
    model.zero_grad()
    halves = [loss(slice(0, half), within), loss(slice(half, N), within)]
    for part in halves:
        (part / 2).backward()
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)
    torch.testing.assert_close(
        [p.grad for p in model.encoder_q.parameters()], expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_a_compiled_step(batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Masks, mixing, encoder and loss in one graph."""
    model = MoCo()

    def step(x_q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        info_nce = losses.InfoNCE(queue, TAU)
        mixed = mixmask.mix_batch(x_q, MASKS)
        return info_nce(model.query(x_q), k) + mixmask.lambda_weighted_loss(
            info_nce, model.query(mixed.images), k, mixed
        )

    compiled = torch.compile(step, fullgraph=True)
    for number, (x_q, x_k) in enumerate(batches):
        k = model.key(x_k)
        results = []
        for call in (step, compiled):
            torch.manual_seed(number)
            model.zero_grad()
            loss = call(x_q, k, model.queue.T)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.encoder_q.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
        model.enqueue(k)
        if number == 2:
            break


def _moco_and_batch() -> tuple[MoCo, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    model = MoCo(norm=False)
    x_q, x_k = torch.randn(2, N, 3, 32, 32)
    return model, x_q, x_k, MASKS()


def _one_step(
    model: MoCo, x_q: Tensor, x_k: Tensor, cells: Tensor, partner: Tensor, query: nn.Module
) -> tuple[Tensor, Tensor]:
    info_nce = losses.InfoNCE(model.queue.T, TAU)
    simclr = losses.NTXent(TAU, gather_distributed=True)

    def embed(images: Tensor) -> Tensor:
        return F.normalize(query(images), dim=1)

    k = model.key(x_k)
    q, q2 = embed(torch.cat([x_q, x_k])).chunk(2)
    mixed = mixmask.mix_batch(x_q, cells, partner=partner)
    q_mixed = embed(mixed.images)
    loss = info_nce(q, k) + mixmask.lambda_weighted_loss(info_nce, q_mixed, k, mixed)
    loss = loss + simclr(q, q2) + mixmask.lambda_weighted_loss(simclr, q_mixed, q2, mixed)
    loss.backward()
    return loss.detach(), k


def two_processes(rank: int) -> dict[str, Any]:
    """Take one step on half of the batch, in a process of two."""
    model, x_q, x_k, cells = _moco_and_batch()
    half = slice(rank * N // 2, (rank + 1) * N // 2)
    within = torch.arange(N // 2 - 1, -1, -1)
    query = nn.parallel.DistributedDataParallel(model.encoder_q)
    loss, k = _one_step(model, x_q[half], x_k[half], cells, within, query)
    model.enqueue(gather_rows(k))
    gradients = [p.grad for p in model.encoder_q.parameters()]
    return {"loss": loss, "gradients": gradients, "queue": model.queue}


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """MoCo and SimCLR terms under DistributedDataParallel, gathered negatives and keys."""
    first, second = run_in_processes(two_processes, tmp_path)

    model, x_q, x_k, cells = _moco_and_batch()
    within = torch.arange(N // 2 - 1, -1, -1)
    partner = torch.cat([within, within + N // 2])
    loss, k = _one_step(model, x_q, x_k, cells, partner, model.encoder_q)
    model.enqueue(k)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss)
    gradients = [p.grad for p in model.encoder_q.parameters()]
    for out in (first, second):
        torch.testing.assert_close(out["gradients"], gradients, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out["queue"], model.queue)
