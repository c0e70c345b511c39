"""lightly's criteria for the tests, and eq. 4 around them, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    DINOLoss,
    KoLeoLoss,
    LeJEPALoss,
    MMCRLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    TiCoLoss,
    VICRegLoss,
)
from torch import Tensor, nn

from mixmask import MixedBatch

# A bank of 17 wraps around at every third batch of 7, and loses four keys by it.
N = 7
C = 5
K = 6
BANK = 17
TAU = 0.2


class Margin(NTXentLoss):  # type: ignore[misc]
    """One of lightly's, with a `forward` of its own."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        loss: Tensor = super().forward(out0, out1)
        return F.softplus(loss - 1)


class Renamed(NTXentLoss):  # type: ignore[misc]
    """One of lightly's under another name."""


def build_tico() -> Any:
    """Some steps in, so that its covariance is not zero."""
    criterion = TiCoLoss(0.7, 3.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        criterion(*torch.randn(2, N, C))
    return criterion


CRITERIA: dict[str, Callable[[], Any]] = {
    "ntxent": lambda: NTXentLoss(TAU),
    "bank": lambda: NTXentLoss(TAU, memory_bank_size=(BANK, C)),
    "renamed": lambda: Renamed(TAU, memory_bank_size=(BANK, C)),
    "own forward": lambda: Margin(TAU, memory_bank_size=(BANK, C)),
    "cosine": NegativeCosineSimilarity,
    "barlow": lambda: BarlowTwinsLoss(0.02),
    "vicreg": lambda: VICRegLoss(10.0, 5.0, 2.0, eps=1e-3),
    "dcl": lambda: DCLLoss(TAU),
    "dclw": lambda: DCLWLoss(TAU, sigma=0.7),
    "tico": lambda: build_tico(),
}
BY_SAMPLE = ("ntxent", "bank", "renamed", "cosine", "vicreg", "tico")
WITH_BANK = ("bank", "renamed", "own forward")


def draw_mixed(
    n: int = N, *, per_sample: bool = False, halves: int = 1, seed: int | None = None
) -> MixedBatch:
    """Any permutation within each of the parts of a batch, any shares."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    part = n // halves
    partner = torch.cat(
        [torch.randperm(part, generator=generator) + part * half for half in range(halves)]
    )
    lam = torch.rand((n,) if per_sample else (), generator=generator)
    return MixedBatch(torch.empty(n, 1, 1, 1), lam, partner)


def draw_embeddings(count: int, n: int = N, c: int = C, dtype: torch.dtype = torch.float64) -> Any:
    return [torch.randn(n, c, dtype=dtype, requires_grad=True) for _ in range(count)]


def copy_buffers(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def are_same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    assert len(ours) == len(theirs)
    return all(map(torch.equal, ours, theirs))


def call_copy(criterion: Any, *arguments: Any, **more: Any) -> Tensor:
    """What lightly's criterion says as it is now; it stays so."""
    loss: Tensor = copy.deepcopy(criterion)(*arguments, **more)
    return loss


def loss_by_row(criterion: Any, z: Tensor, target: Tensor) -> Tensor:
    """lightly's loss of each image, (N,)."""
    if isinstance(criterion, NTXentLoss):
        criterion = copy.deepcopy(criterion)
        criterion.cross_entropy = nn.CrossEntropyLoss(reduction="none")
        # Without a bank there is a row for either direction.
        rows: Tensor = criterion(z, target).view(-1, len(z)).mean(dim=0)
        return rows
    pairs = zip(z.split(1), target.split(1), strict=True)
    return torch.stack([call_copy(criterion, row, other) for row, other in pairs])


def spread(criterion: Any, z: Tensor) -> Tensor:
    """VICReg's variance and covariance of one view: half of those of it and itself."""
    criterion = copy.deepcopy(criterion)
    criterion.lambda_param = 0.0
    loss: Tensor = criterion(z, z) / 2
    return loss


def mixed_term(
    criterion: Any, z: Tensor, target: Tensor, mixed: MixedBatch, *, switch: bool = True
) -> Tensor:
    """The mixed term by eq. 4, on a snapshot of the criterion."""
    other = target[mixed.partner]
    lam = mixed.lam.to(z.dtype)
    if isinstance(criterion, VICRegLoss):
        total = torch.zeros((), dtype=z.dtype)
        for i in range(len(z)):
            share = lam[i] if lam.ndim else lam
            total = total + share * ((z[i] - target[i]) ** 2).mean()
            if switch:
                total = total + (1 - share) * ((z[i] - other[i]) ** 2).mean()
        return float(criterion.lambda_param) * total / len(z) + spread(criterion, z)
    if isinstance(criterion, TiCoLoss):
        # Of a view and itself only the covariance part is left.
        total = call_copy(criterion, z, z, update_covariance_matrix=False)
        for i in range(len(z)):
            share = lam[i] if lam.ndim else lam
            total = total + share * (1 - F.cosine_similarity(z[i], target[i], 0)) / len(z)
            if switch:
                total = total + (1 - share) * (1 - F.cosine_similarity(z[i], other[i], 0)) / len(z)
        return total
    if lam.ndim:
        own, rest = loss_by_row(criterion, z, target), loss_by_row(criterion, z, other)
    else:
        own, rest = call_copy(criterion, z, target), call_copy(criterion, z, other)
    return (lam * own + (1 - lam) * rest if switch else lam * own).mean()


def assert_same_loss(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    """The same loss and the same gradients."""
    bound = 1e-9 if ours.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, slow, rtol=bound, atol=bound)
    gradients = [torch.autograd.grad(loss.sum(), inputs) for loss in (ours, slow)]
    torch.testing.assert_close(*gradients, rtol=bound, atol=bound)


ROWS = torch.randn(4, C)
SHARED = MixedBatch(torch.empty(4, 1, 1, 1), torch.tensor(0.5), torch.arange(3, -1, -1))
EACH = MixedBatch(torch.empty(4, 1, 1, 1), torch.full((4,), 0.5), torch.arange(3, -1, -1))
FEW = MixedBatch(torch.empty(3, 1, 1, 1), torch.tensor(0.5), torch.arange(2, -1, -1))


EVERY: dict[str, Callable[[], Any]] = {
    **CRITERIA,
    "swav": SwaVLoss,
    "dino": lambda: DINOLoss(K),
    "lejepa": LeJEPALoss,
    "mmcr": MMCRLoss,
    "koleo": KoLeoLoss,
}
