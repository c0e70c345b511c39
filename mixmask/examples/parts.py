"""What a training script has already: an encoder, a queue, and pairs of views."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mixmask.data.clothing import clothing64
from mixmask.data.views import RandomView

DIM, QUEUE_SIZE, BATCH_SIZE, STEPS = 64, 1024, 64, 10


def build_encoder(dim: int = DIM) -> nn.Module:
    """Build a small convolutional network, (N, 3, H, W) -> (N, dim).

    Example:
        >>> build_encoder()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, dim),
    )


def build_queue(size: int = QUEUE_SIZE, dim: int = DIM) -> Tensor:
    """Return (size, dim) random rows of unit length.

    Example:
        >>> build_queue(8, 4).shape
        torch.Size([8, 4])
    """
    return F.normalize(torch.randn(size, dim), dim=1)


def photographs(n: int) -> Tensor:
    """Return (n, 3, 64, 64) uint8 images: the embedded ones, or noise where Pillow is missing.

    Example:
        >>> photographs(2).shape
        torch.Size([2, 3, 64, 64])
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError:
        return torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8)
    (files, _), _, _ = clothing64()
    spread = files[:: max(1, len(files) // n)][:n]  # over all classes
    images = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in spread]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def view_pairs(steps: int = STEPS, batch_size: int = BATCH_SIZE) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs (x_q, x_k) of random views, each (N, 3, 32, 32), about standardised.

    Example:
        >>> x_q, x_k = next(view_pairs(batch_size=4))
        >>> x_q.shape, x_k.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 3, 32, 32]))
    """
    view = RandomView(32)
    images = photographs(min(steps, 4) * batch_size)
    for batch in itertools.islice(itertools.cycle(images.split(batch_size)), steps):
        yield view(batch), view(batch)


def view_loader(steps: int = STEPS, batch_size: int = BATCH_SIZE) -> DataLoader[Any]:
    """Return the pairs of `view_pairs` as a DataLoader, shuffled.

    Example:
        >>> len(view_loader(steps=3, batch_size=4))
        3
    """
    x_q, x_k = (torch.cat(views) for views in zip(*view_pairs(steps, batch_size), strict=True))
    return DataLoader(TensorDataset(x_q, x_k), batch_size, shuffle=True, drop_last=True)
