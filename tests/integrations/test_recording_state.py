"""What a recorded criterion remembers and is given, at the clean call and for the mixed term."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_models import (
    SIZE,
    STEPS,
    C,
    Contrastive,
    Inline,
    N,
    build,
    contrast,
    draw,
    fill,
    first_bank,
    same,
    scaled,
    view_pairs,
)
from torch import Tensor, nn

import mixmask
from mixmask import RecordingCriterion, losses
from mixmask.integrations.recording import record_embeddings


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
    inner = build(Bank)
    criterion: Any = RecordingCriterion(inner)
    z, target, z_mixed = torch.randn(3, N, C, dtype=torch.float64)
    z.requires_grad_()
    mixed = draw(0, torch.randn(N, 3, SIZE, SIZE))
    before, plain = copy.deepcopy(inner), copy.deepcopy(inner)
    criterion(z, target)
    plain(z, target)
    term = criterion.mixed_loss(z_mixed, mixed)

    def sheltered(rows: Tensor, keys: Tensor) -> Tensor:
        loss: Tensor = copy.deepcopy(before)(rows, keys)
        return loss

    exact = mixmask.lambda_weighted_loss(sheltered, z_mixed, target, mixed)
    same(term, exact)
    assert (mixmask.lambda_weighted_loss(plain, z_mixed, target, mixed) - exact).abs() > 1e-3
    # The clean call alone has moved it.
    assert (inner.at, criterion.at) == (1, 1)
    term.backward()
    assert inner.weight.grad is not None


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


class Plain:
    """Fills its bank when called: rebound, or as a list in place."""

    def __init__(self) -> None:
        self.bank, self.rows = first_bank(), [first_bank()]

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        loss, self.bank = contrast(z, target, self.bank), fill(self.bank, target)
        return loss

    def of_list(self, z: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
        loss = contrast(scale * z, target, self.rows[0])
        self.rows[0] = fill(self.rows[0], target)
        return loss


def _enclosing() -> Callable[[Tensor, Tensor], Tensor]:
    bank, pointer = first_bank(), 0

    def loss(z: Tensor, target: Tensor) -> Tensor:
        nonlocal pointer
        value = contrast(z, target, bank.clone())
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
        self.register_buffer("bank", first_bank())

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return contrast(z, target, self.bank)

    def forward(self, x: Tensor, target: Tensor) -> Any:
        loss = self.loss(self.encoder(x), target)
        self.bank = fill(self.bank, target)
        return loss


class FillingInPlace(Filling):
    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return contrast(z, target, self.bank.clone())

    def forward(self, x: Tensor, target: Tensor) -> Any:
        loss = self.loss(self.encoder(x), target)
        self.bank.copy_(fill(self.bank, target))
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
            self.register_buffer("bank", first_bank())
        loss, self.bank = contrast(z, target, self.bank), fill(self.bank, target)
        return loss


def _decorate(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


class Decorated(nn.Module):
    """The bank is a child's, which only the function inside the decorator mentions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.memory = nn.Linear(C, C), Lazy()

    @_decorate
    def loss(self, z: Tensor, target: Tensor) -> Any:
        return self.memory(z, target)

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self.encoder(x), target)


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
    "decorated method": Decorated,
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
    model, bank = build().double(), first_bank()
    model.loss = RecordingCriterion(model.loss)
    for step in range(STEPS):
        x, target = torch.randn(2, N, C, dtype=torch.float64)
        mixed = draw(step, torch.randn(N, 3, SIZE, SIZE))
        loss = model(x, target) + model.loss.mixed_loss(model.encoder(2 * x), mixed)
        criterion = partial(contrast, bank=bank)
        slow = criterion(model.encoder(x), target) + mixmask.lambda_weighted_loss(
            criterion, model.encoder(2 * x), target, mixed
        )
        same(loss, slow)
        same(
            torch.autograd.grad(loss, [*model.encoder.parameters()]),
            torch.autograd.grad(slow, [*model.encoder.parameters()]),
        )
        bank = fill(bank, target)
    if isinstance(model.loss, nn.Module):
        assert list(model.loss.state_dict()) == ["bank"]
        same(model.loss.bank, bank)


class Logits(Filling):
    """As MoCo re-implementations: the inner function makes logits, which are no loss."""

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return torch.cat([(z * target).sum(dim=1, keepdim=True), z @ self.bank.T], dim=1)


def test_the_queue_of_another_criterion_is_read_at_the_clean_call() -> None:
    model: Any = Logits().double()
    instead = losses.InfoNCE(lambda: model.bank, 1.0)
    model.loss = RecordingCriterion(model.loss, mixed_criterion=instead)
    x, target = torch.randn(2, N, C, dtype=torch.float64)
    mixed = draw(0, torch.randn(N, 3, SIZE, SIZE))
    model(x, target)
    before = losses.InfoNCE(first_bank(), 1.0)
    z_mixed = model.encoder(2 * x)
    slow = mixmask.lambda_weighted_loss(before, z_mixed, target, mixed)
    same(model.loss.mixed_loss(z_mixed, mixed), slow)


def test_what_a_method_does_not_mention_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Contrastive)
    model.contrastive_loss = RecordingCriterion(model.contrastive_loss)
    cloned: list[Tensor] = []
    clone = Tensor.clone

    def counted(self: Tensor, **options: Any) -> Tensor:
        cloned.append(self)
        return clone(self, **options)

    monkeypatch.setattr(Tensor, "clone", counted)
    z, target = torch.randn(2, N, C)
    model.contrastive_loss(z.requires_grad_(), target)
    model.contrastive_loss.mixed_loss(z, draw(0, torch.randn(N, 3, SIZE, SIZE)))
    assert not any(tensor.data_ptr() == p.data_ptr() for tensor in cloned for p in model.buffers())


def test_embeddings_meet_the_queue_of_the_clean_views() -> None:
    bank = first_bank()
    model = build(Inline)
    criterion = record_embeddings(model.projector, losses.InfoNCE(lambda: bank, 1.0))
    x_1, x_2 = view_pairs()[0]
    mixed, first = draw(0, x_1), bank
    model(x_1, x_2)
    bank = bank + 1
    plain = build(Inline)
    plain.embed(x_1)
    slow = mixmask.lambda_weighted_loss(
        losses.InfoNCE(first, 1.0), plain.embed(mixed.images), plain.embed(x_2), mixed
    )
    same(criterion.mixed_loss(model.embed, mixed), slow, 1e-9)


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
    mixed, criterion = draw(0, torch.randn(N, 3, SIZE, SIZE)), RecordingCriterion(scaled)
    same(way(criterion, z, target), scaled(z, target, 3.0, power=2.0))
    exact = partial(scaled, scale=3.0, power=2.0)
    slow = mixmask.lambda_weighted_loss(exact, z_mixed, target, mixed)
    same(criterion.mixed_loss(z_mixed, mixed), slow)
