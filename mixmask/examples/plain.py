"""MoCo with MixMask in plain PyTorch: `python -m mixmask.examples.plain`.

Each step replaces the queue by a new tensor, as in many loops. The criterion therefore takes a
function, which returns the current queue. `InfoNCE(queue)` above the loop would keep the first
queue forever; inside the loop, as in the other examples, `InfoNCE(queue)` is also correct.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixmask
from mixmask.examples import parts


def train(encoder: nn.Module, queue: Tensor, batches: Iterable[parts.Pair]) -> Iterator[Tensor]:
    """Train `encoder`, (N, 3, H, W) -> (N, C), with a queue (K, C); yield the loss of each step."""
    encoder_k = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=parts.LR, momentum=0.9)
    info_nce = mixmask.losses.InfoNCE(lambda: queue, parts.TEMPERATURE)
    masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    for x_q, x_k in batches:
        parts.update_momentum(encoder, encoder_k)
        q = F.normalize(encoder(x_q), dim=1)  # (N, C)
        k = F.normalize(encoder_k(x_k), dim=1)  # (N, C)

        mixed = mixmask.mix_batch(x_q, masks)  # MixMask: line 1
        q_mixed = F.normalize(encoder(mixed.images), dim=1)  # (N, C)
        loss = info_nce(q, k)
        loss = loss + mixmask.lambda_weighted_loss(info_nce, q_mixed, k, mixed)  # MixMask: line 2

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([k, queue])[: len(queue)]  # (K, C), the oldest keys leave
        yield loss.detach()


if __name__ == "__main__":
    parts.show(train(*parts.start()))
