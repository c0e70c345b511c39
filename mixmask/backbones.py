"""Backbones: timm's by name, and two slim ResNets for runs of minutes."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

# Our own: channels of the first of four blocks. A ResNet-18, of eight blocks, starts with 64.
SLIM = {"narrow": 16, "medium": 32}


def build_backbone(arch: str, *, small_stem: bool = False, channels: int = 3) -> nn.Module:
    """Build an untrained backbone that returns pooled features (N, `num_features`).

    Args:
        arch: A name that timm knows, or "narrow": four blocks of 16 to 128 channels, or "medium":
            the same with twice the channels, four times the weights.
        small_stem: Replace a ResNet's stem by a 3x3 convolution of stride 1, for small images.
        channels: Of the images.

    Raises:
        ValueError: If there is no such backbone; the message names the nearest ones.
    """
    import timm

    if arch in SLIM:
        return _build_slim(SLIM[arch], channels)
    known = timm.list_models()
    if arch not in known:
        near = ", ".join(get_close_matches(arch, [*SLIM, *known], 3))
        raise ValueError(f"--arch {arch} is no backbone in timm; nearest names: {near or 'none'}")
    backbone: nn.Module = timm.create_model(arch, num_classes=0, in_chans=channels)
    if small_stem:
        if not isinstance(getattr(backbone, "maxpool", None), nn.MaxPool2d):
            raise ValueError(f"--small-stem suits ResNets only, got {arch}; leave it out")
        out = int(backbone.conv1.out_channels)  # type: ignore[union-attr, arg-type]
        backbone.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    # Some families widen their features after the pooling, but report the width before it.
    width = getattr(backbone, "head_hidden_size", None)
    if width not in (None, backbone.num_features):
        backbone.num_features = width
    return backbone


def _build_slim(width: int, channels: int) -> nn.Module:
    """Build four blocks and a stem of three small convolutions: what 32 pixels leave room for."""
    import timm

    options: dict[str, Any] = {
        "layers": (1, 1, 1, 1),
        "channels": (width, 2 * width, 4 * width, 8 * width),
        "stem_type": "deep",
        "stem_width": width // 2,
        "avg_down": True,
        "zero_init_last": False,
    }
    slim: nn.Module = timm.create_model("resnet18", num_classes=0, in_chans=channels, **options)
    slim.maxpool = nn.Identity()
    return slim
