"""RandomMixMask as a kornia augmentation, alone and in containers."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import kornia
import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia.augmentation.container.ops import ClassSequentialOps
from torch import Tensor

from mixmask import MixMask, lambda_weighted_loss, mix_batch
from mixmask.integrations import kornia as integration
from mixmask.integrations.kornia import RandomMixMask, take_labels
from mixmask.losses import InfoNCE

VERSION = tuple(int(part) for part in kornia.__version__.split(".")[:2])
BOTH = ["input", "class"]
# kornia's annotation leaves out its mix augmentations.
Sequential: Any = K.AugmentationSequential
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "per_sample": {"per_sample": True, "ratio": (0.2, 0.8)},
    "discrete": {"pattern": "discrete", "grid_size": 3, "ratio": 0.3},
    "random": {"partner": "random", "roll": True},
    "random, per_sample": {"partner": "random", "per_sample": True, "p": 0.6},
    "half": {"p": 0.5},
    "half, same_on_batch": {"p": 0.5, "same_on_batch": True},
}
options = pytest.mark.parametrize("name", OPTIONS)


def _mix(name: str = "default", **more: Any) -> RandomMixMask:
    return RandomMixMask(**{"grid_size": 4, "data_keys": BOTH, **OPTIONS[name], **more})


def _flat(n: int, height: int = 10, width: int = 13) -> Tensor:
    """Images of which every pixel names its image."""
    return torch.arange(float(n)).view(n, 1, 1, 1).repeat(1, 3, height, width)


def _chosen(mix: RandomMixMask) -> Tensor:
    return mix._params["batch_prob"] > 0.5


@options
@pytest.mark.parametrize("n", [2, 3, 7])
def test_images_are_those_of_mix_batch(name: str, n: int, device: torch.device) -> None:
    mix = _mix(name, data_keys=None)
    x = torch.rand(n, 3, 10, 13, device=device)
    before = x.clone()
    out = mix(x)
    expected = mix_batch(x, mix._params["cells"], partner=mix._params["partner"]).images
    chosen = _chosen(mix).to(device)
    assert torch.equal(out[chosen], expected[chosen])
    assert torch.equal(out[~chosen], x[~chosen])
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "same",
    [{}, {"per_sample": True}, {"pattern": "discrete"}, {"partner": "random"}, {"roll": True}],
    ids=str,
)
def test_a_seed_means_what_it_means_to_the_module(same: dict[str, Any]) -> None:
    images = torch.rand(7, 3, 10, 13)
    torch.manual_seed(3)
    expected = MixMask(4, (0.2, 0.8), **same)(images)
    torch.manual_seed(3)
    mix = RandomMixMask(4, (0.2, 0.8), **same)
    got = mix.mixed_batch(mix(images))
    for attribute in ("images", "lam", "partner", "mask"):
        assert torch.equal(getattr(got, attribute), getattr(expected, attribute))


@options
@pytest.mark.parametrize("n", [2, 7, 8])
@pytest.mark.parametrize("seed", range(4))
def test_labels_name_the_partner_and_its_measured_share(
    name: str, n: int, seed: int, device: torch.device
) -> None:
    torch.manual_seed(seed)
    x, labels = _flat(n).to(device), torch.arange(n, device=device) + 100
    mix = _mix(name)
    out, rows = mix(x, labels)
    assert rows.shape == (n, 3)
    assert rows.device.type == device.type
    for i in range(n):
        foreign = out[i][out[i] != i]
        share = foreign.numel() / out[i].numel()
        own, other, said = rows[i].tolist()
        assert own == i + 100
        assert said == pytest.approx(share, abs=1e-6)
        if _chosen(mix)[i]:
            assert 0 < share < 1
            assert foreign.unique().tolist() == [other - 100]
        else:
            assert (other, said) == (own, 0)


@pytest.mark.parametrize("build", [K.RandomMixUpV2, RandomMixMask])
def test_rows_mean_what_they_mean_to_mixup(build: Callable[..., Any]) -> None:
    # The mean of an image without texture says how much of whom is in it.
    images = _flat(7, 16, 16)
    out, rows = build(p=1.0, data_keys=BOTH)(images, torch.arange(7))
    own, other, share = rows.T
    assert rows.shape == (7, 3)
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), (1 - share) * own + share * other)


def test_a_batch_left_out_comes_out_as_from_mixup() -> None:
    images, labels = torch.rand(5, 3, 16, 16), torch.tensor([3, 1, 4, 1, 5])
    expected = K.RandomMixUpV2(p=0.0, data_keys=BOTH)(images, labels)
    got = RandomMixMask(p=0.0, data_keys=BOTH)(images, labels)
    assert torch.equal(got[0], images)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_p_chooses_images(p: float) -> None:
    mix = RandomMixMask(2, p=p, data_keys=BOTH)
    images = _flat(2000, 4, 4)
    out, rows = mix(images, torch.arange(2000))
    changed = (out != images).flatten(1).any(dim=1)
    assert torch.equal(changed, rows[:, 2] > 0)
    assert changed.float().mean().item() == pytest.approx(p, abs=0.05)


def test_same_on_batch_chooses_batches() -> None:
    mix = RandomMixMask(2, p=0.5, same_on_batch=True, data_keys=BOTH)
    changed = [mix(_flat(6), torch.arange(6))[1][:, 2] > 0 for _ in range(40)]
    assert all(bool(c.all()) or not c.any() for c in changed)
    assert 5 < sum(bool(c.all()) for c in changed) < 35


def test_same_on_batch_is_one_mask_and_a_container_overrules_per_sample() -> None:
    mix = RandomMixMask(4, per_sample=True)
    images = torch.rand(6, 3, 8, 8)
    Sequential(mix)(images)
    cells = mix._params["cells"]
    assert cells.shape == (6, 4, 4)
    assert not torch.equal(cells, cells[:1].expand_as(cells))
    Sequential(mix, same_on_batch=True)(images)
    assert mix._params["cells"].ndim == 2


@options
def test_params_replay(name: str) -> None:
    mix = _mix(name)
    images, labels = torch.rand(7, 3, 10, 13), torch.arange(7)
    out, rows = mix(images, labels)
    params = mix._params
    kept = {key: value.clone() for key, value in params.items()}
    mix(images, labels)
    for other in (mix, _mix()):
        again, rows_again = other(images, labels, params=params)
        assert torch.equal(again, out)
        assert torch.equal(rows_again, rows)
    assert torch.equal(mix(labels, params=params, data_keys=["class"]), rows)
    assert params.keys() == kept.keys()
    assert all(torch.equal(params[key], kept[key]) for key in kept)


def test_chosen_images_may_be_given() -> None:
    mix = RandomMixMask(4, data_keys=BOTH)
    params = mix.forward_parameters((4, 3, 8, 8))
    params["batch_prob"] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    out, rows = mix(_flat(4, 8, 8), torch.arange(4), params=params)
    assert rows.tolist() == [[0, 3, 0.5], [1, 1, 0], [2, 2, 0], [3, 0, 0.5]]
    assert mix.mixed_batch(out).lam.tolist() == [0.5, 1, 1, 0.5]


@options
def test_everything_follows_torchs_global_generator(name: str) -> None:
    mix = _mix(name)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)

    def draw(seed: int, elsewhere: int) -> Tensor:
        torch.manual_seed(seed)
        random.seed(elsewhere)
        np.random.seed(elsewhere)  # noqa: NPY002
        return torch.cat([mix(images, labels)[0] for _ in range(6)])

    assert torch.equal(draw(1, 1), draw(1, 2))
    assert not torch.equal(draw(1, 1), draw(2, 1))


def test_in_a_container_after_another_augmentation() -> None:
    flip, mix = K.RandomHorizontalFlip(p=1.0), RandomMixMask(4, per_sample=True, p=0.7)
    views = Sequential(K.Resize((12, 9)), flip, mix)
    images, labels = torch.rand(7, 3, 16, 16), torch.arange(7)
    out = views(images)
    assert mix._params["forward_input_shape"].tolist() == [7, 3, 12, 9]

    clean = Sequential(K.Resize((12, 9)), flip)(images)
    assert torch.equal(out, mix(clean, params=mix._params))
    assert torch.equal(views(images, params=views._params), out)
    rows = mix(labels, params=mix._params, data_keys=["class"])
    mixed = mix.mixed_batch(out)
    assert mixed.mask is not None
    assert torch.equal(rows[:, 2], 1 - mixed.mask.float().mean(dim=(1, 2)))
    assert torch.equal(rows[:, 1], mixed.partner.float())


def test_a_container_takes_labels() -> None:
    mix = RandomMixMask(4, per_sample=True, ratio=(0.2, 0.8), p=0.7)
    views = take_labels(Sequential(K.RandomHorizontalFlip(), mix, data_keys=BOTH))
    images, labels = torch.rand(7, 3, 16, 16), torch.tensor([3, 1, 4, 1, 5, 9, 2])
    out, rows = views(images, labels)
    mixed = mix.mixed_batch(out)
    assert torch.equal(rows[:, 0], labels.float())
    assert torch.equal(rows[:, 1], labels[mixed.partner].float())
    assert torch.equal(rows[:, 2], 1 - mixed.lam)
    again = views(images, labels, params=views._params)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], rows)


def test_other_containers_and_mixes_stay_as_kornia_has_them() -> None:
    """Neither importing the integration nor a call for one container changes another."""
    own = take_labels(Sequential(K.RandomMixUpV2(), data_keys=BOTH))
    for views in (own, Sequential(RandomMixMask(2), data_keys=BOTH)):
        with pytest.raises(NotImplementedError, match="class labels"):
            views(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert ClassSequentialOps.transform.__module__.startswith("kornia.")


@options
@pytest.mark.parametrize("n", [2, 7])
def test_the_record_weighs_the_loss(name: str, n: int, device: torch.device) -> None:
    mix = _mix(name)
    images = _flat(n).to(device)
    out, rows = mix(images, torch.arange(n, device=device))
    mixed = mix.mixed_batch(out)
    assert mixed.images is out
    assert mixed.mask is not None

    # What the record says, applied once more to the clean images, is the mix.
    assert torch.equal(mix_batch(images, mixed.mask, partner=mixed.partner).images, out)
    assert torch.equal(1 - mixed.lam.expand(n), rows[:, 2])
    assert torch.equal(mixed.partner.float(), rows[:, 1])
    left_out = ~_chosen(mix).to(device)
    assert torch.equal(mixed.partner[left_out], torch.arange(n, device=device)[left_out])
    assert bool((mixed.lam.expand(n)[left_out] == 1).all())

    z = F.normalize(torch.rand(n, 5, device=device), dim=1)
    k = F.normalize(torch.rand(n, 5, device=device), dim=1)
    got = lambda_weighted_loss(InfoNCE(reduction="none"), z, k, mixed)
    logits = (z @ k.T).double() / InfoNCE().temperature
    log_prob = logits.log_softmax(dim=1)
    expected = 0.0
    for i in range(n):
        own, _, share = rows[i].tolist()
        expected -= (1 - share) * log_prob[i, int(own)] + share * _crossed(z, k, i, mixed.partner)
    assert got.item() == pytest.approx(float(expected) / n, rel=1e-4)


def _crossed(z: Tensor, k: Tensor, i: int, partner: Tensor) -> Tensor:
    """Log-probability of the partner's target when targets are permuted, as the loss does."""
    logits = (z[i] @ k[partner].T).double() / InfoNCE().temperature
    return logits.log_softmax(dim=0)[i]


def test_one_mask_for_all_gives_one_lam() -> None:
    # A batch of two is often chosen as a whole, which must not change the shape.
    images = torch.rand(2, 3, 10, 13)
    ndims = {"default": 0, "half, same_on_batch": 0, "half": 1, "per_sample": 1}
    for name, ndim in ndims.items():
        mix = _mix(name, data_keys=None)
        assert {mix.mixed_batch(mix(images)).lam.ndim for _ in range(20)} == {ndim}, name


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtypes(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and VERSION < (0, 9):
        pytest.skip("kornia takes bfloat16 images from 0.9 on")
    images = torch.rand(4, 3, 8, 8).to(dtype)
    # 4097 is the first class beyond 4096 that halves could not tell apart.
    labels = torch.tensor([4097, 4096, 300, 257]).to(label_dtype)
    out, rows = RandomMixMask(4, data_keys=BOTH)(images, labels)
    assert out.dtype == dtype
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rows[:, 0].tolist() == [4097, 4096, 300, 257]
    assert rows[:, 1].tolist() == [257, 300, 4096, 4097]
    if VERSION >= (0, 9):
        theirs = K.RandomMixUpV2(data_keys=BOTH)(images, labels)
        assert (out.dtype, rows.dtype) == (theirs[0].dtype, theirs[1].dtype)


def test_gradients_go_to_the_pixels_shown() -> None:
    mix = RandomMixMask(4, per_sample=True, p=0.5)
    images = torch.rand(6, 3, 8, 8, requires_grad=True)
    out = mix(images)
    out.sum().backward()
    mixed = mix.mixed_batch(out)
    assert mixed.mask is not None
    kept = mixed.mask[:, None].expand_as(images).double()
    taken = torch.zeros_like(kept).index_add_(0, mixed.partner, 1 - kept)
    assert images.grad is not None
    assert torch.equal(images.grad.double(), kept + taken)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_draw_the_same(clone: Callable[[RandomMixMask], RandomMixMask]) -> None:
    mix = RandomMixMask(4, 0.3, "discrete", per_sample=True, partner="random", p=0.5)
    images = torch.rand(5, 3, 8, 8)
    torch.manual_seed(1)
    expected = mix(images)
    torch.manual_seed(1)
    assert torch.equal(clone(mix)(images), expected)


@pytest.mark.parametrize("n, per_sample", [(7, True), (8, False)])
def test_what_a_step_needs_is_sent_in_one_pinned_copy(
    n: int, per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = RandomMixMask(3, per_sample=per_sample).forward_parameters((n, 3, 9, 9))
    images: Any = MagicMock(device=torch.device("cuda"))
    images.__len__.return_value = n
    pinned: list[Tensor] = []
    sent: list[Tensor] = []

    def note(tensors: list[Tensor], tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: note(pinned, tensor))
    monkeypatch.setattr(integration, "move", lambda tensor, _: note(sent, tensor))
    cells, partner = integration._send("images", images, params)
    assert torch.equal(cells, params["cells"])
    assert torch.equal(partner, params["partner"])
    assert len(sent) == len(pinned) == 1
    assert sent[0] is pinned[0]


def test_options_are_printed() -> None:
    shown = repr(RandomMixMask(4, 0.3, partner="random"))
    for option in ("RandomMixMask", "grid_size=4", "ratio=0.3", "partner=random", "p=1.0"):
        assert option in shown
