"""Small models and batches of solo-learn, and a step held against its oracle."""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from solo_oracles import (
    N,
    double_precision,
    mixed_term,
    rank,
)
from torch import Tensor, nn

CLASSES = 10
CROP = 32
SMALL_CROP = 24


def needs_solo(test: Any) -> Any:
    """Skip a test where solo-learn is missing; its libraries warn about each other's age."""
    missing = find_spec("solo") is None
    reason = "solo-learn is not installed: it comes from its repository on GitHub"
    return pytest.mark.skipif(missing, reason=reason)(pytest.mark.filterwarnings("ignore")(test))


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


def make_cfg(name: str, *, small: int = 0, mixmask: Any = None, **more: Any) -> Any:
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


def build(classes: dict[str, Any], cfg: Any) -> Any:
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
    return model.double()


def make_batch(small: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(1 + rank())
    sizes = [CROP, CROP] + [SMALL_CROP] * small
    crops = [
        torch.randn(N, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes
    ]
    return [torch.arange(N) + N * rank(), crops, torch.arange(N) % CLASSES]


@double_precision()
def take_step(model: Any, batch: list[Any]) -> Tensor:
    torch.manual_seed(5 + rank())
    loss: Tensor = model.training_step(batch, 0)
    return loss


def gradients_of(*models: Any) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, torch.zeros(())) + parameter.grad
    return total


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        off = float((ours[name] - gradient).abs().max())
        # Some are zero but for rounding, such as those of a bias before a batch norm.
        assert off <= 1e-9 * max(float(gradient.abs().max()), 1e-4 * largest), name


def _only_clean(key: str) -> bool:
    """Tell what the mixed passes may leave another trace in: the online branch's batch norms."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return key.startswith("momentum_") or not key.endswith(statistics)


def tau_of(model: Any) -> float | None:
    updater = getattr(model, "momentum_updater", None)
    return None if updater is None else float(updater.cur_tau)


def knn_rows(model: Any) -> list[Tensor]:
    return [*model.knn.train_features, *model.knn.train_targets]


def compare_step(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, block: dict[str, Any], small: int = 0
) -> None:
    """Hold one step against their step plus the mixed term written out."""
    batch = make_batch(small)
    crops = [x.clone() for x in batch[1]]
    mixing = build(ours, make_cfg(name, small=small, mixmask=block))
    plain, before = (build(theirs, make_cfg(name, small=small)) for _ in range(2))
    start = {key: value.clone() for key, value in plain.state_dict().items()}
    assert all(torch.equal(value, start[key]) for key, value in mixing.state_dict().items())

    loss = take_step(mixing, batch)
    clean = take_step(plain, batch)
    mixed, share = mixed_term(name, before, crops, **block)
    torch.testing.assert_close(loss, clean + mixed, rtol=1e-9, atol=1e-9)
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
    assert tau_of(mixing) == tau_of(plain)
    assert all(map(torch.equal, knn_rows(mixing), knn_rows(plain)))
    assert all(map(torch.equal, batch[1], crops))

    for value in (loss, clean, mixed):
        value.backward()
    found = gradients_of(mixing)
    assert_same_gradients(found, gradients_of(plain, before))
    for key in found:
        if "classifier" in key:
            assert torch.equal(found[key], gradients_of(plain)[key])


BLOCKS: dict[str, dict[str, Any]] = {
    "default": {"grid_size": 4},
    "symmetric=false": {"grid_size": 2, "pattern": "discrete", "symmetric": False},
    "switch=false": {"grid_size": 4, "switch": False, "ratio": 0.3},
    "partner=random": {"grid_size": 4, "ratio": (0.2, 0.8), "partner": "random", "roll": True},
    "per_sample=true": {"grid_size": 4, "ratio": (0.2, 0.8), "per_sample": True},
}
