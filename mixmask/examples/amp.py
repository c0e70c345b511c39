"""MoCo with MixMask in mixed precision: `python -m mixmask.examples.amp`.

The loss is float32 under autocast too. Each term is scaled and goes backward on its own, so that
one forward pass is alive at a time and the step needs the memory of plain MoCo; gradients add up,
and the scaler looks at them once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixmask
from mixmask.examples import parts


def train(
    encoder: nn.Module,
    queue: Tensor,
    batches: Iterable[parts.Pair],
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Tensor]:
    """Train `encoder`, (N, 3, H, W) -> (N, C), with a queue (K, C); yield the loss of each step.

    Both are float32; `dtype`, float16 or bfloat16, is that of the forward passes.
    """
    device = queue.device.type
    encoder_k = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=parts.LR, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    for x_q, x_k in batches:
        parts.update_momentum(encoder, encoder_k)
        with torch.autocast(device, dtype):
            k = F.normalize(encoder_k(x_k), dim=1)  # (N, C)
        info_nce = mixmask.losses.InfoNCE(queue, parts.TEMPERATURE)
        optimizer.zero_grad()

        mixed = mixmask.mix_batch(x_q, masks)  # MixMask: line 1
        with torch.autocast(device, dtype):
            q_mixed = F.normalize(encoder(mixed.images), dim=1)  # (N, C)
            mixed_loss = mixmask.lambda_weighted_loss(info_nce, q_mixed, k, mixed)  # line 2
        scaler.scale(mixed_loss).backward()  # line 3: frees this pass before the next one

        with torch.autocast(device, dtype):
            loss = info_nce(F.normalize(encoder(x_q), dim=1), k)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        queue = torch.cat([k.to(queue.dtype), queue])[: len(queue)]  # (K, C)
        yield (loss + mixed_loss).detach()


if __name__ == "__main__":
    parts.show(train(*parts.start()))
