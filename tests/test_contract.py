"""What every public object promises, whatever it computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixmask
from mixmask import MixedBatch, MixMask, lambda_weighted_loss, losses

Drawn = Callable[[Tensor, torch.Generator | None], Any]
Loss = Callable[[Tensor, Tensor], Tensor]

PARTNER = torch.tensor([2, 0, 1, 5, 3, 4, 0])
MIXED = MixedBatch(torch.zeros(7, 1, 1, 1), torch.linspace(0.1, 0.9, 7), PARTNER)
QUEUE = F.normalize(torch.arange(509 * 16.0).sin().view(509, 16), dim=1)
CENTER = torch.linspace(-0.2, 0.2, 16)
BLOCK = mixmask.BlockMaskGenerator(4, (0.2, 0.8))
MODULE = mixmask.MixMask(4, per_sample=True, partner="random")
DISCRETE = mixmask.DiscreteMaskGenerator(4, (0.2, 0.8))

# Called with images and a generator; they draw.
DRAWN: dict[str, Drawn] = {
    "BlockMaskGenerator": lambda x, g: BLOCK(len(x), device=x.device, generator=g),
    "DiscreteMaskGenerator": lambda x, g: DISCRETE(len(x), device=x.device, generator=g),
    "block_masks": lambda x, g: mixmask.block_masks(len(x), 8, device=x.device, generator=g),
    "discrete_masks": lambda x, g: mixmask.discrete_masks(len(x), 8, device=x.device, generator=g),
    "mix_batch": lambda x, g: mixmask.mix_batch(x, BLOCK, partner="random", generator=g),
    "mixup_batch": lambda x, g: mixmask.mixup_batch(x, partner="random", generator=g),
    "cutmix_batch": lambda x, g: mixmask.cutmix_batch(x, partner="random", generator=g),
    "erase_batch": lambda x, g: mixmask.erase_batch(x, BLOCK, generator=g),
    "MixMask": lambda x, g: MODULE(x, generator=g),
}
# Called with embeddings and targets.
LOSSES: dict[str, Loss] = {
    "info_nce": lambda z, t: losses.info_nce(z, t),
    "info_nce, queue": lambda z, t: losses.info_nce(z, t, QUEUE.to(z)),
    "InfoNCE": lambda z, t: losses.InfoNCE(temperature=0.1)(z, t),
    "InfoNCE, queue": lambda z, t: losses.InfoNCE(QUEUE.to(z), 0.1)(z, t),
    "InfoNCE, asked for its queue": lambda z, t: losses.InfoNCE(lambda: QUEUE.to(z), 0.1)(z, t),
    "nt_xent": lambda z, t: losses.nt_xent(z, t),
    "NTXent, one direction": lambda z, t: losses.NTXent(0.1, one_directional=True)(z, t),
    "negative_cosine": lambda z, t: losses.negative_cosine(z, t),
    "NegativeCosine": lambda z, t: losses.NegativeCosine()(z, t),
    "barlow_twins": lambda z, t: losses.barlow_twins(z, t),
    "BarlowTwins": lambda z, t: losses.BarlowTwins(0.1)(z, t),
    "MatchedBarlowTwins": lambda z, t: _whole(losses.MatchedBarlowTwins(0.1), z, t, _scalar(z)),
    "vicreg": lambda z, t: losses.vicreg(z, t),
    "VICReg": lambda z, t: _whole(losses.VICReg(2, 3, 4), z, t, _each(z)),
    "swav": lambda z, t: losses.swav(z, t.softmax(dim=1)),
    "SwAV": lambda z, t: _whole(losses.SwAV(), z, t.softmax(dim=1), _each(z)),
    "sinkhorn": lambda z, t: losses.swav(z, losses.sinkhorn(t)),
    "dino": lambda z, t: losses.dino(z, t),
    "DINO": lambda z, t: _whole(losses.DINO(CENTER.to(z)), z, t, _each(z)),
    "DINO, asked for its center": lambda z, t: losses.DINO(lambda: CENTER.to(z))(z, t),
    "update_center": lambda z, t: losses.dino(z, t, losses.update_center(CENTER.to(z), t)),
    "LambdaWeightedLoss": lambda z, t: _whole(F.mse_loss, z, t, _scalar(z)),
    "LambdaWeightedLoss, sharing": lambda z, t: _whole(losses.NTXent(), z, t, _each(z)),
    "LambdaWeightedLoss, both directions": lambda z, t: mixmask.LambdaWeightedLoss(
        losses.NegativeCosine(), directions="mean"
    )((z, t), (t, z.detach()), [z.roll(1, 1), t.roll(1, 1)], [_scalar(z), _scalar(t)]),
    "lambda_weighted_loss": lambda z, t: mixmask.lambda_weighted_loss(F.mse_loss, z, t, _scalar(z)),
    "lambda_weighted_loss, sharing": lambda z, t: mixmask.lambda_weighted_loss(
        losses.InfoNCE(QUEUE.to(z)), z, t, _each(z)
    ),
}
# Neither draws nor is a loss: tested here by name, or a type that only describes others.
OTHERS = {
    "MixedBatch",
    "cells_to_pixels",
    "losses",
    "Criterion",
    "MatchingCriterion",
    "SharingCriterion",
    "__version__",
}

STORED: dict[str, Any] = {
    "BlockMaskGenerator": mixmask.BlockMaskGenerator(8, (0.2, 0.8), min_cells=2, roll=True),
    "DiscreteMaskGenerator": mixmask.DiscreteMaskGenerator(8, 0.3),
    "MixMask": mixmask.MixMask(4, 0.3, "discrete", per_sample=True, partner="random"),
    "InfoNCE": losses.InfoNCE(temperature=0.1, reduction="none"),
    "InfoNCE, queue": losses.InfoNCE(QUEUE, 0.1),
    "NTXent": losses.NTXent(0.1, one_directional=True, reduction="none"),
    "NegativeCosine": losses.NegativeCosine(reduction="none"),
    "BarlowTwins": losses.BarlowTwins(0.1, gather_distributed=True),
    "MatchedBarlowTwins": losses.MatchedBarlowTwins(0.1),
    "VICReg": losses.VICReg(2, 3, 4),
    "SwAV": losses.SwAV(0.3, reduction="none"),
    "DINO": losses.DINO(CENTER, 0.3, 0.5),
    "RecordingCriterion": mixmask.RecordingCriterion(losses.NegativeCosine(), calls=2),
    "LambdaWeightedLoss": mixmask.LambdaWeightedLoss(
        losses.NegativeCosine(), switch=False, ignore=("calls",)
    ),
    "MixedBatch": MIXED,
}
# Not records of options: modules, and what keeps a step until it is read.
MODULES = {"MixMask", "LambdaWeightedLoss", "RecordingCriterion"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

drawn = pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
loss_functions = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def _scalar(z: Tensor) -> MixedBatch:
    return MixedBatch(MIXED.images, torch.tensor(0.3), PARTNER.to(z.device))


def _each(z: Tensor) -> MixedBatch:
    return MixedBatch(MIXED.images, MIXED.lam, PARTNER.to(z.device))


def _whole(criterion: Loss, z: Tensor, target: Tensor, mixed: MixedBatch) -> Tensor:
    loss: Tensor = mixmask.LambdaWeightedLoss(criterion)(z, target, z.roll(1, 1), mixed)
    return loss


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(7, 3, 16, 20) * 200).to(dtype)


def _rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    z, target = F.normalize(torch.randn(2, 7, 16), dim=2).to(dtype)
    return z, target


def _tensors(result: Any) -> list[Tensor]:
    """List what an object returned."""
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, MixedBatch)
    fields = (result.images, result.lam, result.partner, result.mask)
    return [field for field in fields if field is not None]


def _same(one: Any, other: Any) -> bool:
    ours, theirs = _tensors(one), _tensors(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_every_public_object_is_held_to_the_contract() -> None:
    named = {name.partition(",")[0] for name in (*DRAWN, *LOSSES, *STORED)} | OTHERS
    assert named == set(mixmask.__all__) | set(losses.__all__)
    for module in (mixmask, losses):
        assert all(hasattr(module, name) for name in module.__all__)


@drawn
def test_the_generator_decides(draw: Drawn) -> None:
    images = _images()
    first = draw(images, _seeded(1))
    assert _same(first, draw(images, _seeded(1)))
    assert not _same(first, draw(images, _seeded(2)))
    generator = _seeded(1)
    assert _same(first, draw(images, generator))
    assert not _same(first, draw(images, generator))


@drawn
def test_a_given_generator_leaves_the_global_one_alone(draw: Drawn) -> None:
    before = torch.random.get_rng_state()
    draw(_images_without_drawing(), _seeded(1))
    assert torch.equal(before, torch.random.get_rng_state())


def _images_without_drawing() -> Tensor:
    return torch.arange(7 * 3 * 16 * 20.0).view(7, 3, 16, 20)


@drawn
def test_the_global_generator_is_the_default(draw: Drawn) -> None:
    images = _images()
    torch.manual_seed(1)
    first, second = draw(images, None), draw(images, None)
    torch.manual_seed(1)
    assert _same(first, draw(images, None))
    assert not _same(first, second)


@drawn
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_dtypes_are_kept_and_inputs_unchanged(draw: Drawn, dtype: torch.dtype) -> None:
    if dtype == torch.uint8 and draw is DRAWN["erase_batch"]:
        with pytest.raises(TypeError, match="needs floating images"):
            draw(_images(dtype), None)
        return
    images = _images(dtype)
    before = images.clone()
    result = draw(images, _seeded(1))
    assert torch.equal(images, before)
    if isinstance(result, MixedBatch):
        assert result.images.dtype == dtype
        assert result.images.shape == images.shape
        assert result.lam.dtype == torch.float32
        assert result.partner.dtype == torch.int64
        assert result.images.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


@drawn
def test_memory_layout_does_not_matter(draw: Drawn) -> None:
    images = _images()
    wide = torch.zeros(7, 3, 16, 40)
    wide[..., ::2] = images
    layouts = (
        images.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        images.transpose(2, 3).contiguous().transpose(2, 3),
    )
    for other in layouts:
        assert not other.is_contiguous()
        result, expected = draw(other, _seeded(1)), draw(images, _seeded(1))
        if draw is DRAWN["erase_batch"]:  # Noise is drawn in the order of memory.
            kept = expected.mask
            assert torch.equal(result.images[..., kept], expected.images[..., kept])
            assert torch.equal(result.mask, kept)
        else:
            assert _same(result, expected)


@drawn
def test_results_lie_where_the_images_do(draw: Drawn, device: torch.device) -> None:
    for tensor in _tensors(draw(_images().to(device), _seeded(1))):
        assert tensor.device.type == device.type


@loss_functions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_take_every_dtype(loss: Loss, dtype: torch.dtype) -> None:
    z, target = _rows(dtype)
    before = z.clone(), target.clone()
    leaf = z.clone().requires_grad_()
    value = loss(leaf, target)
    torch.autograd.backward(value)
    assert torch.equal(z, before[0])
    assert torch.equal(target, before[1])
    assert value.shape == ()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert bool(leaf.grad.any())
    exact = loss(z.double(), target.double())
    assert abs(float(value.detach()) - float(exact)) < 20 * torch.finfo(dtype).eps * max(
        1, float(exact)
    )


@loss_functions
def test_losses_take_every_layout(loss: Loss) -> None:
    z, target = _rows()
    expected = loss(z, target)
    turned = z.T.contiguous().T, target.T.contiguous().T
    wide = torch.stack([z, target], dim=2)
    for a, b in (turned, (wide[..., 0], wide[..., 1])):
        assert not a.is_contiguous()
        torch.testing.assert_close(loss(a, b), expected)


@loss_functions
def test_losses_draw_nothing_and_remember_nothing(loss: Loss) -> None:
    z, target = _rows()
    before = torch.random.get_rng_state()
    first = loss(z, target)
    assert torch.equal(first, loss(z, target))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, loss(target, z.flip(0)))


@loss_functions
def test_losses_compile_in_one_graph(loss: Loss) -> None:
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        z, target = _rows()
        leaf = z.requires_grad_()
        value = run(leaf, target)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize(
    "copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_copies_do_the_same(stored: Any, copied: Callable[[Any], Any]) -> None:
    other = copied(stored)
    assert type(other) is type(stored)
    if isinstance(stored, MixedBatch):
        assert _same(stored, other)
    elif isinstance(stored, mixmask.MixMask):
        images = _images()
        assert _same(stored(images, generator=_seeded(1)), other(images, generator=_seeded(1)))
    elif isinstance(stored, mixmask.BlockMaskGenerator | mixmask.DiscreteMaskGenerator):
        assert stored == other
        assert torch.equal(stored(5, generator=_seeded(1)), other(5, generator=_seeded(1)))
    else:
        z, target = _rows()
        assert torch.equal(stored(z, target), other(z, target))
        assert repr(stored) == repr(other)


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_stored_options_show(stored: Any) -> None:
    text = repr(stored)
    assert text.startswith(type(stored).__name__ + "(")
    shown = {
        mixmask.BlockMaskGenerator: ("grid_size=8", "ratio=(0.2, 0.8)", "min_cells=2", "roll=True"),
        mixmask.DiscreteMaskGenerator: ("grid_size=8", "ratio=0.3"),
        mixmask.MixMask: ("grid_size=4", "ratio=0.3", "Discrete", "per_sample=True", "'random'"),
        losses.InfoNCE: ("negatives=", "temperature=0.1", "reduction="),
        losses.NTXent: ("temperature=0.1", "one_directional=True", "reduction='none'"),
        losses.NegativeCosine: ("reduction='none'",),
        losses.BarlowTwins: ("redundancy_weight=0.1", "gather_distributed=True"),
        losses.MatchedBarlowTwins: ("redundancy_weight=0.1", "gather_distributed=False"),
        losses.VICReg: ("invariance_weight=2", "variance_weight=3", "covariance_weight=4"),
        losses.SwAV: ("temperature=0.3", "reduction='none'"),
        losses.DINO: ("center=", "temperature=0.3", "target_temperature=0.5"),
        mixmask.LambdaWeightedLoss: ("NegativeCosine(", "switch=False"),
        mixmask.RecordingCriterion: ("NegativeCosine(", "calls=2", "switch=True"),
        MixedBatch: ("images=", "lam=", "partner=", "mask=None"),
    }
    for option in shown[type(stored)]:
        assert option in text


@pytest.mark.parametrize("name", [name for name in STORED if name not in MODULES])
def test_stored_options_are_frozen(name: str) -> None:
    field = next(iter(STORED[name].__dataclass_fields__))
    with pytest.raises(AttributeError, match="cannot assign to field"):
        setattr(STORED[name], field, None)


def test_enlarging_takes_every_layout_and_changes_nothing() -> None:
    masks = torch.rand(5, 4, 6) < 0.5
    before = masks.clone()
    expected = mixmask.cells_to_pixels(masks, 9, 13)
    turned = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(mixmask.cells_to_pixels(turned, 9, 13), expected)
    assert torch.equal(mixmask.cells_to_pixels(masks.view(1, 5, 4, 6), 9, 13)[0], expected)
    assert torch.equal(masks, before)


def test_the_version_is_a_version() -> None:
    assert [part.isdigit() for part in mixmask.__version__.split(".")[:2]] == [True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device found")
@pytest.mark.parametrize("partner", ["reverse", "random"])
def test_nothing_waits_for_the_device(partner: str) -> None:
    images = torch.rand(16, 3, 32, 32, device="cuda")
    z, k = (torch.randn(16, 8, device="cuda", requires_grad=True) for _ in range(2))
    criterion = losses.InfoNCE(torch.randn(64, 8, device="cuda"))
    mix = MixMask(4, per_sample=True, partner=partner)

    def step() -> None:
        mixed = mix(images)
        torch.autograd.backward(lambda_weighted_loss(criterion, z, k, mixed))

    step()  # The first one compiles kernels and may wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
