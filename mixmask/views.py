"""Random views of a batch, drawn on the device by kornia."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Channel statistics of ImageNet, the usual ones whatever the photographs.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """Bring uint8 images (N, 3, H, W) to float32 with about zero mean and unit deviation.

    Example:
        >>> normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).mean().item() < 0
        True
    """
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def denormalize(images: Tensor) -> Tensor:
    """Undo `normalize`, up to clamping: float (N, 3, H, W) within [0, 1]."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() * std + mean).clamp(0, 1)


class RandomView(nn.Module):
    """One random view of each image: crop, flip, colour jitter, grey, blur, normalisation.

    All draws follow torch's global generator. For two views of a batch, pass it twice in a row
    and split the result, which is cheaper than two calls.

    Args:
        size: Height and width of the views, in pixels.
        min_scale: Smallest share of the image's area that a crop takes; the largest is 1.
        jitter: Strength of the jitter in brightness, contrast and saturation.
        hue: Strength of the jitter in hue, at most 0.5.
        grey: Probability of a grey view.
        blur: Probability of a Gaussian blur with a deviation of 0.1 to 2 pixels.

    Source:
        Chen et al., "MoCo v2", section 3, after SimCLR.

    Example:
        >>> view = RandomView(32)
        >>> view(torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        size: int,
        *,
        min_scale: float = 0.2,
        jitter: float = 0.4,
        hue: float = 0.1,
        grey: float = 0.2,
        blur: float = 0.0,
    ) -> None:
        """Build kornia's pipeline."""
        super().__init__()
        import kornia.augmentation as K

        steps: list[Any] = [
            K.RandomResizedCrop((size, size), scale=(min_scale, 1.0), cropping_mode="resample"),
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(jitter, jitter, jitter, hue, p=0.8),
            K.RandomGrayscale(p=grey),
        ]
        if blur > 0:
            # SimCLR's kernel spans a tenth of the image; it has to be odd.
            kernel = max(3, size // 10 // 2 * 2 + 1)
            steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur))
        self.pipeline = nn.Sequential(
            *steps, K.Normalize(mean=torch.tensor(MEAN), std=torch.tensor(STD))
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return a view of each uint8 image (N, 3, H, W): (N, 3, size, size) float32."""
        view: Tensor = self.pipeline(images.float() / 255)
        return view.contiguous(memory_format=torch.channels_last)
