from __future__ import annotations

import copy
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from mixmask import MixMask
from mixmask.data.clothing import clothing64
from mixmask.integrations import solo as integration
from mixmask.integrations._solo_recipes import Step

N, CLASSES = 6, 10
CROP, SMALL_CROP = 32, 24
UNSUPPORTED = {
    "all4one": "a transformer over the clean batch",
    "base": "it has no loss of its own",
    "deepclusterv2": "looked up by the number of an image",
    "mae": "it masks images itself",
    "nnbyol": "neighbours as the targets of a predictor",
    "nnsiam": "neighbours as the targets of a predictor",
    "supcon": "labels choose its positives",
    "vibcreg": "its head whitens each batch",
    "wmse": "it whitens all views of a batch together",
}


def needs_solo(test: Any) -> Any:
    """Skip a test where solo-learn is missing; its libraries warn about each other's age."""
    missing = find_spec("solo") is None
    reason = "solo-learn is not installed: it comes from its repository on GitHub"
    return pytest.mark.skipif(missing, reason=reason)(pytest.mark.filterwarnings("ignore")(test))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# What their losses give, for a mixed view against one target.


def _loss(name: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(
        importlib.import_module("solo.losses"), f"{name}_loss_func"
    )
    return found


def _momentum(key: str) -> Callable[[Any, list[Tensor]], list[Tensor]]:
    return lambda model, crops: [model.momentum_forward(x)[key] for x in crops]


def _clean(model: Any, crops: list[Tensor]) -> list[Tensor]:
    return [model(x)["z"] for x in crops]


def _neighbours(model: Any, crops: list[Tensor]) -> list[Tensor]:
    return [model.find_nn(z)[1] for z in _clean(model, crops)]


def _codes(model: Any, crops: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = model.get_assignments([model(x)["p"] for x in crops])
    return found


def _barlow_twins(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    return _loss("barlow")(z, target, lamb=model.lamb, scale_loss=model.scale_loss)


def _dino(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    # Its two directions are the same here, and so is their mean; its center must not move.
    found: Tensor = copy.deepcopy(model.dino_loss_func)(torch.cat([z, z]), torch.cat([target] * 2))
    return found


def _mocov2plus(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    return _loss("mocov2plus")(z, target, model.queue[other], model.temperature)


def _simclr(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    indexes = torch.arange(len(z)) + len(z) * _rank()
    return _loss("simclr")(torch.cat([z, target]), indexes.repeat(2), model.temperature)


def _distance(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    invariance = importlib.import_module("solo.losses.vicreg").invariance_loss
    found: Tensor = model.sim_loss_weight * invariance(z, target)
    return found


def _spread(model: Any, z: Tensor) -> Tensor:
    """Half of what two equal views have, which is once what one view has."""
    return _loss("vicreg")(z, z, 0.0, model.var_loss_weight, model.cov_loss_weight) / 2


def _ressl(model: Any, z: Tensor, target: Tensor, other: int) -> Tensor:
    del other
    return _loss("ressl")(z, target, model.queue, model.temperature_q, model.temperature_k)


def _simclr_row(model: Any, z: Tensor, target: Tensor, other: int, i: int) -> Tensor:
    del other
    rows = F.normalize(torch.cat([z, target]), dim=1)
    total = torch.zeros(())
    for row, positive in ((i, len(z) + i), (len(z) + i, i)):
        logits = rows[row] @ rows.T / model.temperature
        rest = [column for column in range(len(rows)) if column != row]
        total = total + (logits[rest].logsumexp(dim=0) - logits[positive]) / 2
    return total


@dataclass(frozen=True)
class Method:
    """A method of theirs, as far as the mixed term repeats it."""

    output: str
    targets: Callable[[Any, list[Tensor]], list[Tensor]]
    loss: Callable[[Any, Tensor, Tensor, int], Tensor]
    row: Callable[[Any, Tensor, Tensor, int, int], Tensor] | None = None
    once: Callable[[Any, Tensor], Tensor] | None = None
    summed: bool = False
    views: int = 2

    def of_row(self, model: Any, z: Tensor, target: Tensor, other: int, i: int) -> Tensor:
        """Return the loss of one image alone."""
        if self.row is not None:
            return self.row(model, z, target, other, i)
        return self.loss(model, z[i : i + 1], target[i : i + 1], other)


METHODS = {
    "barlow_twins": Method("z", _clean, _barlow_twins),
    "byol": Method("p", _momentum("z"), lambda _m, p, z, _o: _loss("byol")(p, z), summed=True),
    "dino": Method("z", _momentum("z"), _dino),
    "mocov2plus": Method("z", _momentum("z"), _mocov2plus),
    "mocov3": Method(
        "q",
        _momentum("k"),
        lambda m, q, k, _o: _loss("mocov3")(q, k, m.temperature),
        # Rolled, the one query meets its own key in the first column, where they look for it.
        lambda m, q, k, _o, i: _loss("mocov3")(q[i : i + 1], k.roll(-i, 0), m.temperature),
        summed=True,
    ),
    "nnclr": Method(
        "p",
        _neighbours,
        lambda m, p, nn, _o: _loss("nnclr")(nn, p, m.temperature),
        lambda m, p, nn, _o, i: _loss("nnclr")(nn[i : i + 1], p.roll(-i, 0), m.temperature),
    ),
    "ressl": Method("z", _momentum("z"), _ressl, views=1),
    "simclr": Method("z", _clean, _simclr, _simclr_row),
    "simsiam": Method("p", _clean, lambda _m, p, z, _o: _loss("simsiam")(p, z)),
    "swav": Method("p", _codes, lambda m, p, c, _o: _loss("swav")([p, p], [c], m.temperature)),
    "vicreg": Method("z", _clean, _distance, once=_spread),
}
MULTI_CROP = ["byol", "simclr", "swav"]
methods = pytest.mark.parametrize("name", METHODS)


def _towards(
    name: str, model: Any, z: Tensor, target: Tensor, other: int, share: Tensor | float
) -> Tensor:
    """Weigh the losses of the images by their shares, all alike or each its own."""
    method = METHODS[name]
    if not isinstance(share, Tensor):
        return share * method.loss(model, z, target, other)
    rows = [share[i] * method.of_row(model, z, target, other, i) for i in range(N)]
    return torch.stack(rows).mean()


def _mixed_term(
    name: str,
    model: Any,
    crops: list[Tensor],
    *,
    switch: bool = True,
    symmetric: bool = True,
    small_crops: bool = False,
    **options: Any,
) -> tuple[Tensor, float]:
    """Write the mixed term out, drawing masks where the integration is to draw them."""
    method, large = METHODS[name], 2
    targets = method.targets(model, crops[:large])
    views = list(range(method.views if symmetric else 1))
    views += range(large, len(crops)) if small_crops else []
    mix = MixMask(**options)
    terms, shares = [], []
    for view in views:
        x, record = crops[view], mix(crops[view])
        assert record.mask is not None
        own = record.mask.float().expand(N, *x.shape[-2:])
        kept = own[:, None]
        images = kept * x + (1 - kept) * x[record.partner]
        z = (model(images) if view < large else model.multicrop_forward(images))[method.output]
        each = own.mean(dim=(1, 2))
        shares.append(float(each.mean()))
        lam = each if options.get("per_sample") else float(each[0])
        for other, target in enumerate(targets):
            if other == view:
                continue
            term = _towards(name, model, z, target, other, lam)
            if switch:
                partner = target[record.partner]
                term = term + _towards(name, model, z, partner, other, 1 - lam)
            terms.append(term if method.once is None else term + method.once(model, z))
    # BYOL and MoCo v3 add their directions up, the others average.
    directions = 2 * (len(crops) - 1) if method.summed else 1
    return directions * torch.stack(terms).mean(), sum(shares) / len(shares)


# Models and batches.


class Tiny(nn.Sequential):
    """A backbone as they take any: the method's name, options, and how many features it has."""

    num_features = 16

    def __init__(self, method: str) -> None:
        del method
        layers = {
            "conv": nn.Conv2d(3, 16, 5, stride=3),
            "norm": nn.BatchNorm2d(16),
            "relu": nn.ReLU(),
            "pool": nn.AdaptiveAvgPool2d(2),
            "rows": nn.Flatten(),
            "head": nn.Linear(64, 16),
        }
        super().__init__(OrderedDict(layers))


def _cfg(name: str, *, small: int = 0, mixmask: Any = None, **more: Any) -> Any:
    from omegaconf import OmegaConf

    cfg = {
        "name": "run",
        "method": name,
        "backbone": {"name": "tiny"},
        "method_kwargs": {
            "proj_hidden_dim": 16,
            "proj_output_dim": 8,
            "pred_hidden_dim": 16,
            "num_prototypes": 12,
            "temperature": 0.3,
            "temperature_q": 0.1,
            "temperature_k": 0.04,
            "warmup_teacher_temperature_epochs": 2,
            "queue_size": 4 * N,
            "epoch_queue_starts": 0,
        },
        "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": True},
        "data": {
            "dataset": "custom",
            "num_classes": CLASSES,
            "num_large_crops": 2,
            "num_small_crops": small,
        },
        "optimizer": {
            "name": "sgd",
            "batch_size": N,
            "lr": 0.1,
            "classifier_lr": 0.1,
            "weight_decay": 0.0,
        },
        "scheduler": {"name": "none"},
        "knn_eval": {"enabled": True, "k": 2},
        "max_epochs": 2,
        **more,
    }
    if mixmask is not None:
        cfg["mixmask"] = mixmask
    built = OmegaConf.create(cfg)
    OmegaConf.set_struct(built, False)
    return built


def _build(classes: dict[str, Any], cfg: Any) -> Any:
    """Build a model as it is when training starts, with a memory that is not at its start."""
    torch.manual_seed(0)
    model = classes[cfg.method](cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("momentum_"):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    if cfg.method == "swav":
        from solo.utils.sinkhorn_knopp import SinkhornKnopp

        model.sk = SinkhornKnopp(model.sk_iters, model.sk_epsilon, 1)
        model.register_buffer("queue", F.normalize(torch.randn(2, 4 * N, 8), dim=2))
    if cfg.method == "dino":
        model.dino_loss_func.center = 0.1 * torch.randn(1, 12)
        model.dino_loss_func.epoch = 1
    logs: dict[str, Tensor] = {}
    model.log = lambda key, value, **_: logs.update({key: torch.as_tensor(value).detach()})
    model.log_dict = lambda values, **_: [model.log(*pair) for pair in values.items()]
    model.logs = logs
    return model


def _batch(small: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(1 + _rank())
    sizes = [CROP, CROP] + [SMALL_CROP] * small
    crops = [torch.randn(N, 3, size, size, generator=generator) for size in sizes]
    return [torch.arange(N) + N * _rank(), crops, torch.arange(N) % CLASSES]


def _step(model: Any, batch: list[Any]) -> Tensor:
    torch.manual_seed(5 + _rank())
    loss: Tensor = model.training_step(batch, 0)
    return loss


def _gradients(*models: Any) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, torch.zeros(())) + parameter.grad
    return total


def _assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        off = float((ours[name] - gradient).abs().max())
        assert off <= 1e-3 * float(gradient.abs().max()) + 1e-5 * largest, name


def _only_clean(key: str) -> bool:
    """Tell what the mixed passes may leave another trace in: the online branch's batch norms."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return key.startswith("momentum_") or not key.endswith(statistics)


def _tau(model: Any) -> float | None:
    updater = getattr(model, "momentum_updater", None)
    return None if updater is None else float(updater.cur_tau)


def _knn(model: Any) -> list[Tensor]:
    return [*model.knn.train_features, *model.knn.train_targets]


@pytest.fixture(scope="module")
def theirs() -> Iterator[dict[str, Any]]:
    """Their classes as they are; those in METHODS are patched meanwhile."""
    from solo.methods import METHODS as REGISTERED
    from solo.methods.base import BaseMethod
    from solo.utils.auto_resumer import AutoResumer

    classes, matched = dict(REGISTERED), list(AutoResumer.SHOULD_MATCH)
    BaseMethod._BACKBONES["tiny"] = Tiny
    integration.patch()
    yield classes
    REGISTERED.update(classes)
    AutoResumer.SHOULD_MATCH[:] = matched
    del BaseMethod._BACKBONES["tiny"]


@pytest.fixture
def ours(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return METHODS, patched."""
    from solo.methods import METHODS as REGISTERED

    assert REGISTERED["simclr"] is not theirs["simclr"]
    found: dict[str, Any] = REGISTERED
    return found


def _compare(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, block: dict[str, Any], small: int = 0
) -> None:
    """Hold one step against their step plus the mixed term written out."""
    batch = _batch(small)
    crops = [x.clone() for x in batch[1]]
    mixing = _build(ours, _cfg(name, small=small, mixmask=block))
    plain, before = (_build(theirs, _cfg(name, small=small)) for _ in range(2))
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    assert all(torch.equal(value, start[key]) for key, value in mixing.state_dict().items())

    loss = _step(mixing, batch)
    clean = _step(plain, batch)
    mixed, share = _mixed_term(name, before, crops, **block)
    torch.testing.assert_close(loss, clean + mixed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixing.logs.pop("train_mixmask_loss"), mixed.detach())
    assert float(mixing.logs.pop("train_lambda")) == pytest.approx(share, abs=1e-6)

    assert mixing.logs.keys() == plain.logs.keys()
    assert all(torch.equal(mixing.logs[key], value) for key, value in plain.logs.items())
    after = plain.state_dict()
    assert mixing.state_dict().keys() == after.keys()
    other = [
        key for key, value in mixing.state_dict().items() if not torch.equal(value, after[key])
    ]
    assert not [key for key in other if _only_clean(key)]
    assert "backbone.norm.running_mean" in other
    for key in ("queue", "dino_loss_func.center"):
        assert key not in after or not torch.equal(after[key], start[key])
    assert _tau(mixing) == _tau(plain)
    assert all(map(torch.equal, _knn(mixing), _knn(plain)))
    assert all(map(torch.equal, batch[1], crops))

    for value in (loss, clean, mixed):
        value.backward()
    found = _gradients(mixing)
    _assert_same_gradients(found, _gradients(plain, before))
    for key in found:
        if "classifier" in key:
            assert torch.equal(found[key], _gradients(plain)[key])


BLOCKS: dict[str, dict[str, Any]] = {
    "default": {"grid_size": 4},
    "symmetric=false": {"grid_size": 2, "pattern": "discrete", "symmetric": False},
    "switch=false": {"grid_size": 4, "switch": False, "ratio": 0.3},
    "partner=random": {"grid_size": 4, "ratio": (0.2, 0.8), "partner": "random", "roll": True},
    "per_sample=true": {"grid_size": 4, "ratio": (0.2, 0.8), "per_sample": True},
}


CASES = [
    (name, block)
    for name in METHODS
    for block in BLOCKS
    if (name, block) != ("barlow_twins", "per_sample=true")
]


@needs_solo
@pytest.mark.parametrize("name, block", CASES)
def test_a_step_is_theirs_plus_the_mixed_term_written_out(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, block: str
) -> None:
    _compare(ours, theirs, name, BLOCKS[block])


@needs_solo
@pytest.mark.parametrize("name", [name for name in METHODS if name != "barlow_twins"])
def test_the_losses_of_single_images_average_to_theirs(theirs: dict[str, Any], name: str) -> None:
    """Checks the oracle of this file, not the integration."""
    model = _build(theirs, _cfg(name))
    z, target = F.normalize(torch.randn(2, N, 12 if name in ("swav", "dino") else 8), dim=2)
    full = METHODS[name].loss(model, z, target, 1)
    torch.testing.assert_close(_towards(name, model, z, target, 1, torch.ones(N)), full)


@needs_solo
@methods
@pytest.mark.parametrize("block", [None, False, {"enabled": False, "grid_size": 4}], ids=str)
def test_without_the_block_nothing_changes(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, block: Any
) -> None:
    runs = []
    for classes, cfg in ((ours, _cfg(name, mixmask=block)), (theirs, _cfg(name))):
        model = _build(classes, cfg)
        loss = _step(model, _batch())
        runs.append((loss, torch.get_rng_state(), model.logs, model.state_dict(), _knn(model)))
    (loss, state, logs, buffers, knn), expected = runs
    assert torch.equal(loss, expected[0])
    assert torch.equal(state, expected[1])
    for mine, their in ((logs, expected[2]), (buffers, expected[3])):
        assert mine.keys() == their.keys()
        assert all(torch.equal(mine[key], value) for key, value in their.items())
    assert all(map(torch.equal, knn, expected[4]))


@needs_solo
def test_steps_draw_new_masks_from_torchs_generator(ours: dict[str, Any]) -> None:
    model = _build(ours, _cfg("simclr", mixmask={"ratio": (0.1, 0.9)}))
    torch.manual_seed(0)
    shares = [(model.training_step(_batch(), 0), float(model.logs["train_lambda"])) for _ in "123"]
    torch.manual_seed(0)
    again = model.training_step(_batch(), 0), float(model.logs["train_lambda"])
    assert len({share for _, share in shares}) == 3
    assert again[1] == shares[0][1]
    assert torch.equal(again[0], shares[0][0])


# What the block may hold.


@pytest.fixture
def building_fails(monkeypatch: pytest.MonkeyPatch, theirs: dict[str, Any]) -> None:
    """Fail where a model is built."""

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(theirs["base"], "__init__", refuse)


@needs_solo
@pytest.mark.usefixtures("building_fails")
@pytest.mark.parametrize(
    "block, error, text",
    [
        ({"grid": 4}, ValueError, "no option 'grid'; it takes .*grid_size.*switch, symmetric"),
        ({"grid_size": 1}, ValueError, "grid_size must be at least 2, got 1"),
        ({"ratio": 1.5}, ValueError, "ratio must lie strictly between 0 and 1"),
        ({"pattern": "blocks"}, ValueError, "pattern must be one of 'block', 'discrete'"),
        ({"switch": "no"}, TypeError, "mixmask.switch must be a bool, got 'no'; write true or"),
        ({"enabled": "off"}, TypeError, "mixmask.enabled must be a bool, got 'off'"),
        ({"per_sample": 1}, TypeError, "mixmask.per_sample must be a bool, got 1"),
        ({"grid_size": 1, "enabled": False, "grid": 2}, ValueError, "no option 'grid'"),
        (True, TypeError, r"a block of options, got True; write .* mixmask: \{grid_size: 4\}"),
        (4, TypeError, "must be a block of options, got 4"),
        ("block", TypeError, "must be a block of options, got 'block'"),
        ([4], TypeError, r"must be a block of options, got \[4\]"),
    ],
    ids=str,
)
def test_a_bad_block_is_refused_before_anything_is_built(
    ours: dict[str, Any], block: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ours["simclr"](_cfg("simclr", mixmask=block))


@needs_solo
@pytest.mark.usefixtures("building_fails")
def test_barlow_twins_refuses_one_lam_a_sample(ours: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"per_sample needs a loss of each image, .*; leave"):
        ours["barlow_twins"](_cfg("barlow_twins", mixmask={"per_sample": True}))


@needs_solo
@pytest.mark.usefixtures("building_fails")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_methods_it_does_not_go_into_say_why(ours: dict[str, Any], name: str) -> None:
    text = f"does not work with the method '{name}': .*{UNSUPPORTED[name]}.* use one of barlow"
    with pytest.raises(ValueError, match=text):
        ours[name](_cfg(name, mixmask={"grid_size": 4}))


@needs_solo
def test_every_method_is_either_mixed_or_refuses(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert {*METHODS, *UNSUPPORTED, "linear"} == set(ours)
    assert ours["linear"] is theirs["linear"]
    assert all(issubclass(ours[name], theirs[name]) for name in theirs)
    block = {"enabled": False}
    model = ours["supcon"](_cfg("supcon", mixmask=block))
    assert model.state_dict().keys() == theirs["supcon"](_cfg("supcon")).state_dict().keys()


@needs_solo
def test_a_method_of_ones_own_refuses(
    ours: dict[str, Any], theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ours, "mine", type("Mine", (theirs["simclr"],), {}))
    integration.patch()
    with pytest.raises(ValueError, match="method 'mine': it is not known here; use one of"):
        ours["mine"](_cfg("mine", mixmask={"grid_size": 4}))


@needs_solo
def test_a_range_may_be_a_list_as_yaml_has_it(ours: dict[str, Any]) -> None:
    model = ours["simclr"](_cfg("simclr", mixmask={"ratio": [0.2, 0.4]}))
    assert model.mixmask.masks.ratio == (0.2, 0.4)


@needs_solo
def test_an_empty_block_means_the_defaults(ours: dict[str, Any]) -> None:
    assert repr(ours["simclr"](_cfg("simclr", mixmask={})).mixmask) == repr(MixMask())


# Multi-crop.


@needs_solo
@pytest.mark.parametrize("name", MULTI_CROP)
@pytest.mark.parametrize("small_crops", [False, True])
def test_small_crops_are_mixed_if_asked(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, small_crops: bool
) -> None:
    _compare(ours, theirs, name, {"grid_size": 2, "small_crops": small_crops}, small=2)


@needs_solo
@pytest.mark.parametrize("name", MULTI_CROP)
def test_small_crops_pass_once_unless_asked(
    ours: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in (False, True):
        block = {"grid_size": 2, "small_crops": asked}
        model, batch = _build(ours, _cfg(name, small=2, mixmask=block)), _batch(2)
        seen: list[Tensor] = []
        monkeypatch.setattr(model, "multicrop_forward", _spied(model.multicrop_forward, seen))
        _step(model, batch)
        assert all(map(torch.equal, seen[:2], batch[1][2:]))
        assert len(seen) == (4 if asked else 2)


def _spied(forward: Callable[[Tensor], Any], seen: list[Tensor]) -> Callable[[Tensor], Any]:
    def spied(x: Tensor) -> Any:
        seen.append(x)
        return forward(x)

    return spied


@needs_solo
@pytest.mark.parametrize("name", ["dino", "simsiam", "mocov3"])
def test_small_crops_without_an_embedding_are_refused(ours: dict[str, Any], name: str) -> None:
    model = _build(ours, _cfg(name, mixmask={"grid_size": 2, "small_crops": True}))
    model.num_small_crops, model.num_crops, model.multicrop = 2, 4, True
    theirs_only = _batch(2)
    with pytest.raises(ValueError, match="needs a method that embeds small crops, got "):
        model._mixed_loss(_noted(model, theirs_only), theirs_only[1])


def _noted(model: Any, batch: list[Any]) -> Any:
    """Return what a step noted of the large crops."""
    step = Step()
    model._step = step
    step.noted = model.recipe.before(model)
    for x in batch[1][:2]:
        model.base_training_step(x, batch[2])
        if hasattr(model, "momentum_backbone"):
            model._shared_step_momentum(x, batch[2])
    return step


# Backbones.


@needs_solo
@pytest.mark.parametrize("name", ["mocov2plus", "vicreg"])
def test_residual_networks_take_a_step(
    ours: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    backbone = {"name": "resnet18"}
    model = _build(ours, _cfg(name, backbone=backbone, mixmask={"grid_size": 2}))
    plain, before = (_build(theirs, _cfg(name, backbone=backbone)) for _ in range(2))
    loss, clean = _step(model, _batch()), _step(plain, _batch())
    mixed, _ = _mixed_term(name, before, _batch()[1], grid_size=2)
    torch.testing.assert_close(loss, clean + mixed, rtol=1e-5, atol=1e-5)


@needs_solo
@pytest.mark.parametrize("name", ["mocov3", "dino"])
def test_vision_transformers_take_a_step(
    ours: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    backbone = {"name": "vit_tiny", "kwargs": {"img_size": CROP, "patch_size": 16}}
    model = _build(ours, _cfg(name, backbone=backbone, mixmask={"grid_size": 2}))
    plain = _build(theirs, _cfg(name, backbone=backbone))
    assert type(model.backbone) is type(plain.backbone)
    loss, clean = _step(model, _batch()), _step(plain, _batch())
    torch.testing.assert_close(loss, clean + model.logs["train_mixmask_loss"])
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in _gradients(model).values())


# Runs.


@dataclass(frozen=True)
class Run:
    """A run that their AutoResumer may find."""

    folder: Path

    def write(self, cfg: Any) -> Path:
        """Leave a checkpoint and args.json behind, as their Checkpointer does."""
        from solo.utils.checkpointer import Checkpointer

        callback = Checkpointer(cfg, logdir=self.folder)
        trainer = types.SimpleNamespace(logger=None, is_global_zero=True)
        callback.initial_setup(trainer)
        callback.save_args(trainer)
        checkpoint: Path = callback.path / callback.ckpt_placeholder.format(0)
        checkpoint.touch()
        return checkpoint

    def found(self, cfg: Any) -> Path | None:
        """Return what a run with this configuration would resume."""
        from solo.utils.auto_resumer import AutoResumer

        checkpoint: Path | None = AutoResumer(self.folder).find_checkpoint(cfg)[0]
        return checkpoint


RESUMED = {"grid_size": 4, "ratio": [0.2, 0.8]}


@needs_solo
@pytest.mark.usefixtures("theirs")
def test_a_run_is_resumed_with_the_block_it_was_started_with(tmp_path: Path) -> None:
    run = Run(tmp_path)
    checkpoint = run.write(_cfg("byol", mixmask=RESUMED))
    assert run.found(_cfg("byol", mixmask=dict(RESUMED))) == checkpoint
    for block in (None, {"grid_size": 4}, {**RESUMED, "grid_size": 8}, {**RESUMED, "ratio": 0.5}):
        assert run.found(_cfg("byol", mixmask=block)) is None


@needs_solo
@pytest.mark.usefixtures("theirs")
def test_a_run_without_mixing_is_not_resumed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from solo.utils.auto_resumer import AutoResumer

    run = Run(tmp_path)
    checkpoint = run.write(_cfg("byol"))
    assert run.found(_cfg("byol", mixmask=RESUMED)) is None
    assert run.found(_cfg("byol")) == checkpoint
    rest = [key for key in AutoResumer.SHOULD_MATCH if key != "mixmask"]
    monkeypatch.setattr(AutoResumer, "SHOULD_MATCH", rest)
    assert run.found(_cfg("byol", mixmask=RESUMED)) == checkpoint


@needs_solo
def test_patching_twice_is_harmless(ours: dict[str, Any]) -> None:
    from solo.utils.auto_resumer import AutoResumer

    before = dict(ours)
    integration.patch()
    assert ours == before
    assert AutoResumer.SHOULD_MATCH.count("mixmask") == 1


@needs_solo
@methods
def test_a_seed_and_a_checkpoint_mean_the_same_model(
    ours: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    models = []
    for classes, block in ((ours, {"grid_size": 4}), (theirs, None)):
        torch.manual_seed(3)
        models.append(classes[name](_cfg(name, mixmask=block)))
    mine, plain = models
    assert list(mine.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, mine.state_dict().values(), plain.state_dict().values()))
    assert [len(group["params"]) for group in _groups(mine)] == [
        len(group["params"]) for group in _groups(plain)
    ]


def _groups(model: Any) -> list[dict[str, Any]]:
    return [{**group, "params": list(group["params"])} for group in model.learnable_params]


class Views(torch.utils.data.Dataset[Any]):
    """Two random crops of each of some photographs, as their loaders give them."""

    def __init__(self, count: int) -> None:
        (files, labels), _, _ = clothing64()
        by_class = [
            [index for index, label in enumerate(labels) if label == wanted]
            for wanted in range(CLASSES)
        ]
        chosen = [by_class[i % CLASSES][i // CLASSES] for i in range(count)]
        self.images = [_decode(files[index]) for index in chosen]
        self.labels = [labels[index] for index in chosen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor], int]:
        crops = []
        for _ in range(2):
            top, left = torch.randint(64 - CROP, (2,)).tolist()
            crops.append(self.images[index][:, top : top + CROP, left : left + CROP])
        return index, crops, self.labels[index]


def _decode(file: bytes) -> Tensor:
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


@needs_solo
@pytest.mark.parametrize(
    "name, precision", [("mocov2plus", "bf16-mixed"), ("swav", "32-true"), ("byol", "32-true")]
)
def test_lightning_trains_it(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, precision: str, tmp_path: Path
) -> None:
    import lightning.pytorch as pl

    views = Views(4 * N)
    single: Any = [(views[i][1][0], views[i][2]) for i in range(len(views))]
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        val_check_interval=3,
        default_root_dir=tmp_path,
    )
    cfg = _cfg(name, mixmask={"grid_size": 4, "ratio": 0.25})
    model = ours[name](cfg)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    loader = torch.utils.data.DataLoader(views, N, drop_last=True)
    # Their kNN counts the classes of the validation images, so all of them must be there.
    trainer.fit(model, loader, torch.utils.data.DataLoader(single, len(single)))
    metrics = trainer.callback_metrics
    assert trainer.global_step == 3
    assert float(metrics["train_lambda"]) == 0.25
    assert np.isfinite(float(metrics["train_mixmask_loss"]))
    assert float(metrics["val_knn_acc1"]) >= 0
    moved = {key for key, value in model.state_dict().items() if not _same(value, start.get(key))}
    assert {"backbone.conv.weight", "classifier.weight", "projector.0.weight"} <= moved
    if name == "mocov2plus":
        assert int(model.queue_ptr) == 3 * N
    if name != "swav":
        assert "momentum_backbone.conv.weight" in moved
        assert _tau(model) == 1.0 or 0.9 < float(_tau(model) or 0) < 1

    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    for classes, rebuilt in ((ours, cfg), (ours, _cfg(name)), (theirs, _cfg(name))):
        again = classes[name].load_from_checkpoint(path, strict=False, cfg=rebuilt)
        state = again.state_dict()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def _same(value: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(value, before)


# As a user runs it.

CONFIG = """
defaults:
  - _self_
  - override hydra/hydra_logging: disabled
  - override hydra/job_logging: disabled
hydra:
  output_subdir: null
  run:
    dir: .
name: run
method: mocov2plus
backbone:
  name: resnet18
method_kwargs: {proj_hidden_dim: 16, proj_output_dim: 8, temperature: 0.2, queue_size: 32}
momentum: {base_tau: 0.9, final_tau: 1.0}
data: {dataset: custom, train_path: images, val_path: images, format: image_folder, num_workers: 0}
optimizer: {name: sgd, batch_size: 8, lr: 0.1, classifier_lr: 0.1, weight_decay: 0.0}
scheduler: {name: none}
checkpoint: {enabled: true, dir: runs, frequency: 1}
auto_resume: {enabled: true}
augmentations:
  - rrc: {enabled: true, crop_min_scale: 0.2, crop_max_scale: 1.0}
    color_jitter: {prob: 0.0}
    grayscale: {prob: 0.0}
    gaussian_blur: {prob: 0.0}
    solarization: {prob: 0.0}
    equalization: {prob: 0.0}
    horizontal_flip: {prob: 0.5}
    crop_size: 32
    num_crops: 2
max_epochs: 1
accelerator: cpu
devices: "1"
strategy: auto
enable_progress_bar: false
enable_model_summary: false
num_sanity_val_steps: 0
"""
# A script of the user's own, around theirs: it writes down what each process trained.
SCRIPT = """
import json, os, sys
sys.path.insert(0, os.environ["CHECKOUT"])
from lightning.pytorch import Trainer
import main_pretrain

fit = Trainer.fit

def fit_and_tell(trainer, model, *args, **kwargs):
    mixing = repr(getattr(model, "mixmask", None))
    fit(trainer, model, *args, **kwargs)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    told = {"mixing": mixing, "metrics": metrics, "processes": trainer.world_size}
    told["weights"] = float(sum(p.double().abs().sum() for p in model.parameters()))
    with open(f"rank{trainer.global_rank}.json", "w") as file:
        json.dump(told, file)

Trainer.fit = fit_and_tell
if __name__ == "__main__":
    main_pretrain.main()
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Lay out photographs in folders of classes, a configuration and a script."""
    (files, labels), _, classes = clothing64()
    for index in range(40):
        folder = tmp_path / "images" / classes[labels[index * 80]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(files[index * 80])
    (tmp_path / "x.yaml").write_text(CONFIG)
    (tmp_path / "with_block.yaml").write_text(CONFIG + "mixmask: {grid_size: 4}\n")
    (tmp_path / "own.py").write_text(SCRIPT)
    return tmp_path


def _checkout() -> Path:
    spec = find_spec("solo")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parents[1]
    if not (folder / "main_pretrain.py").is_file():
        pytest.skip("solo-learn's scripts are not installed: they come from its repository")
    return folder


def _run(
    folder: Path, script: Path, *arguments: str, launcher: Sequence[str] = (), config: str = "x"
) -> None:
    environment = {
        **os.environ,
        "CHECKOUT": str(_checkout()),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HYDRA_FULL_ERROR": "1",
    }
    command = [sys.executable, *launcher, "-m", "mixmask.integrations.solo", str(script)]
    command += ["--config-path", str(folder), "--config-name", f"{config}.yaml", *arguments]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            # Processes that wait for each other, all of them.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output


def _saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (arguments,) = folder.glob("runs/mocov2plus/*/args.json")
    (checkpoint,) = folder.glob("runs/mocov2plus/*/*.ckpt")
    return json.loads(arguments.read_text()), torch.load(checkpoint, weights_only=False)


@needs_solo
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["+", "++"])
def test_their_script_runs_with_an_option_on_the_command_line(workplace: Path, prefix: str) -> None:
    script = _checkout() / "main_pretrain.py"
    _run(workplace, script, f"{prefix}mixmask.grid_size=2", f"{prefix}mixmask.ratio=0.25")
    arguments, checkpoint = _saved(workplace)
    assert arguments["mixmask"] == {"grid_size": 2, "ratio": 0.25}
    assert checkpoint["global_step"] == 5
    assert not [key for key in checkpoint["state_dict"] if "mix" in key]
    # Two clean and two mixed passes a step, and those of validation change nothing.
    assert int(checkpoint["state_dict"]["backbone.bn1.num_batches_tracked"]) == 5 * 4
    assert int(checkpoint["state_dict"]["momentum_backbone.bn1.num_batches_tracked"]) == 5 * 2
    assert int(checkpoint["state_dict"]["queue_ptr"]) == 5 * 8 % 32


@needs_solo
@pytest.mark.slow
def test_without_the_block_their_script_does_not_mix(workplace: Path) -> None:
    _run(workplace, _checkout() / "main_pretrain.py")
    arguments, checkpoint = _saved(workplace)
    assert "mixmask" not in arguments
    assert int(checkpoint["state_dict"]["backbone.bn1.num_batches_tracked"]) == 5 * 2


@needs_solo
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "++"])
def test_an_option_overrides_the_block_of_the_file(workplace: Path, prefix: str) -> None:
    script = workplace / "own.py"
    _run(workplace, script, f"{prefix}mixmask.grid_size=2", config="with_block")
    told = json.loads((workplace / "rank0.json").read_text())
    assert "grid_size=2" in told["mixing"]
    assert told["metrics"]["train_lambda"] == 0.5
    assert np.isfinite(told["metrics"]["train_mixmask_loss"])
    assert {"train_nce_loss", "train_acc1", "val_acc1"} <= told["metrics"].keys()


@needs_solo
@pytest.mark.slow
@pytest.mark.parametrize("started_by", ["lightning", "torchrun"])
def test_every_process_of_a_run_mixes(workplace: Path, started_by: str) -> None:
    launcher = []
    if started_by == "torchrun":
        port = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", *port]
    block = ["+mixmask.grid_size=2", "+mixmask.ratio=0.25"]
    two = ["devices='2'", "strategy=ddp", "data.val_path=null"]
    _run(workplace, workplace / "own.py", *block, *two, launcher=launcher)
    told = [json.loads((workplace / f"rank{rank}.json").read_text()) for rank in range(2)]
    for process in told:
        assert process["processes"] == 2
        assert "grid_size=2" in process["mixing"]
        assert process["metrics"]["train_lambda"] == 0.25
    assert told[0]["metrics"]["train_mixmask_loss"] == told[1]["metrics"]["train_mixmask_loss"]
    assert told[0]["weights"] == told[1]["weights"]
    arguments, checkpoint = _saved(workplace)
    assert arguments["mixmask"] == {"grid_size": 2, "ratio": 0.25}
    assert int(checkpoint["state_dict"]["queue_ptr"]) == checkpoint["global_step"] * 16 % 32


def _in_two_processes(work: Callable[..., None], tmp_path: Path) -> None:
    spawn(_process, (work, str(tmp_path / "meeting")), nprocs=2)


def _process(rank: int, work: Callable[..., None], meeting: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    from solo.methods import METHODS as REGISTERED
    from solo.methods.base import BaseMethod

    BaseMethod._BACKBONES["tiny"] = Tiny
    classes = dict(REGISTERED)
    integration.patch()
    try:
        work(REGISTERED, classes)
    finally:
        dist.destroy_process_group()


def _compare_all(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in METHODS:
        _compare(ours, theirs, name, BLOCKS["default"])
        if name != "barlow_twins":
            # Where λ differs, its gradients meet those of other processes at their λ.
            _compare(ours, theirs, name, BLOCKS["partner=random"])


def _uneven(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    del theirs
    rows = 6 - 2 * dist.get_rank()
    for name in ("mocov3", "nnclr", "simclr", "vicreg"):
        model = ours[name](_cfg(name, mixmask={"grid_size": 4}))
        criterion = model._criterion(Step(), 1)
        with pytest.raises(ValueError, match=r"as many images, got \[6, 4\] by rank; use drop"):
            criterion(torch.randn(rows, 8), torch.randn(rows, 8))


@needs_solo
@pytest.mark.slow
def test_in_two_processes_a_step_is_theirs_plus_the_mixed_term(tmp_path: Path) -> None:
    _in_two_processes(_compare_all, tmp_path)


@needs_solo
@pytest.mark.slow
def test_an_uneven_batch_is_refused_by_every_process(tmp_path: Path) -> None:
    _in_two_processes(_uneven, tmp_path)


# Without solo-learn.


def test_without_solo_learn_the_error_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("solo", "solo.methods"):
        monkeypatch.setitem(sys.modules, module, None)
    text = r"integrations\.solo needs solo-learn, .*; install it from its repository, vturrisi/"
    with pytest.raises(ImportError, match=text):
        integration.patch()


def test_the_old_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __init__(self, backbone: str, num_classes: int, max_epochs: int) -> None:
            raise AssertionError(backbone, num_classes, max_epochs)

    found = {"base": Old, "simclr": Old}
    modules: dict[str, dict[str, Any]] = {
        "solo": {},
        "solo.methods": {"METHODS": found},
        "solo.utils": {},
        "solo.utils.auto_resumer": {"AutoResumer": type("AutoResumer", (), {"SHOULD_MATCH": []})},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    text = r"1\.0\.6 or newer, .* built from \['backbone', 'num_classes', 'max_epochs'\]"
    with pytest.raises(ImportError, match=text):
        integration.patch()
    assert found == {"base": Old, "simclr": Old}


@pytest.mark.parametrize(
    "arguments, named",
    [([], "got none"), (["nowhere.py", "x=1"], "got 'nowhere.py'"), (["."], "'.'")],
)
def test_without_a_script_it_says_so_in_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        integration.main(arguments)
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "expected the path of solo-learn's main_pretrain.py" in line


def test_the_module_runs_and_imports_nothing_of_solo_learn() -> None:
    code = (
        "import sys, mixmask.integrations.solo\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not found & {'solo', 'lightning', 'omegaconf'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "mixmask.integrations.solo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
