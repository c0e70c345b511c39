"""MoCo with MixMask under accelerate: `python -m mixmask.examples.accelerate_loop`.

Devices, precision, several processes and gradient accumulation are accelerate's; the two lines
stay as they are. It needs accelerate (`pip install accelerate`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mixmask
from mixmask.examples import parts

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError("this example needs accelerate; pip install accelerate") from error


def train(
    accelerator: Accelerator, encoder: nn.Module, queue: Tensor, batches: DataLoader[Any]
) -> Iterator[Tensor]:
    """Train `encoder`, (N, 3, H, W) -> (N, C), with a queue (K, C); yield the loss of each step.

    The queue starts the same in each process. `batches` holds pairs of views, (N, 3, H, W) each.
    """
    optimizer = torch.optim.SGD(encoder.parameters(), lr=parts.LR, momentum=0.9)
    encoder, optimizer, batches = accelerator.prepare(encoder, optimizer, batches)
    encoder_k = copy.deepcopy(accelerator.unwrap_model(encoder)).requires_grad_(False)
    queue = queue.to(accelerator.device)
    masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    for x_q, x_k in batches:
        with accelerator.accumulate(encoder):
            with accelerator.autocast():
                k = F.normalize(encoder_k(x_k), dim=1)  # (N, C)
            q = F.normalize(encoder(x_q), dim=1)  # (N, C)
            info_nce = mixmask.losses.InfoNCE(queue, parts.TEMPERATURE)

            mixed = mixmask.mix_batch(x_q, masks)  # MixMask: line 1
            q_mixed = F.normalize(encoder(mixed.images), dim=1)  # (N, C)
            loss = info_nce(q, k)
            loss = loss + mixmask.lambda_weighted_loss(info_nce, q_mixed, k, mixed)  # line 2

            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:  # once per step of the optimizer
            parts.update_momentum(accelerator.unwrap_model(encoder), encoder_k)
        keys = accelerator.gather(k).to(queue.dtype)  # (N, C) of every process
        queue = torch.cat([keys, queue])[: len(queue)]  # (K, C)
        yield loss.detach()


if __name__ == "__main__":
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)  # the same queue in each process
    encoder, queue = parts.build_encoder(), parts.build_queue()
    parts.show(train(accelerator, encoder, queue, parts.load_views()), accelerator.print)
