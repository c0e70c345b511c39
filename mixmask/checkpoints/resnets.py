"""The ResNets that torchvision, timm and Detectron2 build alike, and how keys tell them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mixmask.backbones import SLIM


class ResNet(NamedTuple):
    """A ResNet by its numbers."""

    blocks: tuple[int, ...]  # Of each stage.
    bottleneck: bool = True  # Whether a block has three convolutions, not two.
    groups: int = 1  # Of a block's 3x3 convolution.
    width: int = 64  # Channels of each group in the first stage.

    @property
    def depth(self) -> int:
        """Number of layers, by which Detectron2 names it."""
        return (3 if self.bottleneck else 2) * sum(self.blocks) + 2


# timm's and torchvision's builds of these have the same layers under the same names.
RESNETS = {
    "resnet18": ResNet((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNet((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNet((3, 4, 6, 3)),
    "resnet101": ResNet((3, 4, 23, 3)),
    "resnet152": ResNet((3, 8, 36, 3)),
    "wide_resnet50_2": ResNet((3, 4, 6, 3), width=128),
    "wide_resnet101_2": ResNet((3, 4, 23, 3), width=128),
    "resnext50_32x4d": ResNet((3, 4, 6, 3), groups=32, width=4),
    "resnext101_32x8d": ResNet((3, 4, 23, 3), groups=32, width=8),
    "resnext101_64x4d": ResNet((3, 4, 23, 3), groups=64, width=4),
}
_OURS = {arch: ResNet((1, 1, 1, 1), bottleneck=False, width=width) for arch, width in SLIM.items()}


def infer_arch(state: Mapping[str, Tensor]) -> str | None:
    """Tell a ResNet by its blocks; None where the keys leave it open.

    Example:
        >>> infer_arch({"blocks.0.attn.qkv.weight": Tensor()}) is None
        True
    """
    second = state.get("layer1.0.conv2.weight")  # (groups * width, width, 3, 3)
    if second is None:
        return None
    found = {match.groups() for name in state if (match := re.match(r"layer(\d)\.(\d+)\.", name))}
    blocks = tuple(sum(stage == number for stage, _ in found) for number in "1234")
    width = second.shape[1]
    numbers = ResNet(blocks, "layer1.0.conv3.weight" in state, len(second) // max(width, 1), width)
    # Variants with a stem of several convolutions share these numbers; ours are among them.
    known = RESNETS if "conv1.weight" in state else _OURS
    return next((arch for arch, resnet in known.items() if resnet == numbers), None)


def is_small_stem(state: Mapping[str, Tensor]) -> bool:
    """Tell the stem for small images, which has no max-pooling, by its only, 3x3 convolution."""
    first = state.get("conv1.weight")
    # HRNet and Xception begin with two of them.
    if first is None or "conv2.weight" in state:
        return False
    return first.ndim == 4 and first.shape[-1] == 3
