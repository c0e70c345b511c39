"""MoCo with MixMask under accelerate: `python -m mixmask.examples.accelerate_loop`.

Devices, precision, several processes and gradient accumulation are accelerate's; the two lines
stay as they are. `pip install '.[train]'` brings accelerate along.
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

TEMPERATURE, MOMENTUM, LR = 0.2, 0.99, 0.03


def train(
    accelerator: Accelerator,
    encoder: nn.Module,
    queue: Tensor,
    batches: DataLoader[Any],
) -> Iterator[Tensor]:
    """Train `encoder` in place and yield the loss of each step.

    Args:
        accelerator: Built with gradient_accumulation_steps and mixed_precision, as you need.
        encoder: (N, 3, H, W) -> (N, C).
        queue: (K, C), rows of unit length, the same in each process.
        batches: A DataLoader of pairs of views (x_q, x_k), each (N, 3, H, W).
    """
    optimizer = torch.optim.SGD(encoder.parameters(), lr=LR, momentum=0.9)
    encoder, optimizer, batches = accelerator.prepare(encoder, optimizer, batches)
    encoder_k = copy.deepcopy(accelerator.unwrap_model(encoder)).requires_grad_(False)
    queue = queue.to(accelerator.device)
    masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    for x_q, x_k in batches:
        with accelerator.accumulate(encoder):
            with torch.no_grad(), accelerator.autocast():
                k = F.normalize(encoder_k(x_k), dim=1)  # (N, C)
            q = F.normalize(encoder(x_q), dim=1)  # (N, C)
            info_nce = mixmask.losses.InfoNCE(queue, TEMPERATURE)

            mixed = mixmask.mix_batch(x_q, masks)  # MixMask: line 1
            q_mixed = F.normalize(encoder(mixed.images), dim=1)  # (N, C)
            loss = info_nce(q, k)
            loss = loss + mixmask.lambda_weighted_loss(info_nce, q_mixed, k, mixed)  # line 2

            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:  # once per step of the optimizer
            trained = accelerator.unwrap_model(encoder).parameters()
            with torch.no_grad():
                for param_k, param_q in zip(encoder_k.parameters(), trained, strict=True):
                    param_k.lerp_(param_q, 1 - MOMENTUM)
        keys = accelerator.gather(k).to(queue.dtype)  # (N, C) of every process
        queue = torch.cat([keys, queue])[: len(queue)]  # (K, C)
        yield loss.detach()


def main() -> None:
    """Train for a few steps and print the losses of the first process."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    encoder, queue = parts.build_encoder(), parts.build_queue()
    for step, loss in enumerate(train(accelerator, encoder, queue, parts.view_loader())):
        accelerator.print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
