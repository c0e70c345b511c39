"""Features of a frozen backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmask.views import normalize


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: Tensor, *, batch_size: int = 256, device: str | None = None
) -> Tensor:
    """Compute pooled features of whole images, in evaluation mode, leaving the mode as it was.

    Args:
        backbone: (N, 3, H, W) -> (N, D).
        images: (N, 3, H, W) uint8.
        batch_size: Images at a time.
        device: Where to compute. Default: where the backbone's parameters are.

    Returns:
        (N, D) float32 on that device.
    """
    where = device or next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    try:
        parts = [
            backbone(normalize(batch.to(where)).contiguous(memory_format=torch.channels_last))
            for batch in torch.split(images, batch_size)
        ]
    finally:
        backbone.train(was_training)
    return torch.cat(parts).float()
