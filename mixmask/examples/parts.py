"""What a training script has already: options, an encoder and its momentum copy, pairs of views."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mixmask.data.named import clothing64, decode_jpegs
from mixmask.data.views import RandomView

TEMPERATURE, MOMENTUM, LR = 0.2, 0.99, 0.03
DIM, QUEUE_SIZE, BATCH_SIZE, STEPS = 64, 1024, 64, 10

# Two views, (N, 3, H, W) each.
Pair = tuple[Tensor, Tensor]


def build_encoder(dim: int = DIM) -> nn.Module:
    """Build a small convolutional network, (N, 3, H, W) -> (N, dim).

    Example:
        >>> build_encoder()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """
    layers: list[nn.Module] = []
    for width, wider, kernel in ((3, 32, 5), (32, 64, 3)):
        layers += [nn.Conv2d(width, wider, kernel, stride=2), nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, dim))


@torch.no_grad()
def update_momentum(encoder: nn.Module, encoder_k: nn.Module) -> None:
    """Move the keys' encoder towards that of the queries (MoCo, eq. 2)."""
    for param_q, param_k in zip(encoder.parameters(), encoder_k.parameters(), strict=True):
        param_k.lerp_(param_q, 1 - MOMENTUM)


def build_queue(size: int = QUEUE_SIZE, dim: int = DIM) -> Tensor:
    """Return (size, dim) random rows of unit length."""
    return F.normalize(torch.randn(size, dim), dim=1)


def load_images(n: int) -> Tensor:
    """Return (n, 3, 64, 64) uint8 images: the embedded ones, or noise where Pillow is missing."""
    (files, _), _, _ = clothing64()
    try:
        return decode_jpegs(files[:: max(1, len(files) // n)][:n])  # Over all classes.
    except ImportError:
        return torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8)


def load_views(steps: int = STEPS, batch_size: int = BATCH_SIZE) -> DataLoader[Any]:
    """Load pairs (x_q, x_k) of random views, each (N, 3, 32, 32), about standardised.

    Example:
        >>> x_q, x_k = next(iter(load_views(batch_size=4)))
        >>> x_q.shape, x_k.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 3, 32, 32]))
    """
    view, images = RandomView(32), load_images(steps * batch_size)
    return DataLoader(TensorDataset(view(images), view(images)), batch_size, shuffle=True)


def start() -> tuple[nn.Module, Tensor, Iterable[Pair]]:
    """Return an encoder, a queue and pairs of views, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = ((x_q.to(device), x_k.to(device)) for x_q, x_k in load_views())
    return build_encoder().to(device), build_queue().to(device), pairs


def show(losses: Iterable[Tensor], write: Callable[[str], object] = print) -> None:
    """Print the loss of each step."""
    write("The loss rises at first, while real keys replace the queue's random ones.")
    for step, loss in enumerate(losses):
        write(f"step {step}: loss {loss.item():.3f}")
