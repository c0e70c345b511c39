"""Methods as lightly's users write them, with our lines in them."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from mixmask import BlockMaskGenerator, mix_batch
from mixmask.integrations.lightly import wrap

STEPS = 4
N = 12
LR = 0.05
MOMENTUM = 0.9
TAU = 0.2
GRID = 4
RATIO = 0.3
FEATURES = 16
WIDTH = 8
PROTOTYPES = 10
QUEUE = 3 * N

Batch = list[Tensor]


def draw_generator(step: int, view: int = 0) -> torch.Generator:
    """What a step's masks follow from."""
    return torch.Generator().manual_seed(10 * step + view)


class Method(pl.LightningModule):
    """What all of them have: a backbone, an optimizer, and a list of losses for the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, FEATURES, 3, stride=2, padding=1),
            nn.BatchNorm2d(FEATURES),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.masks = BlockMaskGenerator(GRID, RATIO)
        self.seen: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.SGD(trained, lr=LR)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        del batch, batch_idx
        self.seen.append(outputs["loss"].item())


class MoCo(Method):
    def __init__(self) -> None:
        super().__init__()
        self.head = heads.MoCoProjectionHead(FEATURES, FEATURES, WIDTH)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.head_momentum = copy.deepcopy(self.head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion: Any = wrap(NTXentLoss(TAU, memory_bank_size=(QUEUE, WIDTH)))

    def training_step(self, batch: Batch, step: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=MOMENTUM)
        update_momentum(self.head, self.head_momentum, m=MOMENTUM)
        x_query, x_key = batch[:2]
        query = self.head(self.backbone(x_query))
        with torch.no_grad():
            key = self.head_momentum(self.backbone_momentum(x_key))
        mixed = mix_batch(x_query, self.masks, generator=draw_generator(step))
        query_mixed = self.head(self.backbone(mixed.images))
        loss: Tensor = self.criterion(query, key, query_mixed, mixed)
        return loss


class SimCLR(Method):
    def __init__(self, *, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.head = heads.SimCLRProjectionHead(FEATURES, FEATURES, WIDTH)
        self.criterion: Any = wrap(NTXentLoss(TAU))

    def training_step(self, batch: Batch, step: int) -> Tensor:
        x0, x1 = batch[:2]
        z0, z1 = self.head(self.backbone(x0)), self.head(self.backbone(x1))
        mixed = mix_batch(x0, self.masks, generator=draw_generator(step))
        loss: Tensor = self.criterion(z0, z1, self.head(self.backbone(mixed.images)), mixed)
        if self.both:
            mixed = mix_batch(x1, self.masks, generator=draw_generator(step, 1))
            z_mixed = self.head(self.backbone(mixed.images))
            loss = loss + self.criterion.mixed_loss(z_mixed, z0, mixed)
        return loss


class BarlowTwins(SimCLR):
    def __init__(self, *, both: bool = False) -> None:
        super().__init__(both=both)
        self.head = heads.BarlowTwinsProjectionHead(FEATURES, FEATURES, WIDTH)
        self.criterion: Any = wrap(BarlowTwinsLoss())


class BYOL(Method):
    def __init__(self, *, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.head = heads.BYOLProjectionHead(FEATURES, FEATURES, WIDTH)
        self.predictor = heads.BYOLPredictionHead(WIDTH, FEATURES, WIDTH)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.head_momentum = copy.deepcopy(self.head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion: Any = wrap(NegativeCosineSimilarity())

    def predict(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.predictor(self.head(self.backbone(x)))
        return prediction

    @torch.no_grad()
    def project_by_teacher(self, x: Tensor) -> Tensor:
        projection: Tensor = self.head_momentum(self.backbone_momentum(x))
        return projection

    def training_step(self, batch: Batch, step: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=MOMENTUM)
        update_momentum(self.head, self.head_momentum, m=MOMENTUM)
        x0, x1 = batch[:2]
        p0, p1 = self.predict(x0), self.predict(x1)
        z0, z1 = self.project_by_teacher(x0), self.project_by_teacher(x1)
        mixed0 = mix_batch(x0, self.masks, generator=draw_generator(step))
        loss: Tensor = self.criterion(p0, z1, self.predict(mixed0.images), mixed0)
        if self.both:
            mixed1 = mix_batch(x1, self.masks, generator=draw_generator(step, 1))
            loss = loss + self.criterion(p1, z0, self.predict(mixed1.images), mixed1)
        else:
            loss = loss + self.criterion(p1, z0)
        return loss


class SimSiam(Method):
    def __init__(self, *, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.head = heads.SimSiamProjectionHead(FEATURES, FEATURES, WIDTH)
        self.predictor = heads.SimSiamPredictionHead(WIDTH, FEATURES, WIDTH)
        self.criterion: Any = wrap(NegativeCosineSimilarity())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(self.backbone(x))
        return z.detach(), self.predictor(z)

    def training_step(self, batch: Batch, step: int) -> Tensor:
        x0, x1 = batch[:2]
        (z0, p0), (z1, p1) = self(x0), self(x1)
        loss: Tensor = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        mixed = mix_batch(x0, self.masks, generator=draw_generator(step))
        loss = loss + self.criterion.mixed_loss(self(mixed.images)[1], z1, mixed)
        if self.both:
            mixed = mix_batch(x1, self.masks, generator=draw_generator(step, 1))
            loss = loss + self.criterion.mixed_loss(self(mixed.images)[1], z0, mixed)
        return loss


class SwaV(Method):
    def __init__(self, *, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.head = heads.SwaVProjectionHead(FEATURES, FEATURES, WIDTH)
        self.prototypes = heads.SwaVPrototypes(WIDTH, PROTOTYPES)
        self.criterion: Any = wrap(SwaVLoss())

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.prototypes(F.normalize(self.head(self.backbone(x)), dim=1))
        return scores

    def training_step(self, batch: Batch, step: int) -> Tensor:
        self.prototypes.normalize()
        scores = [self(crop) for crop in batch]
        # The first large crop, or the second and a small one.
        views = [1, 2] if self.both else [0]
        mixed = [mix_batch(batch[v], self.masks, generator=draw_generator(step, v)) for v in views]
        z_mixed = [self(one.images) for one in mixed]
        loss: Tensor = self.criterion(
            scores[:2], scores[2:], z_mixed=z_mixed, mixed=mixed, view=views
        )
        return loss.squeeze()


class DINO(Method):
    def __init__(self, *, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.head = heads.DINOProjectionHead(FEATURES, FEATURES, WIDTH, PROTOTYPES)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.head_momentum = heads.DINOProjectionHead(FEATURES, FEATURES, WIDTH, PROTOTYPES)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.head_momentum)
        self.criterion: Any = wrap(DINOLoss(PROTOTYPES, teacher_temp=0.07))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x))
        return logits

    def training_step(self, batch: Batch, step: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=MOMENTUM)
        update_momentum(self.head, self.head_momentum, m=MOMENTUM)
        with torch.no_grad():
            teacher = [self.head_momentum(self.backbone_momentum(crop)) for crop in batch[:2]]
        student = [self(crop) for crop in batch]
        views = [1, 2] if self.both else [0]
        mixed = [mix_batch(batch[v], self.masks, generator=draw_generator(step, v)) for v in views]
        z_mixed = [self(one.images) for one in mixed]
        loss: Tensor = self.criterion(teacher, student, z_mixed=z_mixed, mixed=mixed, view=views)
        return loss
