"""Steps of solo-learn's methods, against theirs plus the mixed term written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from solo_models import (
    BLOCKS,
    CROP,
    build,
    compare_step,
    gradients_of,
    knn_rows,
    make_batch,
    make_cfg,
    needs_solo,
    take_step,
)
from solo_oracles import (
    METHODS,
    N,
    mixed_term,
    weigh_losses,
)
from torch import Tensor

from mixmask.integrations.solo import Step

pytest_plugins = ("solo_fixtures",)

MULTI_CROP = ["byol", "simclr", "swav"]
methods = pytest.mark.parametrize("name", METHODS)


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
    compare_step(ours, theirs, name, BLOCKS[block])


@needs_solo
@pytest.mark.parametrize("name", [name for name in METHODS if name != "barlow_twins"])
def test_the_losses_of_single_images_average_to_theirs(theirs: dict[str, Any], name: str) -> None:
    """Checks the oracle of this file, not the integration."""
    model = build(theirs, make_cfg(name))
    width = 12 if name in ("swav", "dino") else 8
    z, target = F.normalize(torch.randn(2, N, width, dtype=torch.float64), dim=2)
    full = METHODS[name].loss(model, z, target, 1)
    torch.testing.assert_close(weigh_losses(name, model, z, target, 1, torch.ones(N)), full)


@needs_solo
@methods
@pytest.mark.parametrize("block", [None, False, {"enabled": False, "grid_size": 4}], ids=str)
def test_without_the_block_nothing_changes(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, block: Any
) -> None:
    runs = []
    for classes, cfg in ((ours, make_cfg(name, mixmask=block)), (theirs, make_cfg(name))):
        model = build(classes, cfg)
        loss = take_step(model, make_batch())
        runs.append((loss, torch.get_rng_state(), model.logs, model.state_dict(), knn_rows(model)))
    (loss, state, logs, buffers, knn), expected = runs
    assert torch.equal(loss, expected[0])
    assert torch.equal(state, expected[1])
    for mine, their in ((logs, expected[2]), (buffers, expected[3])):
        assert mine.keys() == their.keys()
        assert all(torch.equal(mine[key], value) for key, value in their.items())
    assert all(map(torch.equal, knn, expected[4]))


@needs_solo
def test_steps_draw_new_masks_from_torchs_generator(ours: dict[str, Any]) -> None:
    model = build(ours, make_cfg("simclr", mixmask={"ratio": (0.1, 0.9)}))
    torch.manual_seed(0)
    shares = [
        (model.training_step(make_batch(), 0), float(model.logs["train_lambda"])) for _ in "123"
    ]
    torch.manual_seed(0)
    again = model.training_step(make_batch(), 0), float(model.logs["train_lambda"])
    assert len({share for _, share in shares}) == 3
    assert again[1] == shares[0][1]
    assert torch.equal(again[0], shares[0][0])


@needs_solo
@pytest.mark.parametrize("name", MULTI_CROP)
@pytest.mark.parametrize("small_crops", [False, True])
def test_small_crops_are_mixed_if_asked(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, small_crops: bool
) -> None:
    compare_step(ours, theirs, name, {"grid_size": 2, "small_crops": small_crops}, small=2)


@needs_solo
@pytest.mark.parametrize("name", MULTI_CROP)
def test_small_crops_pass_once_unless_asked(
    ours: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in (False, True):
        block = {"grid_size": 2, "small_crops": asked}
        model, batch = build(ours, make_cfg(name, small=2, mixmask=block)), make_batch(2)
        seen: list[Tensor] = []
        monkeypatch.setattr(model, "multicrop_forward", _spied(model.multicrop_forward, seen))
        take_step(model, batch)
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
    model = build(ours, make_cfg(name, mixmask={"grid_size": 2, "small_crops": True}))
    model.num_small_crops, model.num_crops, model.multicrop = 2, 4, True
    theirs_only = make_batch(2)
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


@needs_solo
@pytest.mark.parametrize("name", ["mocov2plus", "vicreg"])
def test_residual_networks_take_a_step(
    ours: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    backbone = {"name": "resnet18"}
    model = build(ours, make_cfg(name, backbone=backbone, mixmask={"grid_size": 2}))
    plain, before = (build(theirs, make_cfg(name, backbone=backbone)) for _ in range(2))
    loss, clean = take_step(model, make_batch()), take_step(plain, make_batch())
    mixed, _ = mixed_term(name, before, make_batch()[1], grid_size=2)
    torch.testing.assert_close(loss, clean + mixed, rtol=1e-9, atol=1e-9)


@needs_solo
@pytest.mark.parametrize("name", ["mocov3", "dino"])
def test_vision_transformers_take_a_step(
    ours: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    backbone = {"name": "vit_tiny", "kwargs": {"img_size": CROP, "patch_size": 16}}
    model = build(ours, make_cfg(name, backbone=backbone, mixmask={"grid_size": 2}))
    plain = build(theirs, make_cfg(name, backbone=backbone))
    assert type(model.backbone) is type(plain.backbone)
    loss, clean = take_step(model, make_batch()), take_step(plain, make_batch())
    torch.testing.assert_close(loss, clean + model.logs["train_mixmask_loss"])
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(model).values())


@needs_solo
@methods
def test_a_seed_and_a_checkpoint_mean_the_same_model(
    ours: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    models = []
    for classes, block in ((ours, {"grid_size": 4}), (theirs, None)):
        torch.manual_seed(3)
        models.append(classes[name](make_cfg(name, mixmask=block)))
    mine, plain = models
    assert list(mine.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, mine.state_dict().values(), plain.state_dict().values()))
    assert [len(group["params"]) for group in _groups(mine)] == [
        len(group["params"]) for group in _groups(plain)
    ]


def _groups(model: Any) -> list[dict[str, Any]]:
    return [{**group, "params": list(group["params"])} for group in model.learnable_params]
