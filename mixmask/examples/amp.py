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

TEMPERATURE, MOMENTUM, LR = 0.2, 0.99, 0.03


def train(
    encoder: nn.Module,
    queue: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float16,
) -> Iterator[Tensor]:
    """Train `encoder` in place and yield the loss of each step.

    Args:
        encoder: (N, 3, H, W) -> (N, C), in float32.
        queue: (K, C) float32, rows of unit length, on the encoder's device.
        batches: Pairs of views (x_q, x_k), each (N, 3, H, W), on the encoder's device.
        dtype: torch.float16 or torch.bfloat16.
    """
    device = queue.device.type
    encoder_k = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=LR, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    for x_q, x_k in batches:
        with torch.no_grad():
            for param_k, param_q in zip(encoder_k.parameters(), encoder.parameters(), strict=True):
                param_k.lerp_(param_q, 1 - MOMENTUM)
            with torch.autocast(device, dtype):
                k = F.normalize(encoder_k(x_k), dim=1)  # (N, C)
        info_nce = mixmask.losses.InfoNCE(queue, TEMPERATURE)
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


def main() -> None:
    """Train for a few steps and print the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    batches = ((x_q.to(device), x_k.to(device)) for x_q, x_k in parts.view_pairs())
    encoder, queue = parts.build_encoder().to(device), parts.build_queue().to(device)
    for step, loss in enumerate(train(encoder, queue, batches, dtype=dtype)):
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
