"""What is no builder of MoCo's family is refused, before anything is enqueued."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from moco_builders import (
    MASKS,
    Augmenting,
    Builder,
    C,
    Centring,
    Channels,
    Doubled,
    Early,
    Half,
    K,
    Long,
    N,
    Predicting,
    PredictingLoss,
    Reading,
    Renamed,
    Stacked,
    Swapped,
    Symmetric,
    Twice,
    Unordered,
    Wide,
    build,
    same,
    views,
)
from torch import nn

from mixmask.integrations.moco import mixed_loss, wrap


def test_the_term_is_taken_once() -> None:
    model = wrap(build(), MASKS)
    ((x_q, x_k),) = views()[0]
    with pytest.raises(ValueError, match="got none yet"):
        mixed_loss(model)
    model(x_q, x_k)
    mixed_loss(model)
    with pytest.raises(ValueError, match="take it once per forward pass"):
        mixed_loss(model)


def test_a_forgotten_term_is_refused_before_anything_changes() -> None:
    model = wrap(build(), MASKS)
    ((x_q, x_k),) = views()[0]
    model(x_q, x_k)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"add mixed_loss\(model\) to each step's loss"):
        model(x_q, x_k)
    same(dict(model.state_dict()), dict(before), 0)
    mixed_loss(model)
    model(x_q, x_k)


REFUSED: dict[str, tuple[type[Builder], dict[str, Any], str]] = {
    "queries second": (Swapped, {}, "encoder_q must get the images"),
    "augmentation inside": (Augmenting, {}, "encoder_q must get the images"),
    "one tensor of both": (Stacked, {}, r"forward must take the queries \(N, C, H, W\)"),
    "a batch of both": (Doubled, {}, r"N = 8 .* for both views in one tensor, .* take mixmask"),
    "both in the channels": (Channels, {}, "views are made, split or reordered inside forward"),
    "both views' keys": (Symmetric, {}, r"keys must be \(N, C\) with N = 4"),
    "one view's keys": (Builder, {"symmetric": True}, r"keys must be \(2N, C\) with N = 4"),
    "both views, half of the keys": (Half, {}, "the builder is symmetric"),
    "keys of other lengths": (Long, {}, "keys must have unit length"),
    "a predictor": (Predicting, {}, r"logits must be the cosines"),
    "a projector of its own": (Wide, {}, "encoder_q must return rows as long as the keys"),
    "a predictor in a loss": (PredictingLoss, {}, "got predictor.weight, predictor.bias as well"),
    "a transform without weights": (Centring, {}, r"logits must be the cosines"),
    "a queue that is filled first": (Early, {}, "the queue is filled first"),
    "a queue normalised when read": (Reading, {}, "normalised when it is read"),
    "keys in another order": (Unordered, {}, "enqueued in another order than the queries'"),
}


@pytest.mark.parametrize(("kind", "options", "text"), REFUSED.values(), ids=REFUSED)
def test_other_builders_are_refused_before_anything_is_enqueued(
    kind: type[Builder], options: dict[str, Any], text: str
) -> None:
    model: Any = wrap(build(kind), MASKS, **options)
    ((x_q, x_k),) = views()[0]
    before = model.queue.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            model(kind.join([x_q, x_k])) if issubclass(kind, Stacked) else model(x_q, x_k)
        assert torch.equal(model.queue, before)
        assert int(model.queue_ptr) == 0
        with pytest.raises(ValueError, match="got none yet"):
            mixed_loss(model)


def test_keys_as_rows_are_told_from_the_keys() -> None:
    model: Any = build(Renamed)
    before = model.memory.clone()
    wrap(model, MASKS, enqueue="update_queue", queue="memory")
    with pytest.raises(
        ValueError, match=r"stored as \(K, C\): pass wrap\(model, masks, layout='KC'"
    ):
        model(*views()[0][0])
    assert torch.equal(model.memory, before)


def test_a_replica_is_refused() -> None:
    model: Any = wrap(build(), MASKS)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(TypeError, match=r"as nn\.DataParallel makes; use DistributedDataParallel"):
        replica(*views()[0][0])


def test_a_second_call_of_enqueue_is_refused() -> None:
    model = wrap(build(Twice), MASKS)
    with pytest.raises(ValueError, match="enqueued once per forward pass"):
        model(*views()[0][0])


def _without(name: str) -> Any:
    model = build()
    delattr(model, name)
    return model


def _with(**attributes: Any) -> Any:
    model = build()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no queue": (lambda: wrap(_without("queue"), MASKS), ValueError, "without queue"),
    "no encoder_k": (lambda: wrap(_without("encoder_k"), MASKS), ValueError, "without encoder_k"),
    "another model": (
        lambda: wrap(nn.Linear(2, 2), MASKS),
        ValueError,
        "a Linear without encoder_q, encoder_k, queue, _dequeue_and_enqueue",
    ),
    "no temperature": (
        lambda: wrap(_without("T"), MASKS),
        TypeError,
        r"got None; pass wrap\(model, masks, temperature=0.2\)",
    ),
    "a learned temperature": (
        lambda: wrap(_with(T=torch.tensor(0.2)), MASKS),
        TypeError,
        "temperature must be a number",
    ),
    "queue of three axes": (
        lambda: wrap(_with(queue=torch.rand(2, C, K)), MASKS),
        ValueError,
        r"queue must be \(C, K\), got \(2, 6, 24\)",
    ),
    "a square queue": (
        lambda: wrap(_with(queue=torch.rand(C, C)), MASKS),
        ValueError,
        "pass layout='CK' if keys are its columns",
    ),
    "another layout": (lambda: wrap(build(), MASKS, layout="NC"), ValueError, "'CK', 'KC'"),
    "another name of enqueue": (
        lambda: wrap(build(), MASKS, enqueue="update_queue"),
        ValueError,
        "without update_queue; name them, as in",
    ),
    "enqueue by an attribute": (
        lambda: wrap(_with(_dequeue_and_enqueue=print), MASKS),
        ValueError,
        "is an attribute of the model; pass the name that forward uses",
    ),
    "wrapped twice": (lambda: wrap(wrap(build(), MASKS), MASKS), ValueError, "call wrap once"),
    "copies per device": (
        lambda: wrap(nn.DataParallel(build()), MASKS),
        TypeError,
        "use DistributedDataParallel",
    ),
    "no module": (lambda: wrap(partial(int), MASKS), TypeError, "got partial"),  # type: ignore[arg-type]
    "no masks": (lambda: wrap(build(), 0.5), TypeError, "masks must be a generator"),  # type: ignore[arg-type]
    "drawn masks per sample": (
        lambda: wrap(build(), MASKS(N), per_sample=True),
        ValueError,
        "per_sample=True draws masks",
    ),
    "not wrapped": (lambda: mixed_loss(build()), ValueError, r"call model = wrap\(model, masks\)"),
}


@pytest.mark.parametrize(("call", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()
