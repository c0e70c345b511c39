"""Wrapped criteria in two processes, against lightly's own for one process, on both batches."""

from __future__ import annotations

import pytest

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install '.[lightly]' for these tests"
)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    DINOLoss,
    NTXentLoss,
    SwaVLoss,
    TiCoLoss,
    VICRegLoss,
)
from lightly_criteria import (
    BANK,
    BY_SAMPLE,
    TAU,
    C,
    K,
    are_same,
    copy_buffers,
    draw_embeddings,
    draw_mixed,
    mixed_term,
)
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from mixmask import MixedBatch
from mixmask.integrations.lightly import wrap

# lightly's DCLWLoss copies a tensor with torch.tensor.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


# Two processes. The reference in each is lightly's criterion for one process, on both batches.

HALF = 4
GATHERED: dict[str, Callable[[bool], Any]] = {
    "ntxent": lambda gather: NTXentLoss(TAU, gather_distributed=gather),
    "bank": lambda gather: NTXentLoss(TAU, (BANK, C), gather_distributed=gather),
    "vicreg": lambda gather: VICRegLoss(10.0, 5.0, 2.0, gather_distributed=gather),
    "dcl": lambda gather: DCLLoss(TAU, gather_distributed=gather),
    "tico": lambda gather: TiCoLoss(0.7, 3.0, gather_distributed=gather),
}


def _halves(whole: list[Tensor], rank: int) -> list[Tensor]:
    rows = slice(rank * HALF, (rank + 1) * HALF)
    return [tensor.detach()[rows].clone().requires_grad_() for tensor in whole]


def _own(mixed: MixedBatch, rank: int) -> MixedBatch:
    rows = slice(rank * HALF, (rank + 1) * HALF)
    lam = mixed.lam[rows] if mixed.lam.ndim else mixed.lam
    return MixedBatch(mixed.images[rows], lam, mixed.partner[rows] - rank * HALF)


def _meet(ours: Tensor, own: list[Tensor], slow: Tensor, whole: list[Tensor]) -> None:
    """Averaged over the processes, as DDP does, loss and gradients are those of one process."""
    total = ours.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, slow.detach(), rtol=1e-6, atol=1e-6)
    rows = slice(dist.get_rank() * HALF, (dist.get_rank() + 1) * HALF)
    mine = torch.autograd.grad(ours.sum(), own)
    for grad, expected in zip(mine, torch.autograd.grad(slow.sum(), whole), strict=True):
        torch.testing.assert_close(grad / 2, expected[rows], rtol=1e-6, atol=1e-6)


def _check_pairs(rank: int) -> None:
    for name, build in GATHERED.items():
        for per_sample in (False, name in BY_SAMPLE):
            alone, gathering = build(False).double(), build(True).double()
            for buffer, other in zip(alone.buffers(), gathering.buffers(), strict=True):
                buffer.copy_(other)
            wrapped = wrap(gathering)
            for _ in range(3):
                whole = draw_embeddings(3, 2 * HALF)
                mixed = draw_mixed(2 * HALF, per_sample=per_sample, halves=2)
                z, target, z_mixed = whole
                slow = mixed_term(alone, z_mixed, target, mixed) + alone(z, target)
                own = _halves(whole, rank)
                _meet(wrapped(*own, _own(mixed, rank)), own, slow, whole)
                assert are_same(copy_buffers(gathering), copy_buffers(alone))


def _check_crops(rank: int) -> None:
    whole = draw_embeddings(4, 2 * HALF, K)
    mixed = draw_mixed(2 * HALF, per_sample=True, halves=2)
    own = _halves(whole, rank)
    given = {"z_mixed": whole[3], "mixed": mixed}
    slow = wrap(SwaVLoss())(whole[:2], [whole[2]], **given)
    ours = wrap(SwaVLoss(sinkhorn_gather_distributed=True))(
        own[:2], [own[2]], z_mixed=own[3], mixed=_own(mixed, rank)
    )
    _meet(ours, own, slow, whole)

    alone, split = DINOLoss(K).double(), DINOLoss(K).double()
    for _ in range(2):
        teacher = [logits.detach() + 1 for logits in whole[:2]]
        slow = wrap(alone)(teacher, whole[:3], **given)
        ours = wrap(split)(
            [logits.detach() + 1 for logits in own[:2]],
            own[:3],
            z_mixed=own[3],
            mixed=_own(mixed, rank),
        )
        _meet(ours, own, slow, whole)
        torch.testing.assert_close(split.center, alone.center)


def _check_uneven(rank: int) -> None:
    n = HALF - rank
    mixed = draw_mixed(n)
    text = r"every process must hold the same number of images, got \[4, 3\] by rank; use drop"
    for criterion in (
        *(build(True) for build in GATHERED.values()),
        BarlowTwinsLoss(gather_distributed=True),
    ):
        before = copy_buffers(criterion)
        z, target, z_mixed = draw_embeddings(3, n, dtype=torch.float32)
        with pytest.raises(ValueError, match=text):
            wrap(criterion)(z, target, z_mixed, mixed)
        wrapped: Any = wrap(criterion)
        with pytest.raises(ValueError, match=text):
            wrapped.mixed_loss(z_mixed, target, mixed)
        assert are_same(copy_buffers(criterion), before)
    large = [torch.randn(n, K) for _ in range(2)]
    with pytest.raises(ValueError, match=text):
        wrap(SwaVLoss(sinkhorn_gather_distributed=True))(large, [], z_mixed=large[0], mixed=mixed)


def _process(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for check in (_check_pairs, _check_crops, _check_uneven):
            torch.manual_seed(0)
            check(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    spawn(_process, (str(tmp_path / "meeting"),), nprocs=2)
