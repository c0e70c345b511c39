"""Every draw, mix and loss compiles once for all batch sizes, and exports with a dynamic batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import mixmask
from mixmask import MixedBatch, losses
from mixmask import lambda_weighted_loss as weigh

SIZES = (7, 8, 31)
QUEUE = F.normalize(torch.arange(37 * 16.0).sin().view(37, 16), dim=1)
BLOCK, DISCRETE = mixmask.BlockMaskGenerator(4, (0.2, 0.8)), mixmask.DiscreteMaskGenerator(4)

Draw = Callable[[Tensor], Any]
Loss = Callable[[Tensor, Tensor, MixedBatch], Tensor]

DRAWS: dict[str, Draw] = {
    "block masks": lambda x: BLOCK(x.shape[0]),
    "rolled block masks": lambda x: mixmask.block_masks(x.shape[0], 8, roll=True),
    "discrete masks": lambda x: mixmask.discrete_masks(x.shape[0], 8, (0.2, 0.8)),
    "mix, blocks": lambda x: mixmask.mix_batch(x, BLOCK),
    "mix, blocks per sample": lambda x: mixmask.mix_batch(x, BLOCK(x.shape[0]), partner="random"),
    "mix, cells": lambda x: mixmask.mix_batch(x, DISCRETE),
    "mix, cells per sample": lambda x: mixmask.mix_batch(x, DISCRETE(x.shape[0])),
    "mix, index": lambda x: mixmask.mix_batch(x, BLOCK, partner=torch.arange(x.shape[0]).roll(1)),
    "mixup": lambda x: mixmask.mixup_batch(x, partner="random"),
    "mixup per sample": lambda x: mixmask.mixup_batch(x, per_sample=True),
    "cutmix": lambda x: mixmask.cutmix_batch(x),
    "cutmix per sample": lambda x: mixmask.cutmix_batch(x, per_sample=True, partner="random"),
    "erase": lambda x: mixmask.erase_batch(x, BLOCK),
    "erase per sample": lambda x: mixmask.erase_batch(x, DISCRETE(x.shape[0])),
}
CRITERIA: dict[str, Callable[[], Any]] = {
    "InfoNCE": lambda: losses.InfoNCE(),
    "InfoNCE, queue": lambda: losses.InfoNCE(QUEUE),
    "NTXent": lambda: losses.NTXent(),
    "NTXent, one direction": lambda: losses.NTXent(one_directional=True, reduction="none"),
    "NegativeCosine": lambda: losses.NegativeCosine(),
    "BarlowTwins": lambda: losses.BarlowTwins(),
    "MatchedBarlowTwins": lambda: losses.MatchedBarlowTwins(),
    "VICReg": lambda: losses.VICReg(),
    "SwAV": lambda: losses.SwAV(),
    "DINO": lambda: losses.DINO(QUEUE[0]),
}
# A statistic of the batch has no value per sample.
_SHARED = ("BarlowTwins", "MatchedBarlowTwins")
_MATCHED = ("MatchedBarlowTwins",)


def _list_tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    fields = result.images, result.lam, result.partner, result.mask
    return [one for one in fields if one is not None]


class Drawing(nn.Module):
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> list[Tensor]:
        return _list_tensors(self.draw(x))


class Weighing(nn.Module):
    """Clean and mixed terms of a criterion."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.criterion, self.matched = CRITERIA[name](), name in _MATCHED
        self.whole = mixmask.LambdaWeightedLoss(self.criterion)
        self.soft, self.shared = name == "SwAV", name in _SHARED

    def forward(self, z: Tensor, target: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
        target = target.softmax(dim=1) if self.soft else target
        shares = lam[0] if self.shared else lam
        mixed = MixedBatch(z.new_empty(z.shape[0], 1, 1, 1), shares, partner)
        loss: Tensor = self.whole(z, target, z.roll(1, 1), mixed)
        return loss if self.matched else loss + weigh(self.criterion, z, target, mixed)


def _rows(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, target = F.normalize(torch.randn(2, n, 16), dim=2)
    return z, target, torch.arange(n).roll(1), torch.rand(n)


def test_no_criterion_is_left_out() -> None:
    classes = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    helpers = {"Criterion", "SharingCriterion", "MatchingCriterion", "LambdaWeightedLoss"}
    assert {name.partition(",")[0] for name in CRITERIA} >= classes - helpers


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_compiles_once_and_is_the_same(draw: Draw) -> None:
    torch._dynamo.reset()
    backend = CompileCounter()
    compiled = torch.compile(Drawing(draw), backend=backend, fullgraph=True, dynamic=True)
    for n in SIZES:
        images = torch.rand(n, 3, 16, 20)
        torch.manual_seed(n)
        found = compiled(images)
        torch.manual_seed(n)
        assert all(map(torch.equal, found, Drawing(draw)(images)))
    assert backend.frame_count == 1


@pytest.mark.parametrize("name", CRITERIA)
def test_a_loss_compiles_once_and_is_the_same(name: str) -> None:
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Weighing(name), backend=backend, fullgraph=True, dynamic=True)
    for n in SIZES:
        z, *others = _rows(n)
        values = []
        for loss in (compiled, Weighing(name)):
            leaf = z.clone().requires_grad_()
            value = loss(leaf, *others)
            values.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    assert backend.frame_count == 1


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = tuple({0: batch} for _ in inputs)
    return torch.export.export(module, inputs, dynamic_shapes=shapes).module()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_exports_with_a_dynamic_batch(draw: Draw) -> None:
    exported = _export(Drawing(draw), (torch.rand(7, 3, 16, 20),))
    for n in SIZES:
        images = torch.rand(n, 3, 16, 20)
        torch.manual_seed(n)
        found = exported(images)
        torch.manual_seed(n)
        assert all(map(torch.equal, found, Drawing(draw)(images)))


@pytest.mark.parametrize("name", CRITERIA)
def test_a_loss_exports_with_a_dynamic_batch(name: str) -> None:
    exported = _export(Weighing(name), _rows(7))
    for n in SIZES:
        rows = _rows(n)
        torch.testing.assert_close(exported(*rows), Weighing(name)(*rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_compiled_partner_outside_of_the_batch_is_refused(wrong: int) -> None:
    def mix(images: Tensor, partner: Tensor) -> Tensor:
        return mixmask.mix_batch(images, BLOCK, partner=partner).images

    compiled = torch.compile(mix, backend="eager", fullgraph=True)
    partner = torch.arange(7).roll(1)
    compiled(torch.rand(7, 3, 8, 8), partner)
    partner[2] = wrong
    with pytest.raises(ValueError, match=r"partner must lie within 0 \.\.\. 6, got"):
        compiled(torch.rand(7, 3, 8, 8), partner)
