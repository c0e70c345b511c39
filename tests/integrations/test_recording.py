"""Models with their loss in forward, recorded, beside the same losses written out slowly."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from torch import Tensor, nn

import mixmask
from mixmask import MixedBatch, RecordingCriterion, losses
from mixmask._distributed import gather_rows, rank
from mixmask.integrations.recording import RecordingView, record_embeddings

N, C, SIZE, STEPS = 6, 5, 8, 3
MASKS = mixmask.BlockMaskGenerator(4, 0.4)


def _network() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, C)
    )


class Pair(nn.Module):
    """An online branch with a predictor, its momentum copy, and a loss in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _network()
        self.predictor = nn.Linear(C, C)
        self.momentum = copy.deepcopy(self.encoder).requires_grad_(False)

    def online(self, x: Tensor) -> Tensor:
        p: Tensor = self.predictor(self.encoder(x))
        return p

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        z: Tensor = self.momentum(x)
        return z


class Contrastive(Pair):
    """As MoCo v3: symmetric, the loss a method."""

    def contrastive_loss(self, q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        return F.cross_entropy(logits / 0.3, torch.arange(len(q)))

    def forward(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        q_1, q_2 = self.online(x_1), self.online(x_2)
        k_1, k_2 = self.targets(x_1), self.targets(x_2)
        return self.contrastive_loss(q_1, k_2) + self.contrastive_loss(q_2, k_1)


class Cosine(Pair):
    """As SimSiam: the loss a module, of the wrong sign, halved."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion: Any = nn.CosineSimilarity(dim=1)

    def forward(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        z_1, z_2 = self.encoder(x_1), self.encoder(x_2)
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        loss: Tensor = self.criterion(p_1, z_2.detach()) + self.criterion(p_2, z_1.detach())
        return -loss.mean() / 2


def _slow_contrast(q: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    near = torch.stack([F.cosine_similarity(q, k, dim=0) for k in (key, *keys)]) / 0.3
    loss: Tensor = near[1:].logsumexp(dim=0) - near[0]
    return loss


def _slow_distance(p: Tensor, z: Tensor, zs: Tensor) -> Tensor:
    del zs
    return -F.cosine_similarity(p, z, dim=0)


def _slow_mixed(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    z_mixed: Tensor,
    targets: Tensor,
    mixed: MixedBatch,
) -> Tensor:
    """Eq. 4, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for i, z in enumerate(z_mixed):
        lam, j = mixed.lam.expand(N)[i].double(), int(mixed.partner[i])
        total = total + lam * loss(z, targets[i], targets) / N
        total = total + (1 - lam) * loss(z, targets[j], targets) / N
    return total


def _views() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(STEPS, 2, N, 3, SIZE, SIZE, generator=generator).double()
    return [(x[0], x[1]) for x in images]


def _build(kind: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return kind().double()


def _same(ours: Any, slow: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, slow, rtol=tolerance, atol=tolerance)


def _draw(step: int, x: Tensor) -> MixedBatch:
    return mixmask.mix_batch(x, MASKS, generator=torch.Generator().manual_seed(step))


def _train(model: Any, step_loss: Callable[[int, Tensor, Tensor], Tensor]) -> list[Any]:
    optimizer, done = torch.optim.SGD(model.parameters(), 0.1), []
    for step, (x_1, x_2) in enumerate(_views()):
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
    model, plain = _build(Contrastive), _build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)

    def ours(step: int, x_1: Tensor, x_2: Tensor) -> Tensor:
        mixed = [_draw(step, x) for x in ((x_1, x_2) if both else (x_1,))]
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
                loss = loss + _slow_contrast(row, key, k) / N
        for x, k in ((x_1, targets[1]), (x_2, targets[0]))[: 1 + both]:
            mixed = _draw(step, x)
            loss = loss + _slow_mixed(_slow_contrast, plain.online(mixed.images), k, mixed)
        return loss

    _same(_train(model, ours), _train(plain, slow))
    _same(dict(model.state_dict()), dict(plain.state_dict()))


def test_a_mixed_view_of_the_second_view_belongs_to_the_second_call() -> None:
    model, plain = _build(Contrastive), _build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)
    (x_1, x_2), mixed = _views()[0], _draw(0, _views()[0][1])
    model(x_1, x_2)
    term = model.contrastive_loss.mixed_loss(model.online, mixed, call=1)
    for x in (x_1, x_2):
        plain.online(x)
    slow = _slow_mixed(_slow_contrast, plain.online(mixed.images), plain.targets(x_1), mixed)
    _same(term, slow)


def test_a_similarity_is_recorded_for_a_loss() -> None:
    """One λ per sample, too: the criterion in its place gives one loss per sample."""
    model = _build(Cosine)
    keys = list(model.state_dict())
    model.criterion = RecordingCriterion(
        model.criterion, calls=2, mixed_criterion=losses.NegativeCosine(reduction="none")
    )
    assert list(model.state_dict()) == keys
    x_1, x_2 = _views()[0]
    _same(model(x_1, x_2), _build(Cosine)(x_1, x_2))
    mixed = mixmask.mix_batch(x_1, MASKS(N))
    term = model.criterion.mixed_loss(model.predictor(model.encoder(mixed.images)), mixed)
    targets = _build(Cosine).encoder(x_2)
    slow = _slow_mixed(_slow_distance, model.predictor(model.encoder(mixed.images)), targets, mixed)
    _same(term, slow)


def test_switch_and_several_mixtures_of_one_view() -> None:
    model = _build(Contrastive)
    x_1, x_2 = _views()[0]
    mixed = [_draw(0, x_1), mixmask.mixup_batch(x_1)]
    z_mixed = [model.online(one.images) for one in mixed]
    k_2 = model.targets(x_2)
    inner = model.contrastive_loss
    for switch in (True, False):
        model.contrastive_loss = RecordingCriterion(inner, calls=2, switch=switch)
        model(x_1, x_2)
        term = model.contrastive_loss.mixed_loss(z_mixed, mixed, call=(0, 0))
        pairs = zip(z_mixed, mixed, strict=True)
        slow = [mixmask.lambda_weighted_loss(inner, z, k_2, one, switch=switch) for z, one in pairs]
        _same(term, slow[0] + slow[1])


def test_a_matching_criterion_gets_the_clean_embeddings() -> None:
    z, target, z_mixed = torch.randn(3, N, C, dtype=torch.float64)
    z.requires_grad_()
    criterion = RecordingCriterion(losses.MatchedBarlowTwins())
    mixed = _draw(0, torch.randn(N, 3, SIZE, SIZE))
    criterion(z, target)
    whole = mixmask.LambdaWeightedLoss(losses.MatchedBarlowTwins())
    _same(criterion.mixed_loss(z_mixed, mixed), whole.mixed_loss(z_mixed, target, mixed, z=z))


class Bank(nn.Module):
    """A criterion with a memory bank, which each call fills, and a pointer in an attribute."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.randn(4, C))
        self.weight = nn.Parameter(torch.ones(C))
        self.at = 0

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        negative = (z * self.weight) @ self.bank.clone().T
        near = torch.cat([(z * target).sum(dim=1, keepdim=True), negative], dim=1)
        self.bank[self.at] = target[0].detach()
        self.at = (self.at + 1) % 4
        return F.cross_entropy(near, torch.zeros(len(z), dtype=torch.long))


def test_the_mixed_term_sees_the_state_that_the_clean_one_saw() -> None:
    inner = _build(Bank)
    criterion: Any = RecordingCriterion(inner)
    z, target, z_mixed = torch.randn(3, N, C, dtype=torch.float64)
    z.requires_grad_()
    mixed = _draw(0, torch.randn(N, 3, SIZE, SIZE))
    before, plain = copy.deepcopy(inner), copy.deepcopy(inner)
    criterion(z, target)
    plain(z, target)
    term = criterion.mixed_loss(z_mixed, mixed)

    def sheltered(rows: Tensor, keys: Tensor) -> Tensor:
        loss: Tensor = copy.deepcopy(before)(rows, keys)
        return loss

    exact = mixmask.lambda_weighted_loss(sheltered, z_mixed, target, mixed)
    _same(term, exact)
    assert (mixmask.lambda_weighted_loss(plain, z_mixed, target, mixed) - exact).abs() > 1e-3
    # The clean call alone has moved it.
    assert (inner.at, criterion.at) == (1, 1)
    term.backward()
    assert inner.weight.grad is not None


class Inline(nn.Module):
    """As Barlow Twins and VICReg: the loss in line."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _network()
        self.projector = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C))

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.projector(self.backbone(x))
        return z

    def forward(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        z_1, z_2 = self.embed(x_1), self.embed(x_2)
        return losses.vicreg(z_1, z_2)


def test_embeddings_of_a_loss_in_line() -> None:
    model, plain = _build(Inline), _build(Inline)
    criterion = record_embeddings(model.projector, losses.VICReg())
    assert list(model.state_dict()) == list(plain.state_dict())
    for step, (x_1, x_2) in enumerate(_views()):
        mixed = [_draw(step, x_1), _draw(step, x_2)]
        loss = model(x_1, x_2) + criterion.mixed_loss(
            [model.embed(one.images) for one in mixed], mixed
        )
        z_1, z_2 = plain.embed(x_1), plain.embed(x_2)
        slow = losses.vicreg(z_1, z_2)
        for one, target in zip(mixed, (z_2, z_1), strict=True):
            z_mixed = plain.embed(one.images)
            slow = slow + mixmask.lambda_weighted_loss(losses.VICReg(), z_mixed, target, one)
        _same(loss, slow)
        for total, network in ((loss, model), (slow, plain)):
            network.zero_grad()
            total.backward()
        _same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_embeddings_by_the_branch_itself_step_after_step() -> None:
    model = _build(Inline)
    criterion = record_embeddings(model.projector, losses.BarlowTwins())
    for step, (x_1, x_2) in enumerate(_views()):
        model(x_1, x_2)
        assert criterion.mixed_loss(model.embed, _draw(step, x_1)).isfinite()


def test_embeddings_of_a_forgotten_step_are_refused() -> None:
    model = _build(Inline)
    criterion = record_embeddings(model.projector, losses.VICReg())
    x_1, x_2 = _views()[0]
    mixed = _draw(0, x_1)
    model(x_1, x_2)
    model(x_2, x_1)
    with pytest.raises(ValueError, match="got 5 calls; take mixed_loss in every step"):
        criterion.mixed_loss(model.embed(mixed.images), mixed)
    with torch.no_grad():
        model(x_2, x_1)
    model(x_1, x_2)
    criterion.mixed_loss(model.embed(mixed.images), mixed)
    with pytest.raises(ValueError, match="got 1 calls"):
        criterion.mixed_loss(model.embed(mixed.images), mixed)
    copy.deepcopy(model)(x_1, x_2)


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
    x = _views()[0][0]
    torch.manual_seed(0)
    model(x)
    torch.manual_seed(0)
    first = x + torch.randn_like(x)
    taken = view.take()
    _same(taken, first, 0)
    mixed = _draw(0, taken)
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
        criterion.mixed_loss(z, _draw(0, torch.randn(N, 3, SIZE, SIZE)))


def test_a_step_is_read_once_and_in_time() -> None:
    criterion = RecordingCriterion(losses.NegativeCosine(), calls=2)
    z, target = torch.randn(2, N, C)
    z.requires_grad_()
    mixed = _draw(0, torch.randn(N, 3, SIZE, SIZE))
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
    model = _build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)
    x_1, x_2 = _views()[0]
    hidden: list[Any] = []
    model.predictor.register_forward_hook(lambda *call: hidden.append(weakref.ref(call[2])))
    loss = model(x_1, x_2) + model.contrastive_loss.mixed_loss(model.online, _draw(0, x_1))
    loss.backward()
    del loss
    gc.collect()
    assert [ref() for ref in hidden] == [None] * 3


@pytest.mark.parametrize("kind", [Contrastive, Cosine])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_record_on_their_own(kind: Any, copied: Callable[[Any], Any]) -> None:
    model = _build(kind)
    name = "contrastive_loss" if kind is Contrastive else "criterion"
    instead = None if kind is Contrastive else losses.NegativeCosine()
    recording = RecordingCriterion(getattr(model, name), calls=2, mixed_criterion=instead)
    setattr(model, name, recording)
    x_1, x_2 = _views()[0]
    model(x_1, x_2)
    other = copied(model)
    with pytest.raises(ValueError, match="got 0 calls"):
        getattr(other, name).mixed_loss(other.online, _draw(0, x_1))
    loss = other(x_1, x_2)
    term = getattr(other, name).mixed_loss(other.online, _draw(0, x_1))
    _same(getattr(model, name).mixed_loss(model.online, _draw(0, x_1)), term)
    (loss + term).backward()
    assert model.predictor.weight.grad is None
    assert other.predictor.weight.grad is not None


# Recording breaks the graph, where torch looks at tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, plain = _build(Contrastive), _build(Contrastive)
    for one in (model, plain):
        one.contrastive_loss = RecordingCriterion(one.contrastive_loss, calls=2)
    compiled = torch.compile(model, backend="eager")
    for step, (x_1, x_2) in enumerate(_views()):
        losses_ = [
            call(x_1, x_2) + one.contrastive_loss.mixed_loss(one.online, _draw(step, x_1))
            for call, one in ((compiled, model), (plain, plain))
        ]
        _same(losses_[0], losses_[1])
        for loss in losses_:
            loss.backward()
    _same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_module_in_its_place_moves_with_the_model() -> None:
    model = nn.Module()
    model.criterion = RecordingCriterion(Bank())  # type: ignore[assignment]
    criterion: Any = model.criterion
    assert list(model.state_dict()) == ["criterion.weight", "criterion.bank"]
    model.double().eval()
    assert criterion.criterion.bank.dtype == criterion.criterion.weight.dtype == torch.float64
    assert not criterion.criterion.training
    model.train()
    assert criterion.criterion.training


def _contrast(z: Tensor, target: Tensor, bank: Tensor) -> Tensor:
    near = torch.cat([(z * target).sum(dim=1, keepdim=True), z @ bank.T], dim=1)
    return F.cross_entropy(near, torch.zeros(len(z), dtype=torch.long))


def _fill(bank: Tensor, target: Tensor) -> Tensor:
    return torch.cat([bank, target.detach()])[len(target) :]


def _first_bank() -> Tensor:
    return torch.randn(2 * N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


class Plain:
    """Fills its bank when called: rebound, or as a list in place."""

    def __init__(self) -> None:
        self.bank, self.rows = _first_bank(), [_first_bank()]

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        loss, self.bank = _contrast(z, target, self.bank), _fill(self.bank, target)
        return loss

    def of_list(self, z: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
        loss = _contrast(scale * z, target, self.rows[0])
        self.rows[0] = _fill(self.rows[0], target)
        return loss


def _enclosing() -> Callable[[Tensor, Tensor], Tensor]:
    bank, pointer = _first_bank(), 0

    def loss(z: Tensor, target: Tensor) -> Tensor:
        nonlocal pointer
        value = _contrast(z, target, bank.clone())
        bank[torch.arange(pointer, pointer + N) % len(bank)] = target.detach()
        pointer += N
        return value

    return loss


class Filling(nn.Module):
    """The loss reads the model's bank; forward fills it afterwards."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(C, C)
        self.register_buffer("bank", _first_bank())

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return _contrast(z, target, self.bank)

    def forward(self, x: Tensor, target: Tensor) -> Any:
        loss = self.loss(self.encoder(x), target)
        self.bank = _fill(self.bank, target)
        return loss


class FillingInPlace(Filling):
    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return _contrast(z, target, self.bank.clone())

    def forward(self, x: Tensor, target: Tensor) -> Any:
        loss = self.loss(self.encoder(x), target)
        self.bank.copy_(_fill(self.bank, target))
        return loss


class Calling(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.encoder, self.loss = nn.Linear(C, C), loss

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self.encoder(x), target)


class Lazy(nn.Module):
    """Makes its bank when it is first called."""

    bank: Tensor

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        if not hasattr(self, "bank"):
            self.register_buffer("bank", _first_bank())
        loss, self.bank = _contrast(z, target, self.bank), _fill(self.bank, target)
        return loss


def _with_info_nce(kind: type[Filling]) -> Any:
    model: Any = kind()
    # InfoNCE takes what it needs of the queue when called, so that it may be written afterwards.
    model.loss = losses.InfoNCE(lambda: model.bank, 1.0)
    return model


STATEFUL: dict[str, Callable[[], Any]] = {
    "object": lambda: Calling(Plain()),
    "method": lambda: Calling(Plain().of_list),
    "partial": lambda: Calling(partial(Plain().of_list, scale=1.0)),
    "function": lambda: Calling(_enclosing()),
    "function around a function": lambda: Calling(
        (lambda inner: lambda z, target: inner(z, target))(_enclosing())
    ),
    "made late": lambda: Calling(Lazy()),
    "model's bank, rebound": Filling,
    "model's bank, in place": FillingInPlace,
    "function in a criterion, rebound": lambda: _with_info_nce(Filling),
    "function in a criterion, in place": lambda: _with_info_nce(FillingInPlace),
}


@pytest.mark.parametrize("build", STATEFUL.values(), ids=STATEFUL)
def test_any_criterion_is_called_with_the_state_of_the_clean_call(
    build: Callable[[], Any],
) -> None:
    """And the bank is filled once per step, by the clean targets."""
    torch.manual_seed(1)
    model, bank = build().double(), _first_bank()
    model.loss = RecordingCriterion(model.loss)
    for step in range(STEPS):
        x, target = torch.randn(2, N, C, dtype=torch.float64)
        mixed = _draw(step, torch.randn(N, 3, SIZE, SIZE))
        loss = model(x, target) + model.loss.mixed_loss(model.encoder(2 * x), mixed)
        criterion = partial(_contrast, bank=bank)
        slow = criterion(model.encoder(x), target) + mixmask.lambda_weighted_loss(
            criterion, model.encoder(2 * x), target, mixed
        )
        _same(loss, slow)
        _same(
            torch.autograd.grad(loss, [*model.encoder.parameters()]),
            torch.autograd.grad(slow, [*model.encoder.parameters()]),
        )
        bank = _fill(bank, target)
    if isinstance(model.loss, nn.Module):
        assert list(model.loss.state_dict()) == ["bank"]
        _same(model.loss.bank, bank)


class Logits(Filling):
    """As MoCo re-implementations: the inner function makes logits, which are no loss."""

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return torch.cat([(z * target).sum(dim=1, keepdim=True), z @ self.bank.T], dim=1)


def test_the_queue_of_another_criterion_is_read_at_the_clean_call() -> None:
    model: Any = Logits().double()
    instead = losses.InfoNCE(lambda: model.bank, 1.0)
    model.loss = RecordingCriterion(model.loss, mixed_criterion=instead)
    x, target = torch.randn(2, N, C, dtype=torch.float64)
    mixed = _draw(0, torch.randn(N, 3, SIZE, SIZE))
    model(x, target)
    before = losses.InfoNCE(_first_bank(), 1.0)
    z_mixed = model.encoder(2 * x)
    slow = mixmask.lambda_weighted_loss(before, z_mixed, target, mixed)
    _same(model.loss.mixed_loss(z_mixed, mixed), slow)


def test_what_a_method_does_not_mention_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss)
    cloned: list[Tensor] = []
    clone = Tensor.clone

    def counted(self: Tensor, **options: Any) -> Tensor:
        cloned.append(self)
        return clone(self, **options)

    monkeypatch.setattr(Tensor, "clone", counted)
    z, target = torch.randn(2, N, C)
    model.contrastive_loss(z.requires_grad_(), target)
    model.contrastive_loss.mixed_loss(z, _draw(0, torch.randn(N, 3, SIZE, SIZE)))
    assert not any(tensor.data_ptr() == p.data_ptr() for tensor in cloned for p in model.buffers())


def _scaled(z: Tensor, target: Tensor, scale: float = 1.0, *, power: float = 1.0) -> Tensor:
    return scale * (z - target).abs().pow(power).mean()


WAYS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "by position": lambda loss, z, t: loss(z, t, 3.0, power=2.0),
    "by name": lambda loss, z, t: loss(z, t, scale=3.0, power=2.0),
    "all by name": lambda loss, z, t: loss(target=t, power=2.0, z=z, scale=3.0),
    "one by name": lambda loss, z, t: loss(z, target=t, scale=3.0, power=2.0),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_further_arguments_reach_the_mixed_term(way: Callable[[Any, Tensor, Tensor], Any]) -> None:
    z, target, z_mixed = torch.randn(3, N, C, dtype=torch.float64)
    z.requires_grad_()
    mixed, criterion = _draw(0, torch.randn(N, 3, SIZE, SIZE)), RecordingCriterion(_scaled)
    _same(way(criterion, z, target), _scaled(z, target, 3.0, power=2.0))
    exact = partial(_scaled, scale=3.0, power=2.0)
    slow = mixmask.lambda_weighted_loss(exact, z_mixed, target, mixed)
    _same(criterion.mixed_loss(z_mixed, mixed), slow)


def test_arguments_that_have_no_name_are_refused() -> None:
    def loss(*rows: Tensor) -> Tensor:
        return _scaled(rows[0], rows[1])

    z = torch.randn(3, N, C, requires_grad=True)
    with pytest.raises(TypeError, match="name those after the first two in forward"):
        RecordingCriterion(loss)(*z)
    with pytest.raises(TypeError, match="must take two tensors first"):
        RecordingCriterion(F.mse_loss)([z[0]], z[1])


class Distance(nn.CosineSimilarity):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return -super().forward(x1, x2)


class Classes(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input @ target.T, torch.arange(len(input)))


@pytest.mark.parametrize("criterion", [Distance(), Classes()], ids=["distance", "classes"])
def test_losses_made_of_others_are_accepted(criterion: Any) -> None:
    z, target = torch.randn(2, N, C)
    mixed, recording = _draw(0, torch.randn(N, 3, SIZE, SIZE)), RecordingCriterion(criterion)
    recording(z.requires_grad_(), target)
    slow = mixmask.lambda_weighted_loss(criterion, 2 * z, target, mixed)
    _same(recording.mixed_loss(2 * z, mixed), slow, 1e-6)


@pytest.mark.parametrize(
    "criterion",
    [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits],
    ids=["module", "function"],
)
def test_losses_of_probabilities_are_refused_with_embeddings(criterion: Any) -> None:
    z, target = torch.randn(2, N, C)
    recording = RecordingCriterion(criterion)
    recording(z.requires_grad_(), target)
    with pytest.raises(ValueError, match="look like embeddings"):
        recording.mixed_loss(z, _draw(0, torch.randn(N, 3, SIZE, SIZE)))


@pytest.mark.parametrize("after", [lambda z: z, lambda z: F.normalize(z, dim=1), lambda z: z[:]])
@pytest.mark.parametrize("at", [0, 1])
def test_a_mixed_view_embedded_before_a_clean_one_is_refused(
    at: int, after: Callable[[Tensor], Tensor]
) -> None:
    model = _build(Inline)
    criterion = record_embeddings(model.projector, losses.VICReg())
    x_1, x_2 = _views()[0]
    mixed = _draw(0, x_1)
    z = [model.embed(x) for x in [*(x_1, x_2)[:at], mixed.images, *(x_1, x_2)[at:]]]
    with pytest.raises(ValueError, match="call the model before the mixed images"):
        criterion.mixed_loss(after(z[at]), mixed)
    z = [model.embed(x) for x in (x_1, x_2, mixed.images)]
    assert criterion.mixed_loss(after(z[2]), mixed).isfinite()


def test_embeddings_meet_the_queue_of_the_clean_views() -> None:
    bank = _first_bank()
    model = _build(Inline)
    criterion = record_embeddings(model.projector, losses.InfoNCE(lambda: bank, 1.0))
    x_1, x_2 = _views()[0]
    mixed, first = _draw(0, x_1), bank
    model(x_1, x_2)
    bank = bank + 1
    plain = _build(Inline)
    plain.embed(x_1)
    slow = mixmask.lambda_weighted_loss(
        losses.InfoNCE(first, 1.0), plain.embed(mixed.images), plain.embed(x_2), mixed
    )
    _same(criterion.mixed_loss(model.embed, mixed), slow, 1e-9)


def test_a_name_that_was_imported_elsewhere_and_replicas_are_named_where_nothing_came() -> None:
    criterion = RecordingCriterion(F.mse_loss, calls=2)
    z, mixed = torch.randn(N, C), _draw(0, torch.randn(N, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match="replace the name in the module that calls it"):
        criterion.mixed_loss(z, mixed)
    for _ in range(2):
        criterion(z.requires_grad_(), z)
    with pytest.raises(ValueError, match=r"nn\.DataParallel, .* is not supported"):
        criterion(z, z)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a similarity": (
        lambda: RecordingCriterion(nn.CosineSimilarity()),
        TypeError,
        "NegativeCosine",
    ),
    "of logits": (lambda: RecordingCriterion(nn.CrossEntropyLoss()), TypeError, "takes logits"),
    "no criterion": (lambda: RecordingCriterion(0.1), TypeError, "got float"),  # type: ignore[arg-type]
    "no calls": (lambda: RecordingCriterion(F.mse_loss, calls=0), ValueError, "at least 1, got 0"),
    "half a call": (
        lambda: RecordingCriterion(F.mse_loss, calls=1.5),  # type: ignore[arg-type]
        TypeError,
        "must be an integer",
    ),
    "no module": (
        lambda: record_embeddings(partial(int), losses.VICReg()),  # type: ignore[arg-type]
        TypeError,
        r"pass model\.projector",
    ),
    "no augmentation": (lambda: RecordingView(None), TypeError, "got NoneType"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_labels_are_no_targets() -> None:
    criterion = RecordingCriterion(F.cross_entropy)
    with pytest.raises(TypeError, match="not the cross-entropy of its logits"):
        criterion(torch.randn(N, C, requires_grad=True), torch.zeros(N, dtype=torch.long))


MISFITS: dict[str, tuple[Any, Any, Any, str]] = {
    "one embedding for two": (torch.randn(N, C), [0, 0], None, "got 1, 2 and 2"),
    "a call that is not": (torch.randn(N, C), 0, 2, r"must name the calls 0 ... 1, got \[2\]"),
    "other sizes": (torch.randn(N + 1, C), 0, None, "one row for each of the 6 mixed images"),
}


@pytest.mark.parametrize(("z", "records", "call", "text"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_belong_together_is_refused(
    z: Tensor, records: Any, call: Any, text: str
) -> None:
    mixed = _draw(0, torch.randn(N, 3, SIZE, SIZE))
    criterion = RecordingCriterion(losses.NegativeCosine(), calls=2)
    for _ in range(2):
        criterion(torch.randn(N, C, requires_grad=True), torch.randn(N, C))
    with pytest.raises(ValueError, match=text):
        criterion.mixed_loss(z, [mixed] * 2 if isinstance(records, list) else mixed, call=call)


WORLD = 2


class Gathering(Contrastive):
    """Contrasts with the keys of all processes, as MoCo v3 does."""

    def contrastive_loss(self, q: Tensor, k: Tensor) -> Tensor:
        everybody = F.normalize(gather_rows(k), dim=1)
        labels = torch.arange(len(q)) + rank() * len(q)
        return F.cross_entropy(F.normalize(q, dim=1) @ everybody.T / 0.3, labels)


def _halves() -> list[tuple[Tensor, Tensor]]:
    """Two views by process."""
    return _views()[:WORLD]


def _work(process: int) -> list[Any]:
    """Take one step in one of two processes; return its loss and gradients."""
    results = []
    for unused in (False, True):
        model = _build(Gathering)
        model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        x_1, x_2 = _halves()[process]
        loss = ddp(x_1, x_2) + model.contrastive_loss.mixed_loss(model.online, _draw(0, x_1))
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters() if p.requires_grad]))
    return results


def test_two_processes(tmp_path: Path) -> None:
    found = run_in_processes(_work, tmp_path, WORLD)
    models = [_build(Gathering) for _ in range(WORLD)]
    pairs = list(zip(models, _halves(), strict=True))
    keys = [torch.cat([model.targets(views[i]) for model, views in pairs]) for i in range(2)]
    slow = []
    for process, (model, (x_1, x_2)) in enumerate(pairs):
        own = slice(process * N, (process + 1) * N)
        mixed = _draw(0, x_1)
        q_1, q_2, q_mixed = (model.online(x) for x in (x_1, x_2, mixed.images))
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(N):
            loss = loss + _slow_contrast(q_1[i], keys[1][own][i], keys[1]) / N
            loss = loss + _slow_contrast(q_2[i], keys[0][own][i], keys[0]) / N
            partner = keys[1][own][int(mixed.partner[i])]
            near, far = (
                _slow_contrast(q_mixed[i], key, keys[1]) / N for key in (keys[1][own][i], partner)
            )
            loss = loss + mixed.lam * near + (1 - mixed.lam) * far
        trained = [p for p in model.parameters() if p.requires_grad]
        slow.append((loss.item(), torch.autograd.grad(loss, trained)))
    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*(g for _, g in slow), strict=True)]
    for process, results in enumerate(found):
        for loss, gradients in results:
            _same(loss, slow[process][0])
            _same(gradients, mean)
