"""Features of a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from mixmask.data.sets import Images
from mixmask.data.views import normalize


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: Images, *, batch_size: int = 256, device: str | None = None
) -> Tensor:
    """Compute pooled features of whole images, in evaluation mode, leaving the mode as it was.

    Args:
        backbone: (N, 3, H, W) -> (N, D).
        images: (N, 3, H, W) uint8, a tensor or sliced like one; while a batch is computed, the
            next one is read.
        batch_size: Images at a time.
        device: Where to compute. Default: where the backbone's parameters are.

    Returns:
        (N, D) float32 on that device.
    """
    where = device or next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    try:
        # Beside what `Module.compile` has set up: that would compile once more for these sizes,
        # and what a CUDA graph returns lasts only until the next batch. Hooks are kept.
        parts = [
            backbone._call_impl(
                normalize(batch.to(where)).contiguous(memory_format=torch.channels_last)
            )
            for batch in _batches(images, batch_size)
        ]
    finally:
        backbone.train(was_training)
    return torch.cat(parts).float()


def _batches(images: Images, size: int) -> Iterator[Tensor]:
    """Slice images, one batch ahead in a thread, where slicing may mean reading files."""
    starts = range(0, len(images), size)
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(images.__getitem__, slice(i, i + size)) for i in starts[:1]]
        for i in starts:
            batch = ahead.pop().result()
            if i + size < len(images):
                ahead.append(reader.submit(images.__getitem__, slice(i + size, i + 2 * size)))
            yield batch
