"""MoCo as lightly's users train it, from lightly's own parts, on the views of our runs.

The network starts from the weights of our run of the same seed and sees the same views in the
same order; what differs is the method's code: projection head, momentum update, memory bank, loss.
"""

from __future__ import annotations

import copy
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from evidence_cells import Cell
from evidence_train import Splits, Watch, saved_rows
from torch import Tensor, nn

from mixmask._seeds import fold_seed, step_generator
from mixmask.backbones import build_backbone
from mixmask.runs.folder import Row
from mixmask.trainers.loop import learning_rate
from mixmask.trainers.methods import make_config
from mixmask.trainers.run import random_view


class LightlyMoCo(nn.Module):
    """Both branches and the criterion with its memory bank, as in lightly's example.

    Args:
        config: A MoCo configuration of ours, whose sizes and rates it takes.
    """

    def __init__(self, config: Any) -> None:
        """Build the query branch, its copy, the criterion and the optimiser."""
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.momentum = config.encoder_momentum
        self.backbone = build_backbone(config.arch)
        width = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.head = MoCoProjectionHead(width, width, config.dim)
        self.key_backbone, self.key_head = copy.deepcopy((self.backbone, self.head))
        deactivate_requires_grad(self.key_backbone)
        deactivate_requires_grad(self.key_head)
        self.to(memory_format=torch.channels_last)
        bank = (config.queue_size, config.dim)
        self.criterion = NTXentLoss(temperature=config.temperature, memory_bank_size=bank)
        self.optimizer = torch.optim.SGD(
            [*self.backbone.parameters(), *self.head.parameters()],
            lr=config.lr,
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, x1: Tensor, x2: Tensor, lr: float) -> float:
        """Train on two views (N, 3, S, S) of the same images; return the loss."""
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.key_backbone, m=self.momentum)
        update_momentum(self.head, self.key_head, m=self.momentum)
        query = self.head(self.backbone(x1))
        with torch.no_grad():
            key = self.key_head(self.key_backbone(x2))
        loss: Tensor = self.criterion(query, key)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def train_lightly(cell: Cell, splits: Splits, folder: Path) -> list[Row]:
    """Train a cell with lightly's code, from its last whole epoch where it has one.

    Args:
        cell: A cell of MoCo without mixing.
        splits: What it is trained and measured on.
        folder: Where its state is kept, after each epoch.

    Returns:
        The rows of the run, from epoch 0, as the trainers of the package return them.
    """
    config = make_config(**cell.config_options())
    torch.manual_seed(fold_seed(cell.seed, "weights"))
    model = LightlyMoCo(config)
    watch = Watch(splits, cell.epochs, config.image_size)
    rows = saved_rows(folder)
    if rows:
        _load(model, folder)
        watch.epoch = int(rows[-1]["epoch"])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        rows.append({"epoch": 0, **watch(model.backbone, True)})
    for epoch in range(watch.epoch + 1, cell.epochs + 1):
        began = time.perf_counter()
        row = {"epoch": epoch, "loss": _train_epoch(model, config, splits.images, epoch)}
        row["seconds"] = time.perf_counter() - began
        rows.append(row | watch(model.backbone, epoch == cell.epochs))
        _save(model, rows, folder)
    return rows


def _train_epoch(model: LightlyMoCo, config: Any, images: Tensor, epoch: int) -> float:
    """Train an epoch on the views that our trainer would draw; return its mean loss."""
    model.train()
    view = random_view(config, images)
    steps = len(images) // config.batch_size
    order = torch.randperm(
        len(images), generator=step_generator(config.seed, "order", epoch)
    )  # As the trainer orders them.
    losses = []
    for i, index in enumerate(order[: steps * config.batch_size].split(config.batch_size)):
        step = (epoch - 1) * steps + i
        batch = images[index].repeat(2, 1, 1, 1)  # (2N, 3, H, W)
        x1, x2 = view(batch, generator=step_generator(config.seed, 0, step)).chunk(2)
        losses.append(model.step(x1, x2, learning_rate(config, step / (steps * config.epochs))))
    return statistics.fmean(losses)


def _save(model: LightlyMoCo, rows: list[Row], folder: Path) -> None:
    content = {
        "model": model.state_dict(),
        # The memory bank is no part of the state dict.
        "bank": dict(model.criterion.named_buffers()),
        "optimizer": model.optimizer.state_dict(),
        "rows": rows,
    }
    temporary = folder / "last.pt.tmp"
    torch.save(content, temporary)
    temporary.replace(folder / "last.pt")
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _load(model: LightlyMoCo, folder: Path) -> None:
    content = torch.load(folder / "last.pt", weights_only=True)
    model.load_state_dict(content["model"])
    for name, buffer in model.criterion.named_buffers():
        buffer.copy_(content["bank"][name])
    model.optimizer.load_state_dict(content["optimizer"])
