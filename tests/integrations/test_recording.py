"""Models with their loss in forward, recorded, beside the same losses written out slowly."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from recorded_models import (
    MASKS,
    SIZE,
    C,
    Contrastive,
    Cosine,
    Inline,
    N,
    Pair,
    build,
    draw,
    same,
    slow_contrast,
    slow_distance,
    slow_mixed,
    view_pairs,
)
from torch import Tensor, nn

import mixmask
from mixmask import RecordingCriterion, losses
from mixmask._distributed import gather_rows, rank
from mixmask.integrations.recording import RecordingView, record_embeddings


def _train(model: Any, step_loss: Callable[[int, Tensor, Tensor], Tensor]) -> list[Any]:
    optimizer, done = torch.optim.SGD(model.parameters(), 0.1), []
    for step, (x_1, x_2) in enumerate(view_pairs()):
        loss = step_loss(step, x_1, x_2)
        optimizer.zero_grad()
        loss.backward()
        done.append([loss.item(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        optimizer.step()
        for of_k, of_q in zip(model.momentum.parameters(), model.encoder.parameters(), strict=True):
            of_k.data.mul_(0.9).add_(0.1 * of_q.data)
    return done


@pytest.mark.parametrize("both", [False, True], ids=["first view", "both views"])
def test_three_steps_of_a_symmetric_method(*, both: bool) -> None:
    model, plain = build(Contrastive), build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)

    def ours(step: int, x_1: Tensor, x_2: Tensor) -> Tensor:
        mixed = [draw(step, x) for x in ((x_1, x_2) if both else (x_1,))]
        loss: Tensor = model(x_1, x_2)
        if not both:
            loss = loss + model.contrastive_loss.mixed_loss(model.online, mixed[0])
        else:
            z_mixed = [model.online(one.images) for one in mixed]
            loss = loss + model.contrastive_loss.mixed_loss(z_mixed, mixed)
        return loss

    def slow(step: int, x_1: Tensor, x_2: Tensor) -> Tensor:
        queries, targets = [[f(x) for x in (x_1, x_2)] for f in (plain.online, plain.targets)]
        loss = torch.zeros((), dtype=torch.float64)
        for q, k in ((queries[0], targets[1]), (queries[1], targets[0])):
            for row, key in zip(q, k, strict=True):
                loss = loss + slow_contrast(row, key, k) / N
        for x, k in ((x_1, targets[1]), (x_2, targets[0]))[: 1 + both]:
            mixed = draw(step, x)
            loss = loss + slow_mixed(slow_contrast, plain.online(mixed.images), k, mixed)
        return loss

    same(_train(model, ours), _train(plain, slow))
    same(dict(model.state_dict()), dict(plain.state_dict()))


def test_a_mixed_view_of_the_second_view_belongs_to_the_second_call() -> None:
    model, plain = build(Contrastive), build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)
    (x_1, x_2), mixed = view_pairs()[0], draw(0, view_pairs()[0][1])
    model(x_1, x_2)
    term = model.contrastive_loss.mixed_loss(model.online, mixed, call=1)
    for x in (x_1, x_2):
        plain.online(x)
    slow = slow_mixed(slow_contrast, plain.online(mixed.images), plain.targets(x_1), mixed)
    same(term, slow)


def test_a_similarity_is_recorded_for_a_loss() -> None:
    """One λ per sample, too: the criterion in its place gives one loss per sample."""
    model = build(Cosine)
    keys = list(model.state_dict())
    model.criterion = RecordingCriterion(
        model.criterion, calls=2, mixed_criterion=losses.NegativeCosine(reduction="none")
    )
    assert list(model.state_dict()) == keys
    x_1, x_2 = view_pairs()[0]
    same(model(x_1, x_2), build(Cosine)(x_1, x_2))
    mixed = mixmask.mix_batch(x_1, MASKS(N))
    term = model.criterion.mixed_loss(model.predictor(model.encoder(mixed.images)), mixed)
    targets = build(Cosine).encoder(x_2)
    slow = slow_mixed(slow_distance, model.predictor(model.encoder(mixed.images)), targets, mixed)
    same(term, slow)


def test_switch_and_several_mixtures_of_one_view() -> None:
    model = build(Contrastive)
    x_1, x_2 = view_pairs()[0]
    mixed = [draw(0, x_1), mixmask.mixup_batch(x_1)]
    z_mixed = [model.online(one.images) for one in mixed]
    k_2 = model.targets(x_2)
    inner = model.contrastive_loss
    for switch in (True, False):
        model.contrastive_loss = RecordingCriterion(inner, calls=2, switch=switch)
        model(x_1, x_2)
        term = model.contrastive_loss.mixed_loss(z_mixed, mixed, call=(0, 0))
        pairs = zip(z_mixed, mixed, strict=True)
        slow = [mixmask.lambda_weighted_loss(inner, z, k_2, one, switch=switch) for z, one in pairs]
        same(term, slow[0] + slow[1])


def test_a_matching_criterion_gets_the_clean_embeddings() -> None:
    z, target, z_mixed = torch.randn(3, N, C, dtype=torch.float64)
    z.requires_grad_()
    criterion = RecordingCriterion(losses.MatchedBarlowTwins())
    mixed = draw(0, torch.randn(N, 3, SIZE, SIZE))
    criterion(z, target)
    whole = mixmask.LambdaWeightedLoss(losses.MatchedBarlowTwins())
    same(criterion.mixed_loss(z_mixed, mixed), whole.mixed_loss(z_mixed, target, mixed, z=z))


def test_embeddings_of_a_loss_in_line() -> None:
    model, plain = build(Inline), build(Inline)
    criterion = record_embeddings(model.projector, losses.VICReg())
    assert list(model.state_dict()) == list(plain.state_dict())
    for step, (x_1, x_2) in enumerate(view_pairs()):
        mixed = [draw(step, x_1), draw(step, x_2)]
        loss = model(x_1, x_2) + criterion.mixed_loss(
            [model.embed(one.images) for one in mixed], mixed
        )
        z_1, z_2 = plain.embed(x_1), plain.embed(x_2)
        slow = losses.vicreg(z_1, z_2)
        for one, target in zip(mixed, (z_2, z_1), strict=True):
            z_mixed = plain.embed(one.images)
            slow = slow + mixmask.lambda_weighted_loss(losses.VICReg(), z_mixed, target, one)
        same(loss, slow)
        for total, network in ((loss, model), (slow, plain)):
            network.zero_grad()
            total.backward()
        same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_embeddings_by_the_branch_itself_step_after_step() -> None:
    model = build(Inline)
    criterion = record_embeddings(model.projector, losses.BarlowTwins())
    for step, (x_1, x_2) in enumerate(view_pairs()):
        model(x_1, x_2)
        assert criterion.mixed_loss(model.embed, draw(step, x_1)).isfinite()


class Augmenting(Pair):
    """As byol-pytorch: makes its views itself, and embeds both at once."""

    def __init__(self, augment: Any, again: Any = None) -> None:
        super().__init__()
        self.augment = augment
        self.again = augment if again is None else again
        self.criterion: Any = losses.NegativeCosine()

    def forward(self, x: Tensor) -> Tensor:
        views = torch.cat([self.augment(x), self.again(x)])
        p_1, p_2 = self.online(views).chunk(2)
        z_1, z_2 = self.targets(views).chunk(2)
        loss: Tensor = self.criterion(p_1, z_2) + self.criterion(p_2, z_1)
        return loss


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    "augment", [Noise(), lambda x: x + torch.randn_like(x)], ids=["module", "function"]
)
@pytest.mark.parametrize("calls", [1, 2])
def test_a_view_that_is_made_inside(augment: Any, calls: int) -> None:
    again = None if calls == 2 else Noise()
    torch.manual_seed(1)
    model: Any = Augmenting(augment, again).double()
    view: Any = RecordingView(augment, calls=calls)
    keys = list(model.state_dict())
    model.augment = view
    if calls == 2:
        model.again = view
    model.criterion = RecordingCriterion(model.criterion, calls=2)
    assert list(model.state_dict()) == keys
    x = view_pairs()[0][0]
    torch.manual_seed(0)
    model(x)
    torch.manual_seed(0)
    first = x + torch.randn_like(x)
    taken = view.take()
    same(taken, first, 0)
    mixed = draw(0, taken)
    assert model.criterion.mixed_loss(model.online, mixed).isfinite()
    with pytest.raises(ValueError, match="augmentation must have been called"):
        view.take()
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="augmentation must have been called"):
        view.take()
    model(x)
    with pytest.raises(ValueError, match="augmentation must be called"):
        model(x)


def test_evaluation_is_not_recorded() -> None:
    criterion = RecordingCriterion(losses.NegativeCosine())
    z, target = torch.randn(2, N, C)
    with torch.no_grad():
        criterion(z.requires_grad_(), target)
    criterion(z.detach(), target)
    with pytest.raises(ValueError, match="got 0 calls"):
        criterion.mixed_loss(z, draw(0, torch.randn(N, 3, SIZE, SIZE)))


def test_a_step_is_read_once_and_in_time() -> None:
    criterion = RecordingCriterion(losses.NegativeCosine(), calls=2)
    z, target = torch.randn(2, N, C)
    z.requires_grad_()
    mixed = draw(0, torch.randn(N, 3, SIZE, SIZE))
    criterion(z, target)
    with pytest.raises(ValueError, match="called 2 times since it was last read, got 1 calls"):
        criterion.mixed_loss(z, mixed)
    criterion(z, target)
    criterion(z, target)
    criterion.mixed_loss(z, mixed)
    with pytest.raises(ValueError, match="got 0 calls"):
        criterion.mixed_loss(z, mixed)
    criterion(z, target)
    criterion(z, target)
    with pytest.raises(ValueError, match="got one more before the last ones were taken"):
        criterion(z, target)
    criterion(z, target)
    criterion.reset()
    criterion(z, target)
    criterion(z, target)
    criterion.mixed_loss(z, mixed)


def test_nothing_of_a_step_is_kept() -> None:
    model = build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)
    x_1, x_2 = view_pairs()[0]
    hidden: list[Any] = []
    model.predictor.register_forward_hook(lambda *call: hidden.append(weakref.ref(call[2])))
    loss = model(x_1, x_2) + model.contrastive_loss.mixed_loss(model.online, draw(0, x_1))
    loss.backward()
    del loss
    gc.collect()
    assert [ref() for ref in hidden] == [None] * 3


@pytest.mark.parametrize("kind", [Contrastive, Cosine])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_record_on_their_own(kind: Any, copied: Callable[[Any], Any]) -> None:
    model = build(kind)
    name = "contrastive_loss" if kind is Contrastive else "criterion"
    instead = None if kind is Contrastive else losses.NegativeCosine()
    recording = RecordingCriterion(getattr(model, name), calls=2, mixed_criterion=instead)
    setattr(model, name, recording)
    x_1, x_2 = view_pairs()[0]
    model(x_1, x_2)
    other = copied(model)
    with pytest.raises(ValueError, match="got 0 calls"):
        getattr(other, name).mixed_loss(other.online, draw(0, x_1))
    loss = other(x_1, x_2)
    term = getattr(other, name).mixed_loss(other.online, draw(0, x_1))
    same(getattr(model, name).mixed_loss(model.online, draw(0, x_1)), term)
    (loss + term).backward()
    assert model.predictor.weight.grad is None
    assert other.predictor.weight.grad is not None


# Recording breaks the graph, where torch looks at tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, plain = build(Contrastive), build(Contrastive)
    for one in (model, plain):
        one.contrastive_loss = RecordingCriterion(one.contrastive_loss, calls=2)
    compiled = torch.compile(model, backend="eager")
    for step, (x_1, x_2) in enumerate(view_pairs()):
        losses_ = [
            call(x_1, x_2) + one.contrastive_loss.mixed_loss(one.online, draw(step, x_1))
            for call, one in ((compiled, model), (plain, plain))
        ]
        same(losses_[0], losses_[1])
        for loss in losses_:
            loss.backward()
    same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


WORLD = 2


class Gathering(Contrastive):
    """Contrasts with the keys of all processes, as MoCo v3 does."""

    def contrastive_loss(self, q: Tensor, k: Tensor) -> Tensor:
        everybody = F.normalize(gather_rows(k), dim=1)
        labels = torch.arange(len(q)) + rank() * len(q)
        return F.cross_entropy(F.normalize(q, dim=1) @ everybody.T / 0.3, labels)


def _halves() -> list[tuple[Tensor, Tensor]]:
    """Two views by process."""
    return view_pairs()[:WORLD]


def _work(process: int) -> list[Any]:
    """Take one step in one of two processes; return its loss and gradients."""
    results = []
    for unused in (False, True):
        model = build(Gathering)
        model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        x_1, x_2 = _halves()[process]
        loss = ddp(x_1, x_2) + model.contrastive_loss.mixed_loss(model.online, draw(0, x_1))
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters() if p.requires_grad]))
    return results


def test_two_processes(tmp_path: Path) -> None:
    found = run_in_processes(_work, tmp_path, WORLD)
    models = [build(Gathering) for _ in range(WORLD)]
    pairs = list(zip(models, _halves(), strict=True))
    keys = [torch.cat([model.targets(views[i]) for model, views in pairs]) for i in range(2)]
    slow = []
    for process, (model, (x_1, x_2)) in enumerate(pairs):
        own = slice(process * N, (process + 1) * N)
        mixed = draw(0, x_1)
        q_1, q_2, q_mixed = (model.online(x) for x in (x_1, x_2, mixed.images))
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(N):
            loss = loss + slow_contrast(q_1[i], keys[1][own][i], keys[1]) / N
            loss = loss + slow_contrast(q_2[i], keys[0][own][i], keys[0]) / N
            partner = keys[1][own][int(mixed.partner[i])]
            near, far = (
                slow_contrast(q_mixed[i], key, keys[1]) / N for key in (keys[1][own][i], partner)
            )
            loss = loss + mixed.lam * near + (1 - mixed.lam) * far
        trained = [p for p in model.parameters() if p.requires_grad]
        slow.append((loss.item(), torch.autograd.grad(loss, trained)))
    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*(g for _, g in slow), strict=True)]
    for process, results in enumerate(found):
        for loss, gradients in results:
            same(loss, slow[process][0])
            same(gradients, mean)
