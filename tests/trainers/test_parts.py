"""Seeds, backbones, split batch norm, momentum, queue and mixtures."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_runs import build_tiny
from torch import nn

from mixmask._seeds import fold_seed
from mixmask.backbones import build_backbone
from mixmask.trainers.methods import METHODS, make_config
from mixmask.trainers.methods.byol import rising_momentum
from mixmask.trainers.mixtures import build_mixtures
from mixmask.trainers.parts import (
    Queue,
    SplitBatchNorm2d,
    build_head,
    build_mlp,
    split_batch_norm,
    update_momentum,
)
from mixmask.trainers.run import build_optimizer, parameter_groups


def test_fold_seed_separates_positions_and_is_stable() -> None:
    seeds = {
        fold_seed(seed, rank, step) for seed in range(5) for rank in range(5) for step in range(5)
    }
    assert len(seeds) == 125
    assert fold_seed(0, "weights") == 2141713090842002483
    assert max(seeds) < 2**62


def test_heads_of_both_versions() -> None:
    assert isinstance(build_head(8, 4, mlp=False), nn.Linear)
    assert build_head(8, 4, mlp=True)(torch.randn(2, 8)).shape == (2, 4)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.0, None])
@pytest.mark.parametrize("affine", [True, False])
def test_split_batch_norm_equals_batch_norm_of_each_part(
    momentum: float | None, affine: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 5, 4, 4) / 100  # Variances in which a larger epsilon shows.
    plain = nn.BatchNorm2d(5, eps=1e-3, momentum=momentum, affine=affine)
    split = SplitBatchNorm2d(plain, splits=3)
    references = [copy.deepcopy(plain) for _ in range(3)]
    for batch in x:
        out = split(batch)
        for part, reference in enumerate(references):
            torch.testing.assert_close(out[part::3], reference(batch[part::3]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        parts = torch.stack([getattr(each, name).float() for each in references])
        torch.testing.assert_close(getattr(split, name).float(), parts.mean(dim=0))
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x[0]), plain.eval()(x[0]))


def test_split_batch_norm_refuses_uneven_batches() -> None:
    with pytest.raises(ValueError, match="a batch of 10 cannot be split into 3"):
        SplitBatchNorm2d(nn.BatchNorm2d(5), splits=3)(torch.randn(10, 5, 2, 2))


def test_split_batch_norm_replaces_every_layer_and_keeps_activations() -> None:
    plain = build_backbone("tf_efficientnet_lite0").eval()
    x = torch.randn(2, 3, 32, 32)
    before = plain(x)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    split_batch_norm(plain, 2)
    assert sum(isinstance(module, SplitBatchNorm2d) for module in plain.modules()) == count
    torch.testing.assert_close(plain.eval()(x), before)


def test_momentum_moves_parameters_towards_the_online_ones() -> None:
    online, target = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
    before = target.weight.clone()
    update_momentum(online, target, 0.9)
    torch.testing.assert_close(target.weight, 0.9 * before + 0.1 * online.weight.detach())


@pytest.mark.parametrize("size", [7, 16, 20])
def test_queue_of_any_size_keeps_the_newest_keys(size: int) -> None:
    queue = Queue(size, dim=1)
    stream = torch.arange(60.0)[:, None]
    for batch in stream.split(6):
        queue.enqueue(batch)
    assert sorted(queue.keys[:, 0].tolist()) == stream[-size:, 0].tolist()
    assert int(queue.position) == 60 % size


def test_queue_smaller_than_a_batch_keeps_its_last_keys() -> None:
    queue = Queue(4, dim=1)
    queue.enqueue(torch.arange(10.0)[:, None])
    assert sorted(queue.keys[:, 0].tolist()) == [6, 7, 8, 9]


@pytest.mark.parametrize(
    "mix, count",
    [
        ("none", 0),
        ("mixmask", 1),
        ("unmix", 1),
        ("both", 2),
        ("erase", 1),
        ("mixup", 1),
        ("cutmix", 1),
    ],
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_mixtures_of_each_kind(mix: str, count: int, per_sample: bool) -> None:
    mixtures = build_mixtures(make_config(mix=mix, per_sample=per_sample))
    images = torch.randn(6, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    mixed = [mixture(images, generator) for mixture in mixtures]
    assert len(mixed) == count
    assert all(m.images.shape == images.shape for m in mixed)
    if mix == "both":
        assert mixed[0].partner.tolist() == [5, 4, 3, 2, 1, 0]
        assert mixed[1].partner.tolist() != mixed[0].partner.tolist()
    if mix == "erase":
        assert mixed[0].partner.tolist() == list(range(6))
    if mix == "mixmask":
        assert mixed[0].lam.shape == ((6,) if per_sample else ())


def test_unmix_mixes_globally_and_regionally() -> None:
    generator = torch.Generator().manual_seed(0)
    (unmix,) = build_mixtures(make_config(mix="unmix"))
    masks = [unmix(torch.randn(4, 3, 8, 8), generator).mask for _ in range(200)]
    regional = sum(mask is not None for mask in masks)
    assert 70 < regional < 130


def plain_parameters(model: nn.Module) -> set[int]:
    """Return the ids of biases and of all that norms hold."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
    held = {id(p) for part in model.modules() if isinstance(part, norms) for p in part.parameters()}
    return held | {id(p) for name, p in model.named_parameters() if name.endswith("bias")}


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_lars_and_adamw_spare_biases_and_norms_from_decay(method: str, optimizer: str) -> None:
    model, _, _ = build_tiny(method, optimizer=optimizer, weight_decay=0.125)
    groups = parameter_groups(model, model.config)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    assert set(decay) == {id(p) for p in model.parameters() if p.requires_grad}
    plain = plain_parameters(model) & set(decay)
    assert 0 < len(plain) < len(decay)
    for parameter, of_it in decay.items():
        assert of_it == (0 if parameter in plain and optimizer != "sgd" else 0.125)


def test_lars_adapts_the_rate_of_weights_and_takes_plain_steps_for_biases() -> None:
    layer = nn.Linear(3, 2)
    config = make_config(method="simclr", optimizer="lars", lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer(layer, config)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
    optimizer.step()
    gradient = layer.weight.grad
    ratio = 0.001 * weight.norm() / (gradient.norm() + 0.1 * weight.norm())
    expected = weight - 0.5 * ratio * (gradient + 0.1 * weight)
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5 * layer.bias.grad)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_sgd_and_lars_have_the_momentum_asked_for(optimizer: str) -> None:
    config = make_config(method="simclr", optimizer=optimizer, sgd_momentum=0.7)
    groups = build_optimizer(nn.Linear(2, 2), config).param_groups
    assert {group["momentum"] for group in groups} == {0.7}


def test_mlp_has_norms_between_its_layers_and_at_its_end_if_asked() -> None:
    kinds = [type(layer).__name__ for layer in build_mlp(4, 6, 5)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    *_, linear, norm = build_mlp(4, 6, 5, last_norm=True)
    assert isinstance(linear, nn.Linear)
    assert linear.bias is None
    assert isinstance(norm, nn.BatchNorm1d)
    assert not norm.affine


def test_rising_momentum_is_the_papers_cosine() -> None:
    for done in (0.0, 0.3, 0.5, 1.0):
        expected = 1 - (1 - 0.99) * (math.cos(math.pi * done) + 1) / 2  # BYOL, section 3.3.
        assert rising_momentum(0.99, done) == pytest.approx(expected)
    assert rising_momentum(0.9, 0.5) == pytest.approx(0.95)
