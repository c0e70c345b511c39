"""Seeds, backbones, split batch norm, momentum, queue and mixtures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixmask.trainers.methods import make_config
from mixmask.trainers.parts import (
    Queue,
    SplitBatchNorm2d,
    build_backbone,
    build_head,
    build_mixtures,
    fold_seed,
    split_batch_norm,
    update_momentum,
)


def test_fold_seed_separates_positions_and_is_stable() -> None:
    seeds = {
        fold_seed(seed, rank, step) for seed in range(5) for rank in range(5) for step in range(5)
    }
    assert len(seeds) == 125
    assert fold_seed(0, "weights") == 2141713090842002483
    assert max(seeds) < 2**62


@pytest.mark.parametrize("arch, small_stem", [("narrow", False), ("resnet18", True)])
def test_backbone_returns_pooled_features(arch: str, small_stem: bool) -> None:
    backbone = build_backbone(arch, small_stem=small_stem)
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, backbone.num_features)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"--arch resnet81 is no backbone.*nearest names: resnet"):
        build_backbone("resnet81")


def test_small_stem_refuses_other_families() -> None:
    with pytest.raises(ValueError, match="--small-stem suits ResNets only, got convnext_atto"):
        build_backbone("convnext_atto", small_stem=True)


def test_heads_of_both_versions() -> None:
    assert isinstance(build_head(8, 4, mlp=False), nn.Linear)
    assert build_head(8, 4, mlp=True)(torch.randn(2, 8)).shape == (2, 4)


def test_split_batch_norm_equals_batch_norm_of_each_part() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4)
    split, plain = SplitBatchNorm2d(5, splits=3), nn.BatchNorm2d(5)
    out = split(x)
    means, variances = [], []
    for part in range(3):
        reference = nn.BatchNorm2d(5)
        torch.testing.assert_close(out[part::3], reference(x[part::3]))
        means.append(reference.running_mean)
        variances.append(reference.running_var)
    torch.testing.assert_close(split.running_mean, torch.stack(means).mean(dim=0))  # type: ignore[arg-type]
    torch.testing.assert_close(split.running_var, torch.stack(variances).mean(dim=0))  # type: ignore[arg-type]
    plain.load_state_dict(split.state_dict(), strict=False)
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))


def test_split_batch_norm_refuses_uneven_batches() -> None:
    with pytest.raises(ValueError, match="a batch of 10 cannot be split into 3"):
        SplitBatchNorm2d(5, splits=3)(torch.randn(10, 5, 2, 2))


def test_split_batch_norm_replaces_every_layer_and_keeps_activations() -> None:
    plain = build_backbone("efficientnet_lite0").eval()
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
