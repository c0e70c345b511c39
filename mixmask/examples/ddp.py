"""MoCo with MixMask on several processes: `torchrun --nproc-per-node 2 -m mixmask.examples.ddp`.

Each process mixes its own images and draws its own masks. Keys are gathered before they are
enqueued, so that the queue is the same everywhere. The mixed term goes backward first, inside
`no_sync()` together with its forward pass: gradients travel once per step, one forward pass is
alive at a time, and no batch norm runs twice in one graph.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mixmask
from mixmask.examples import parts


def train(encoder: nn.Module, queue: Tensor, batches: Iterable[parts.Pair]) -> Iterator[Tensor]:
    """Train `encoder`, (N, 3, H, W) -> (N, C), with a queue (K, C); yield the loss of each step.

    Encoder, queue and views are on this process's device, and each process has its own views.
    """
    parallel = DistributedDataParallel(encoder)  # gives each process the first one's weights
    dist.broadcast(queue, 0)  # and the first one's queue
    encoder_k = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=parts.LR, momentum=0.9)
    masks = mixmask.BlockMaskGenerator(grid_size=4)  # MixMask: once

    for x_q, x_k in batches:
        parts.update_momentum(encoder, encoder_k)
        k = F.normalize(encoder_k(x_k), dim=1)  # (N, C)
        info_nce = mixmask.losses.InfoNCE(queue, parts.TEMPERATURE)
        optimizer.zero_grad()

        with parallel.no_sync():  # MixMask: four lines
            mixed = mixmask.mix_batch(x_q, masks)
            q_mixed = F.normalize(parallel(mixed.images), dim=1)  # (N, C)
            mixed_loss = mixmask.lambda_weighted_loss(info_nce, q_mixed, k, mixed)
            mixed_loss.backward()

        loss = info_nce(F.normalize(parallel(x_q), dim=1), k)
        loss.backward()  # averages the gradients of both terms over the processes
        optimizer.step()

        keys = [torch.empty_like(k) for _ in range(dist.get_world_size())]
        dist.all_gather(keys, k)
        queue = torch.cat([*keys, queue])[: len(queue)]  # (K, C)
        yield (loss + mixed_loss).detach()


def main() -> None:
    """Train for a few steps and print the losses of the first process."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(dist.get_rank())  # other views and masks in each process
    parts.show(train(*parts.start()), print if dist.get_rank() == 0 else str)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
