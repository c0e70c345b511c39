"""A wrapped MoCo builder beside the same steps written out slowly, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moco_builders import (
    LR,
    MASKS,
    TAU,
    Builder,
    Lists,
    N,
    Named,
    Predicting,
    PredictingLoss,
    Renamed,
    Symmetric,
    View,
    Wide,
    build,
    draw,
    same,
    seeded,
    views,
)
from moco_slowly import Slow
from processes import run_in_processes
from torch import Tensor, nn

import mixmask
from mixmask._distributed import world_size
from mixmask.integrations.moco import mixed_loss, wrap


def _gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(model: Any, steps: Sequence[View]) -> list[tuple[float, dict[str, Tensor]]]:
    """A loop as the family has it, with our second line."""
    inner = getattr(model, "module", getattr(model, "_orig_mod", model))
    optimizer, done = torch.optim.SGD(inner.encoder_q.parameters(), LR), []
    for x_q, x_k in steps:
        output = model(x_q, x_k)
        clean = output if isinstance(output, Tensor) else F.cross_entropy(*output)
        loss = clean + mixed_loss(model)
        optimizer.zero_grad()
        loss.backward()
        done.append((loss.item(), _gradients(inner)))
        optimizer.step()
    return done


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no switch": {"switch": False},
    "random partners": {"partner": "random"},
    "given partners": {"partner": torch.tensor([2, 2, 0, 1])},
    "one mask per sample": {"per_sample": True, "partner": "random"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_three_steps(options: dict[str, Any]) -> None:
    model, generator = build(), seeded()
    switch = options.get("switch", True)
    slow = Slow(model, lambda _, images: draw(images, generator, options), switch=switch)
    slow.run(views())
    assert wrap(model, MASKS, generator=seeded(), **options) is model
    done = train(model, [step[0] for step in views()])
    same(done, [(losses[0], gradients) for losses, gradients in slow.steps])
    same(model.state_dict(), slow.state)


def test_a_symmetric_builder() -> None:
    model, generator = build(Symmetric), seeded()
    slow = Slow(model, lambda _, images: draw(images, generator, {}), directions=2).run(views())
    wrap(model, MASKS, generator=seeded(), symmetric=True)
    done = train(model, [step[0] for step in views()])
    same(done, [(losses[0], gradients) for losses, gradients in slow.steps])
    same(model.state_dict(), slow.state)


def test_a_symmetric_builder_with_a_mixture_of_its_own() -> None:
    plain, model = build(Symmetric), build(Symmetric)
    ((x_1, x_2),) = views()[0]
    for one, mixture in ((plain, ()), (model, (x_1.flip(0) / 2,))):
        wrap(one, MASKS, generator=seeded(), symmetric=True)
        one(x_1, x_2, *mixture)
    same(mixed_loss(model), mixed_loss(plain))


def test_gradients_accumulate() -> None:
    model, generator = build(), seeded()
    slow = Slow(model, lambda _, images: draw(images, generator, {}), lr=0.0).run(views())
    wrap(model, MASKS, generator=seeded())
    for ((x_q, x_k),) in views():
        (F.cross_entropy(*model(x_q, x_k)) + mixed_loss(model)).backward()
    expected = {name: sum(step[1][name] for step in slow.steps) for name in slow.steps[0][1]}
    same(_gradients(model), expected)


def test_the_queue_is_read_before_it_is_filled() -> None:
    """Reading `model.queue` after forward has the batch's own keys among the negatives."""
    model, generator = build(), seeded()
    wrap(model, MASKS, generator=seeded())
    ((x_q, x_k),) = views()[0]
    old = model.queue.clone()
    model(x_q, x_k)
    k, mixed = model.queue[:, :N].T, draw(x_q, generator, {})

    def by_hand(queue: Tensor) -> Tensor:
        q_mixed = F.normalize(model.encoder_q(mixed.images), dim=1)
        return mixmask.lambda_weighted_loss(mixmask.losses.InfoNCE(queue.T, TAU), q_mixed, k, mixed)

    exact = mixed_loss(model)
    same(exact, by_hand(old))
    assert (exact - by_hand(model.queue)).abs() > 0.1


def test_autocast() -> None:
    model, generator = build().float(), seeded()
    wrap(model, MASKS, generator=seeded())
    ((x_q, x_k),) = views()[0]
    old = model.queue.clone()
    with torch.autocast("cpu", torch.bfloat16):
        logits, labels = model(x_q.float(), x_k.float())
        mixed = draw(x_q.float(), generator, {})
        q_mixed = F.normalize(model.encoder_q(mixed.images), dim=1)
    assert model.encoder_q(x_q.float()).dtype == torch.float32
    term = mixed_loss(model)
    criterion = mixmask.losses.InfoNCE(old.T, TAU)
    by_hand = mixmask.lambda_weighted_loss(criterion, q_mixed.float(), model.queue[:, :N].T, mixed)
    same(term, by_hand, 2e-2)
    (F.cross_entropy(logits.float(), labels) + term).backward()
    assert all(p.grad.isfinite().all() for p in model.encoder_q.parameters())


COMPILED: dict[str, Callable[[Any], Any]] = {
    "replaced": lambda model: setattr(
        model, "encoder_q", torch.compile(model.encoder_q, backend="eager")
    ),
    "in place": lambda model: model.encoder_q.compile(backend="eager"),
}


@pytest.mark.parametrize("late", [False, True], ids=["compiled first", "wrapped first"])
@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_compiled_encoders(compiled: Callable[[Any], Any], *, late: bool) -> None:
    torch._dynamo.reset()
    plain, model = (build() for _ in range(2))
    wrap(plain, MASKS, generator=seeded())
    steps = [step[0] for step in views()]
    if not late:
        compiled(model)
    wrap(model, MASKS, generator=seeded())
    if late:
        compiled(model)
    expected = train(plain, steps)
    found = train(model, steps)
    same([loss for loss, _ in found], [loss for loss, _ in expected])
    same(list(found[-1][1].values()), list(expected[-1][1].values()))


# The builder's own pointer breaks the graph, where torch looks at tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    plain, model = build(), build()
    expected = train(wrap(plain, MASKS, generator=seeded()), [step[0] for step in views()])
    compiled = torch.compile(wrap(model, MASKS, generator=seeded()), backend="eager")
    found = train(compiled, [step[0] for step in views()])
    same([loss for loss, _ in found], [loss for loss, _ in expected])
    same(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_train_on_their_own(copied: Callable[[Any], Any]) -> None:
    model = wrap(build(), MASKS)
    steps = [step[0] for step in views()]
    # In the middle of a step: what it recorded stays behind.
    model(*steps[0])
    other: Any = copied(model)
    with pytest.raises(ValueError, match="must be a training step"):
        mixed_loss(other)
    mixed_loss(model)
    before = copy.deepcopy(model.state_dict())
    same(dict(other.state_dict()), dict(before))
    torch.manual_seed(0)
    theirs = train(other, steps)
    same(dict(model.state_dict()), dict(before))
    torch.manual_seed(0)
    same(train(model, steps), theirs)


def test_the_model_stays_what_it_is() -> None:
    plain, model = (build() for _ in range(2))
    wrap(model, MASKS)
    assert type(model) is Builder
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert repr(model) == repr(plain)
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "no grad"])
def test_nothing_is_mixed_where_nothing_is_trained(*, train_mode: bool) -> None:
    plain, model = (build().train(train_mode) for _ in range(2))
    wrap(model, MASKS)
    ((x_q, x_k),) = views()[0]
    state = torch.random.get_rng_state()
    with torch.set_grad_enabled(not train_mode):
        same(model(x_q, x_k), plain(x_q, x_k), 0)
    assert torch.equal(state, torch.random.get_rng_state())
    same(dict(model.state_dict()), dict(plain.state_dict()), 0)
    with pytest.raises(ValueError, match="got none yet"):
        mixed_loss(model)


def test_nothing_of_a_step_is_kept() -> None:
    model = wrap(build(), MASKS)
    ((x_q, x_k),) = views()[0]
    model(x_q, x_k)
    mixed_loss(model)
    mixture = vars(model)["_mixmask"]
    assert not mixture.views
    assert mixture.term is mixture.first is None


def test_lists_of_views_and_a_temperature_in_the_head() -> None:
    plain, model = build(), build(Lists)
    ((x_q, x_k),) = views()[0]
    for one in (plain, model):
        wrap(one, MASKS, generator=seeded())
    plain(x_q, x_k)
    model(img=[x_q, x_k], mode="train")
    same(mixed_loss(model), mixed_loss(plain))


def test_the_temperature_is_that_of_the_step() -> None:
    model, given = build(), build()
    ((x_q, x_k),) = views()[0]
    wrap(model, MASKS, generator=seeded())
    model.T = 0.5
    wrap(given, MASKS, generator=seeded(), temperature=0.5)
    for one in (model, given):
        one(x_q, x_k)
    same(mixed_loss(model), mixed_loss(given))


def _second(model: Any, images: Tensor) -> Tensor:
    return F.normalize(model.encoder_q(images).flip(1), dim=1)


def test_an_encoder_of_ones_own() -> None:
    model = wrap(build(), MASKS, generator=seeded(), encode=_second)
    ((x_q, x_k),) = views()[0]
    old = build().queue.double()
    model(x_q, x_k)
    mixed = draw(x_q, seeded(), {})
    criterion = mixmask.losses.InfoNCE(old.T, TAU)
    k = model.queue[:, :N].T  # type: ignore[index]
    slow = mixmask.lambda_weighted_loss(criterion, _second(model, mixed.images), k, mixed)
    same(mixed_loss(model), slow)


@pytest.mark.parametrize("kind", [Predicting, PredictingLoss, Wide])
def test_a_predictor_is_part_of_an_encoder_of_ones_own(kind: type[Predicting]) -> None:
    model: Any = wrap(build(kind), MASKS, generator=seeded(), encode=kind.query)
    ((x_q, x_k),) = views()[0]
    old = model.queue.clone()
    model(x_q, x_k)
    mixed = draw(x_q, seeded(), {})
    criterion = mixmask.losses.InfoNCE(old.T, TAU)
    k = model.queue[:, :N].T
    same(
        mixed_loss(model),
        mixmask.lambda_weighted_loss(criterion, model.query(mixed.images), k, mixed),
    )


def test_other_names_and_keys_as_rows() -> None:
    plain, model = build(), build(Renamed)
    wrap(plain, MASKS, generator=seeded())
    wrap(
        model,
        MASKS,
        generator=seeded(),
        enqueue="update_queue",
        queue="memory",
        layout="KC",
    )
    steps = [step[0] for step in views()]
    same(train(model, steps), train(plain, steps))
    same(model.memory, plain.queue.T)


class Manual(Builder):
    """Has the recipe's lines before the queue is updated, around a function that makes logits."""

    term: Tensor

    def logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(q, dim=1)
        near = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
        return near / self.T, torch.zeros(len(q), dtype=torch.long)

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        q = self.encoder_q(im_q)
        self._follow()
        k = self._keys(im_k)
        logits, labels = self.logits(q, k)
        mixed = draw(im_q, seeded(), {})
        self.term = mixmask.lambda_weighted_loss(
            lambda z, k: F.cross_entropy(*self.logits(z, k)), self.encoder_q(mixed.images), k, mixed
        )
        self._dequeue_and_enqueue(k)
        return logits, labels


def test_the_recipe_for_other_builders_gives_the_term_of_a_wrapped_one() -> None:
    plain, model = wrap(build(), MASKS, generator=seeded()), build(Manual)
    ((x_q, x_k),) = views()[0]
    same(model(x_q, x_k), plain(x_q, x_k))
    same(model.term, mixed_loss(plain))


def test_raw_logits_and_a_temperature_of_ones_own_are_accepted() -> None:
    """A loop may divide by the temperature itself."""
    raw, model = build(), build()
    wrap(model, MASKS, generator=seeded())
    wrap(raw, MASKS, generator=seeded(), temperature=TAU)
    raw.T = 1.0
    for one in (raw, model):
        one(*views()[0][0])
    same(mixed_loss(raw), mixed_loss(model))


def test_the_argument_that_is_called_im_q_holds_the_queries() -> None:
    plain, model = build(), build(Named)
    ((x_q, x_k),) = views()[0]
    for one in (plain, model):
        wrap(one, MASKS, generator=seeded())
    plain(x_q, x_k)
    model(x_k, x_q)
    same(mixed_loss(model), mixed_loss(plain))


WORLD = 2
DDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "wrapped late": {},
}


def _work(process: int) -> dict[str, Any]:
    """Train in one of two processes."""
    results = {}
    for name, options in DDP.items():
        model = build()
        if name != "wrapped late":
            wrap(model, MASKS, generator=seeded(process))
        model = nn.parallel.DistributedDataParallel(model, **options)
        if name == "wrapped late":
            wrap(model, MASKS, generator=seeded(process))
        done = train(model, [step[process] for step in views(WORLD)])
        results[name] = done, model.module.state_dict()
    assert world_size() == WORLD
    return results


def test_two_processes(tmp_path: Path) -> None:
    found = run_in_processes(_work, tmp_path, WORLD)
    generators = [seeded(process) for process in range(WORLD)]
    slow = Slow(build(), lambda r, images: draw(images, generators[r], {}), world=WORLD).run(
        views(WORLD)
    )
    for process, results in enumerate(found):
        for done, state in results.values():
            same(done, [(losses[process], gradients) for losses, gradients in slow.steps])
            if process == 0:
                same(dict(state), slow.state)
