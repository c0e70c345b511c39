"""torchvision's Faster R-CNN and Mask R-CNN on a timm backbone."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from mixmask._seeds import fold_seed
from mixmask.backbones import build_backbone
from mixmask.checkpoints.load import Loaded, choose_normalization, load_backbone
from mixmask.data.views import MEAN, STD
from mixmask.detection.config import DetectionConfig

# The size that anchors and levels of the published recipes are made for, shorter by longer side.
_PUBLISHED_SIZE, _PUBLISHED_LONGEST = 800, 1333
_ANCHORS = (32, 64, 128, 256, 512)
_RATIOS = (0.5, 1.0, 2.0)
# Where a backbone comes from, for people to read.
Source = dict[str, object]
# What becomes of a backbone: the body of a detector, and the heads of boxes and of masks.
_Parts = tuple[Any, nn.Module, nn.Module]


def load_source(
    run: str, config: DetectionConfig, *, small_stem: bool | None = None
) -> tuple[nn.Module, DetectionConfig, Source]:
    """Load the backbone of a run, or build an untrained one where `run` is "random".

    Returns:
        The backbone, the options with its architecture and normalisation, and what results say
        of it.
    """
    arch, mean, std = config.arch, config.mean, config.std
    details: Source = {}
    if run != "random":
        loaded = load_backbone(run, arch=arch or None, small_stem=small_stem, mean=mean, std=std)
        run = str(Path(run).resolve())
        details = {"layout": loaded.layout, "taken": len(loaded.taken), "left": len(loaded.left)}
        details["pretraining"] = loaded.config
    elif arch:
        torch.manual_seed(fold_seed(config.seed, "backbone"))
        backbone = build_backbone(arch, small_stem=config.small_stem)
        mean, std = choose_normalization(mean, std, (MEAN, STD))
        loaded = Loaded(backbone, arch, config.small_stem, run, mean=mean, std=std)
    else:
        raise ValueError("a random backbone needs --arch, for instance resnet18 or narrow")
    names = ("arch", "small_stem", "mean", "std")
    options = {name: getattr(loaded, name) for name in names}
    source = {"run": run, "arch": loaded.arch, "small_stem": loaded.small_stem, **details}
    return loaded.backbone, dataclasses.replace(config, **options), source


def build_detector(backbone: nn.Module, classes: int, config: DetectionConfig) -> nn.Module:
    """Build a detector around a backbone, whose modules it takes over.

    C4 is MoCo's protocol on Pascal VOC: proposals and regions come from the third stage, and the
    last stage is the head of each region, followed by one more batch norm; masks share that head.
    FPN makes a pyramid of the last four stages, as wide as the last one and at most 256, with a
    batch norm after each of its convolutions. Anchors and the assignment of regions to levels are
    those published for 800 pixels, in proportion.

    Batch norm "train" tunes scales, shifts and statistics of all layers, as MoCo does, because
    features of self-supervised backbones have another scale than detectors are made for. A batch
    of 4 images is enough even at 160 pixels: positions count too. "frozen" keeps those of the
    backbone and puts no norms into the new layers: for batches of 1 or 2 images, and only for a
    trained backbone, since an untrained one has no statistics yet.

    Args:
        backbone: A timm model without a classifier; C4 needs a ResNet.
        classes: Number of classes without the background.
        config: The options. The longer side of an image is at most 5/3 of `size`.

    Returns:
        torchvision's detector in training mode: images in a list, (3, H, W) within 0 ... 1, and
        targets.

    Raises:
        ValueError: If the backbone lacks the stages.

    Source:
        He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", section
        4.2; Ren et al., "Faster R-CNN"; Lin et al., "Feature Pyramid Networks".

    Example:
        >>> from mixmask.backbones import build_backbone
        >>> config = DetectionConfig(size=64, proposals=50)
        >>> detector = build_detector(build_backbone("narrow"), 2, config).eval()
        >>> sorted(detector([torch.rand(3, 64, 80)])[0])
        ['boxes', 'labels', 'scores']
    """
    channels, strides = _measure_stages(backbone)
    c4, size = config.neck == "c4", config.size
    body, box_head, mask_head = (_c4_parts if c4 else _fpn_parts)(backbone, channels, config)
    # Channels behind the heads: boxes (n, C) and masks (n, C, h, w).
    mask_width = channels[-1] if c4 else body.out_channels
    box_width = mask_width if c4 else 4 * mask_width
    levels = strides[-2:-1] if c4 else strides
    # All of C4's boxes come from one stage, so it ranks more of them than a level of a pyramid.
    ranked = (6 if c4 else 1) * config.proposals
    parts: dict[str, Any] = {
        "backbone": body,
        "rpn_anchor_generator": _anchors(size, levels=1 if c4 else len(_ANCHORS)),
        "box_roi_pool": _pool(levels, size, 14 if c4 else 7),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(box_width, classes + 1),
    }
    # A step draws one of eleven shorter sides; a test takes the last, which is the whole size.
    shares = [config.min_scale + (1 - config.min_scale) * i / 10 for i in range(11)]
    kind: type[nn.Module] = FasterRCNN
    if config.model == "mask-rcnn":
        kind = MaskRCNN
        parts["mask_roi_pool"] = _pool(levels, size, 14)
        parts["mask_head"] = mask_head
        parts["mask_predictor"] = MaskRCNNPredictor(mask_width, min(256, mask_width), classes + 1)
    detector: nn.Module = kind(
        min_size=tuple(round(size * share) for share in shares),
        max_size=round(size * _PUBLISHED_LONGEST / _PUBLISHED_SIZE),
        image_mean=list(config.mean or MEAN),
        image_std=list(config.std or STD),
        size_divisible=max(strides),
        rpn_pre_nms_top_n_train=2 * ranked,
        rpn_pre_nms_top_n_test=ranked,
        rpn_post_nms_top_n_train=2 * config.proposals,
        rpn_post_nms_top_n_test=config.proposals,
        box_batch_size_per_image=config.rois,
        **parts,
    )
    if config.batch_norm == "frozen":
        for norm in batch_norms(detector):
            norm.requires_grad_(False)
    train_mode(detector)
    return detector


def batch_norms(module: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    """Yield the batch norms of a module."""
    return (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def train_mode(detector: nn.Module) -> None:
    """Set training mode, except for frozen batch norms, which keep their statistics."""
    detector.train()
    for norm in batch_norms(detector):
        if not norm.weight.requires_grad:
            norm.eval()


@torch.no_grad()
def _measure_stages(backbone: Any) -> tuple[list[int], list[int]]:
    """Measure the channels and strides of the last four stages on a blank image."""
    # timm's own figures do not apply: a stem without pooling halves the strides.
    side = 64
    try:
        blank = torch.zeros(1, 3, side, side)
        maps = backbone.eval().forward_intermediates(blank, indices=4, intermediates_only=True)
    except (AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"detection needs a backbone with four stages, such as a ResNet, got "
            f"{type(backbone).__name__} ({error})"
        ) from None
    strides = [side // features.shape[-1] for features in maps]
    if len(maps) != 4 or any(2 * low != high for low, high in pairwise(strides)):
        raise ValueError(
            f"detection needs four stages that each halve the image, such as a ResNet's; "
            f"{type(backbone).__name__} has strides {strides}"
        )
    return [features.shape[1] for features in maps], strides


def _anchors(size: int, *, levels: int) -> AnchorGenerator:
    """Build anchors of all sizes on one level, or of one size on each level."""
    sides = [max(1, round(anchor * size / _PUBLISHED_SIZE)) for anchor in _ANCHORS]
    sizes = (tuple(sides),) if levels == 1 else tuple((side,) for side in sides)
    return AnchorGenerator(sizes, (_RATIOS,) * levels)


def _pool(strides: list[int], size: int, output_size: int) -> MultiScaleRoIAlign:
    """Build region pooling for levels of known strides."""
    names = [str(i) for i in range(len(strides))]
    pool = MultiScaleRoIAlign(names, output_size, sampling_ratio=2)
    # Where they are set, torchvision does not guess them from the first batch's sizes, wrongly
    # where padding is a large part of a small image.
    pool.scales = [1 / stride for stride in strides]
    levels = [int(math.log2(stride)) for stride in strides]
    # Regions of 224 pixels at a size of 800 belong to the third of four levels.
    canonical_size = max(1, round(224 * size / _PUBLISHED_SIZE))
    canonical_level = levels[min(2, len(levels) - 1)]
    pool.map_levels = initLevelMapper(levels[0], levels[-1], canonical_size, canonical_level)
    return pool


class _Res5(nn.Module):
    """The last stage on regions (n, C, 14, 14) -> (n, C', 7, 7), and MoCo's extra norm."""

    def __init__(self, stage: nn.Module, out_channels: int, *, norm: bool) -> None:
        super().__init__()
        self.stage = stage
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.out_channels = out_channels

    def forward(self, regions: Tensor) -> Tensor:
        if len(regions) == 0:  # No mask to learn in this step, and batch norm takes no empty batch.
            side = regions.shape[-1] // 2
            return regions.new_zeros(0, self.out_channels, side, side)
        features: Tensor = self.norm(self.stage(regions))
        return features


def _c4_parts(backbone: Any, channels: list[int], config: DetectionConfig) -> _Parts:
    """Make a body of three stages and a head of the last one, which boxes and masks share."""
    names = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    if not all(hasattr(backbone, name) for name in names):
        raise ValueError(f"--neck c4 needs a ResNet, got {type(backbone).__name__}; use --neck fpn")
    res5 = _Res5(backbone.layer4, channels[-1], norm=config.batch_norm == "train")
    stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.act1, backbone.maxpool)
    stages = nn.Sequential(backbone.layer1, backbone.layer2, backbone.layer3)
    body: Any = nn.Sequential(OrderedDict(stem=stem, stages=stages))
    body.out_channels = channels[-2]
    return body, nn.Sequential(res5, nn.AdaptiveAvgPool2d(1), nn.Flatten()), res5


class _Pyramid(nn.Module):
    """A feature pyramid over the last four stages, and a pooled fifth level for large anchors."""

    def __init__(self, backbone: Any, channels: list[int], width: int, *, norm: bool) -> None:
        super().__init__()
        self.body = backbone
        norms = nn.BatchNorm2d if norm else None
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), norms)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body.forward_intermediates(images, indices=4, intermediates_only=True)
        # Four maps (N, C, H, W), (N, 2C, H/2, W/2), ... -> five of `width` channels.
        levels: dict[str, Tensor] = self.fpn({str(i): features for i, features in enumerate(maps)})
        return levels


def _fpn_parts(backbone: nn.Module, channels: list[int], config: DetectionConfig) -> _Parts:
    """Make a pyramid, and heads of their own for boxes and masks."""
    width = min(256, channels[-1])
    body = _Pyramid(backbone, channels, width, norm=config.batch_norm == "train")
    return body, TwoMLPHead(width * 7**2, 4 * width), MaskRCNNHeads(width, (width,) * 4, dilation=1)
