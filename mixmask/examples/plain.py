"""MoCo with MixMask in plain PyTorch: `python -m mixmask.examples.plain`.

Each step replaces the queue by a new tensor, as in many loops. The criterion therefore takes a
function, which returns the queue of the moment. `InfoNCE(queue)` above the loop would keep the
first queue for ever; inside the loop, as in the other examples, it is right as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixmask
from mixmask.examples import parts

TEMPERATURE, MOMENTUM, LR = 0.2, 0.99, 0.03


def train(
    encoder: nn.Module, queue: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[Tensor]:
    """Train `encoder` in place and yield the loss of each step.

    Args:
        encoder: (N, 3, H, W) -> (N, C).
        queue: (K, C), rows of unit length.
        batches: Pairs of views (x_q, x_k), each (N, 3, H, W), on the encoder's device.
    """
    encoder_k = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=LR, momentum=0.9)
    info_nce = mixmask.losses.InfoNCE(lambda: queue, TEMPERATURE)
    masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    for x_q, x_k in batches:
        q = F.normalize(encoder(x_q), dim=1)  # (N, C)
        with torch.no_grad():
            for param_k, param_q in zip(encoder_k.parameters(), encoder.parameters(), strict=True):
                param_k.lerp_(param_q, 1 - MOMENTUM)
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


def main() -> None:
    """Train for a few steps and print the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = ((x_q.to(device), x_k.to(device)) for x_q, x_k in parts.view_pairs())
    encoder, queue = parts.build_encoder().to(device), parts.build_queue().to(device)
    for step, loss in enumerate(train(encoder, queue, batches)):
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
