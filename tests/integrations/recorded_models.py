"""Small models with their loss in forward, written for the tests, and their losses done slowly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixmask
from mixmask import MixedBatch, losses

N, C, SIZE, STEPS = 6, 5, 8, 3
MASKS = mixmask.BlockMaskGenerator(4, 0.4)


def _network() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, C)
    )


class Pair(nn.Module):
    """An online branch with a predictor, its momentum copy, and a loss in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _network()
        self.predictor = nn.Linear(C, C)
        self.momentum = copy.deepcopy(self.encoder).requires_grad_(False)

    def online(self, x: Tensor) -> Tensor:
        p: Tensor = self.predictor(self.encoder(x))
        return p

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        z: Tensor = self.momentum(x)
        return z


class Contrastive(Pair):
    """As MoCo v3: symmetric, the loss a method."""

    def contrastive_loss(self, q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        return F.cross_entropy(logits / 0.3, torch.arange(len(q)))

    def forward(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        q_1, q_2 = self.online(x_1), self.online(x_2)
        k_1, k_2 = self.targets(x_1), self.targets(x_2)
        return self.contrastive_loss(q_1, k_2) + self.contrastive_loss(q_2, k_1)


class Cosine(Pair):
    """As SimSiam: the loss a module, of the wrong sign, halved."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion: Any = nn.CosineSimilarity(dim=1)

    def forward(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        z_1, z_2 = self.encoder(x_1), self.encoder(x_2)
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        loss: Tensor = self.criterion(p_1, z_2.detach()) + self.criterion(p_2, z_1.detach())
        return -loss.mean() / 2


class Inline(nn.Module):
    """As Barlow Twins and VICReg: the loss in line."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _network()
        self.projector = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C))

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.projector(self.backbone(x))
        return z

    def forward(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        z_1, z_2 = self.embed(x_1), self.embed(x_2)
        return losses.vicreg(z_1, z_2)


def slow_contrast(q: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    near = torch.stack([F.cosine_similarity(q, k, dim=0) for k in (key, *keys)]) / 0.3
    loss: Tensor = near[1:].logsumexp(dim=0) - near[0]
    return loss


def slow_distance(p: Tensor, z: Tensor, zs: Tensor) -> Tensor:
    del zs
    return -F.cosine_similarity(p, z, dim=0)


def slow_mixed(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    z_mixed: Tensor,
    targets: Tensor,
    mixed: MixedBatch,
) -> Tensor:
    """Eq. 4, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for i, z in enumerate(z_mixed):
        lam, j = mixed.lam.expand(N)[i].double(), int(mixed.partner[i])
        total = total + lam * loss(z, targets[i], targets) / N
        total = total + (1 - lam) * loss(z, targets[j], targets) / N
    return total


def view_pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(STEPS, 2, N, 3, SIZE, SIZE, generator=generator).double()
    return [(x[0], x[1]) for x in images]


def build(kind: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return kind().double()


def same(ours: Any, slow: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, slow, rtol=tolerance, atol=tolerance)


def draw(step: int, x: Tensor) -> MixedBatch:
    return mixmask.mix_batch(x, MASKS, generator=torch.Generator().manual_seed(step))


def contrast(z: Tensor, target: Tensor, bank: Tensor) -> Tensor:
    near = torch.cat([(z * target).sum(dim=1, keepdim=True), z @ bank.T], dim=1)
    return F.cross_entropy(near, torch.zeros(len(z), dtype=torch.long))


def fill(bank: Tensor, target: Tensor) -> Tensor:
    return torch.cat([bank, target.detach()])[len(target) :]


def first_bank() -> Tensor:
    return torch.randn(2 * N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def scaled(z: Tensor, target: Tensor, scale: float = 1.0, *, power: float = 1.0) -> Tensor:
    return scale * (z - target).abs().pow(power).mean()
