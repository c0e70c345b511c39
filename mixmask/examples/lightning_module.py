"""MoCo with MixMask as a LightningModule: `python -m mixmask.examples.lightning_module`.

Queue and key encoder are part of the module, so that checkpoints hold them. Needs Lightning,
`pip install lightning` (or pytorch-lightning).
"""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixmask
from mixmask.examples import parts

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl
    except ImportError as error:
        raise ImportError("this example needs Lightning; pip install lightning") from error


class MoCo(pl.LightningModule):  # type: ignore[misc]
    """MoCo with a mixed view; the encoder is (N, 3, H, W) -> (N, C), the queue (K, C)."""

    queue: Tensor

    def __init__(self, encoder: nn.Module, queue: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", queue)
        self.masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    def forward(self, images: Tensor) -> Tensor:
        """Return unit queries, (N, 3, H, W) -> (N, C)."""
        return F.normalize(self.encoder(images), dim=1)

    def training_step(self, batch: parts.Pair, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of one step."""
        x_q, x_k = batch  # (N, 3, H, W) each
        parts.update_momentum(self.encoder, self.encoder_k)
        k = F.normalize(self.encoder_k(x_k), dim=1)  # (N, C)
        info_nce = mixmask.losses.InfoNCE(self.queue, parts.TEMPERATURE)

        mixed = mixmask.mix_batch(x_q, self.masks)  # MixMask: line 1
        loss = info_nce(self(x_q), k)
        loss = loss + mixmask.lambda_weighted_loss(info_nce, self(mixed.images), k, mixed)  # line 2

        keys = self.all_gather(k).flatten(0, -2).to(self.queue.dtype)  # (N, C) of every process
        self.queue = torch.cat([keys, self.queue])[: len(self.queue)]  # (K, C)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD for the encoder of the queries."""
        return torch.optim.SGD(self.encoder.parameters(), lr=parts.LR, momentum=0.9)


if __name__ == "__main__":
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        trainer.fit(MoCo(parts.build_encoder(), parts.build_queue()), parts.load_views())
    print(f"loss {trainer.callback_metrics['loss'].item():.3f}")
