"""Backbones: timm's and torchvision's by name, and two slim ResNets for runs of minutes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from mixmask._checks import one_line
from mixmask._devices import is_out_of_memory

# Our own: channels of the first of four blocks. A ResNet-18, of eight blocks, starts with 64.
SLIM = {"narrow": 16, "medium": 32}
# Tells torchvision's network from timm's of the same name, which often has other layers.
TORCHVISION = "torchvision/"
_REFUSALS = (TypeError, AssertionError, ValueError, RuntimeError)  # Of timm's families.
_HEADS = ("fc", "classifier", "heads", "head")  # torchvision's names of a classifier.


def build_backbone(
    arch: str,
    *,
    small_stem: bool = False,
    image_size: int | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
) -> nn.Module:
    """Build a backbone that returns pooled features (N, `num_features`).

    Args:
        arch: A name that timm knows, with or without a tag of pretrained weights; torchvision's
            name of a network, after "torchvision/" where timm has one of that name; "narrow": four
            blocks of 16 to 128 channels; or "medium": the same with twice the channels, four times
            the weights.
        small_stem: Replace a ResNet's stem by a 3x3 convolution of stride 1, for small images.
        image_size: Height and width of the images, in pixels. Networks of a fixed size are built
            for it; those that can take other sizes later, as timm's ViTs, still do.
            Default: the network's own.
        in_chans: Channels of the images.
        pretrained: Load timm's weights, from its cache or from where they are kept; the first
            convolution and a ViT's positions are adapted to the images. Default: none.

    Raises:
        ValueError: If there is no such backbone (the message names the nearest ones), it cannot
            be built for such images, or has no weights. `check_sizes` tells whether it takes them.
    """
    if pretrained:
        backbone = _build_pretrained(arch, small_stem, image_size, in_chans)
    elif arch in SLIM:
        backbone = _build_slim(SLIM[arch], in_chans)
    elif name := torchvision_name(arch):
        backbone = _build_torchvision(name, image_size, in_chans)
    else:
        backbone = _build_timm(arch, image_size, in_chans)
    if small_stem and arch not in SLIM:
        stem = [getattr(backbone, name, None) for name in ("conv1", "maxpool")]
        if not (isinstance(stem[0], nn.Conv2d) and isinstance(stem[1], nn.MaxPool2d)):
            raise ValueError(f"--small-stem suits ResNets only, got {arch}; leave it out")
        channels = stem[0].out_channels
        backbone.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone


def has_plain_stem(arch: str) -> bool:
    """Tell whether `small_stem` suits a network; others have a stem of their own.

    Example:
        >>> has_plain_stem("wide_resnet50_2"), has_plain_stem("resnet18d")
        (True, False)
    """
    plain = r"(torchvision/)?(wide_)?resnet\d+(_2)?(\.\w+)?"
    return arch in SLIM or re.fullmatch(plain, str(arch)) is not None


def torchvision_name(arch: str) -> str | None:
    """Return torchvision's name of a network; None for timm's and ours.

    Example:
        >>> torchvision_name("vit_b_16"), torchvision_name("torchvision/convnext_tiny")
        ('vit_b_16', 'convnext_tiny')
        >>> torchvision_name("convnext_tiny") is None  # timm has one of that name.
        True
    """
    import timm
    from torchvision import models

    name = arch.removeprefix(TORCHVISION)
    known = models.list_models(module=models)  # Those that classify.
    return name if name in known and (name != arch or not timm.is_model(name)) else None


def _build_pretrained(
    arch: str, small_stem: bool, image_size: int | None, in_chans: int
) -> nn.Module:
    """Build a network of timm with its weights."""
    import timm

    if not (timm.is_model(arch) and timm.is_model_pretrained(arch)):
        raise ValueError(
            f"--init timm needs an --arch with pretrained weights, got {arch}; leave it out, or "
            "name another one, such as resnet50"
        )
    try:
        if small_stem:
            raise ValueError("its first convolution is another")  # noqa: TRY301
        return _build_timm(arch, image_size, in_chans, pretrained=True)
    except Exception as error:  # Each library on the way fails in its own way.
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"--init timm cannot load the weights of {arch} ({one_line(error):.300}); fetch them "
            "once where there is a network, or leave out what does not fit them, such as "
            "--small-stem"
        ) from error


def _build_timm(
    arch: str, image_size: int | None, in_chans: int, *, pretrained: bool = False
) -> nn.Module:
    """Build a network of timm."""
    import timm

    known = timm.list_models()
    if arch not in known and arch not in timm.list_pretrained():
        near = ", ".join(get_close_matches(str(arch), [*SLIM, *known], 3))
        raise ValueError(f"--arch {arch} is not a timm backbone; nearest names: {near or 'none'}")
    try:
        backbone = _create_timm(arch, image_size, in_chans, pretrained=pretrained)
    except _REFUSALS as error:
        raise ValueError(
            f"--arch {arch} cannot be built for {in_chans} channels ({error}); use another"
        ) from error
    # Some families widen their features after the pooling, but report the width before it.
    width = getattr(backbone, "head_hidden_size", None)
    if width not in (None, backbone.num_features):
        backbone.num_features = width
    built: nn.Module = backbone
    return built


def _create_timm(
    arch: str, image_size: int | None, in_chans: int, *, pretrained: bool = False
) -> Any:
    """Create a network of timm for an image size, where its family knows of sizes."""
    import timm

    notes: Any = timm.get_pretrained_cfg(arch)
    sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    # What a family does not know of, it refuses with a TypeError; the last is its own size.
    attempts: list[dict[str, Any]] = (
        [{**sized, "dynamic_img_size": True}, sized] if notes.fixed_input_size else []
    )
    own: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans, "pretrained": pretrained}
    for options in attempts:
        with suppress(*_REFUSALS):
            return timm.create_model(arch, **own, **options)
    return timm.create_model(arch, **own)


def _build_torchvision(name: str, image_size: int | None, in_chans: int) -> nn.Module:
    """Build a network of torchvision without its classifier's linear layers."""
    from torchvision import models

    sized = {} if image_size is None or not name.startswith("vit_") else {"image_size": image_size}
    try:
        backbone: nn.Module = models.get_model(name, weights=None, **sized)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--arch {name} cannot take {image_size} pixels ({error})") from error
    head = next((head for head in _HEADS if hasattr(backbone, head)), "fc")
    layers = [layer for layer in getattr(backbone, head).modules() if not list(layer.children())]
    linear = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if not linear or in_chans != 3:
        fix = "use a backbone of timm" if in_chans == 3 else "use one of timm, which takes others"
        raise ValueError(f"--arch {name} has no linear classifier, or takes 3 channels only; {fix}")
    setattr(backbone, head, nn.Sequential(*layers[: linear[0]]))  # A norm stays under its number.
    backbone.num_features = layers[linear[0]].in_features
    return backbone


@torch.no_grad()
def check_sizes(backbone: nn.Module, arch: str, sizes: Iterable[int], in_chans: int = 3) -> None:
    """Check that a backbone takes images of some sizes: a few take one size alone.

    Args:
        backbone: It is back in its mode afterwards, and its statistics are unchanged.
        arch: Its name in errors.
        sizes: Heights and widths in pixels.
        in_chans: Channels of the images.

    Raises:
        ValueError: If it does not take one of them.

    Example:
        >>> check_sizes(build_backbone("narrow"), "narrow", (32, 24))
        >>> check_sizes(build_backbone("narrow"), "narrow", (0,))
        Traceback (most recent call last):
            ...
        ValueError: --arch narrow cannot take images of 0 pixels (...); use --image-size 224, ...
    """
    weight = next(backbone.parameters())
    training, size = backbone.training, 0
    backbone.eval()
    try:
        for size in sorted(set(sizes)):
            backbone(weight.new_zeros(1, in_chans, size, size))
    except Exception as error:  # Each family fails in its own way.
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        own = getattr(backbone, "pretrained_cfg", {}).get("input_size", (0, 224))[-1]
        raise ValueError(
            f"--arch {arch} cannot take images of {size} pixels ({reason}); use --image-size "
            f"{own}, for which it was made, or another --arch"
        ) from error
    finally:
        backbone.train(training)


def _build_slim(width: int, in_chans: int) -> nn.Module:
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
    slim: nn.Module = timm.create_model("resnet18", num_classes=0, in_chans=in_chans, **options)
    slim.maxpool = nn.Identity()
    return slim
