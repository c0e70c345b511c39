"""Images of one value each, and what was read of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixmask.data.sets import Split


def constants(values: list[int], channels: int = 3, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return images (N, C, 12, 16) of one value each."""
    tensor = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, 12, 16)
    return tensor.to(dtype) if dtype == torch.uint8 else tensor / 255


def first_pixels(images: Any) -> Tensor:
    whole = images[:]
    assert isinstance(whole, Tensor)
    return whole[:, 0, 0, 0]


def labels_of(split: Split | None) -> list[int]:
    assert split is not None
    assert split.labels is not None
    return split.labels.tolist()
