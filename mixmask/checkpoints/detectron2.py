"""Detectron2's names of a ResNet's tensors, its file, and configurations for MoCo's protocol."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixmask.checkpoints.resnets import ResNet
from mixmask.data.views import IMAGENET, Normalization

_TEMPLATE = """\
# {title}
# {source}
#
#   python train_net.py --config-file {file} --num-gpus 8
#
# train_net.py is the one in facebookresearch/moco, folder detection: it registers the head that
# ROI_HEADS names, Detectron2's own with one more batch norm behind res5. WEIGHTS is looked for
# where training is started.
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: {weights!r}
  MASK_ON: {masks}
  # Pixels as the backbone saw them, red first: mean and deviation times 255.
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE:
    FREEZE_AT: 0  # Everything is fine-tuned.
  RESNETS:
    DEPTH: {resnet.depth}
    NUM_GROUPS: {resnet.groups}
    WIDTH_PER_GROUP: {resnet.width}
    NORM: naiveSyncBN
    STRIDE_IN_1X1: false  # torchvision's and timm's stride is in the 3x3 convolution.
  RPN:
    PRE_NMS_TOPK_TEST: 6000
    POST_NMS_TOPK_TEST: 1000
  ROI_HEADS:
    NAME: Res5ROIHeadsExtraNorm
    NUM_CLASSES: {classes}
INPUT:
  FORMAT: RGB
  MIN_SIZE_TRAIN: {sizes}
  MIN_SIZE_TEST: 800
DATASETS:
  TRAIN: {train}
  TEST: {test}
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.02
  STEPS: {steps}
  MAX_ITER: {iterations}
  WARMUP_ITERS: {warmup}
TEST:
  PRECISE_BN:
    ENABLED: true
"""
_PROTOCOLS: dict[str, dict[str, object]] = {
    "voc-faster-rcnn-c4-24k": {
        "title": "Faster R-CNN C4 on Pascal VOC 07+12, 24,000 iterations.",
        "source": "He et al., 'MoCo', section 4.2.1; the MixMask paper, section 4.4.",
        "masks": "false",
        "classes": 20,
        "sizes": [480, *range(512, 801, 32)],
        "train": "[voc_2007_trainval, voc_2012_trainval]",
        "test": "[voc_2007_test]",
        "steps": [18_000, 22_000],
        "iterations": 24_000,
        "warmup": 100,
    },
    "coco-mask-rcnn-c4-1x": {
        "title": "Mask R-CNN C4 on COCO, Detectron2's 1x schedule.",
        "source": "The MixMask paper, section 4.4. "
        "MoCo's 2x: STEPS [120000, 160000], MAX_ITER 180000.",
        "masks": "true",
        "classes": 80,
        "sizes": [*range(640, 801, 32)],
        "train": "[coco_2017_train]",
        "test": "[coco_2017_val]",
        "steps": [60_000, 80_000],
        "iterations": 90_000,
        "warmup": 1000,
    },
}


def configs(
    resnet: ResNet, weights: str, normalization: Normalization = IMAGENET
) -> dict[str, str]:
    """Return the configurations for a file of weights by their own files' names, as YAML.

    There are none for ResNets without bottlenecks, from which Detectron2 builds res5 of a C4 head.

    Example:
        >>> from mixmask.checkpoints.resnets import RESNETS
        >>> list(configs(RESNETS["resnet50"], "weights.pkl"))
        ['weights-voc-faster-rcnn-c4-24k.yaml', 'weights-coco-mask-rcnn-c4-1x.yaml']
    """
    if not resnet.bottleneck:
        return {}
    mean, std = ([round(255 * value, 3) for value in values] for values in normalization)
    texts = {}
    for name, values in _PROTOCOLS.items():
        file = f"{weights.rpartition('.')[0]}-{name}.yaml"
        texts[file] = _TEMPLATE.format(
            file=file, weights=weights, mean=mean, std=std, resnet=resnet, **values
        )
    return texts


def detectron2_name(name: str) -> str:
    """Return Detectron2's name of a ResNet's tensor.

    Detectron2 calls the first convolution the stem, counts the stages from 2, and keeps a norm
    inside of the convolution before it.

    Example:
        >>> detectron2_name("bn1.weight"), detectron2_name("layer2.0.downsample.0.weight")
        ('stem.conv1.norm.weight', 'res3.0.shortcut.weight')
    """
    match = re.fullmatch(
        r"(?:layer(?P<stage>\d)\.(?P<block>\d+)\.)?"
        r"(?P<kind>conv|bn|downsample\.)(?P<number>\d)\.(?P<value>\w+)",
        name,
    )
    if match is None:
        raise ValueError(f"Detectron2 has no name for {name}; only plain ResNets can be converted")
    place = "stem" if match["stage"] is None else f"res{int(match['stage']) + 1}.{match['block']}"
    norm = match["kind"] == "bn" or (match["kind"], match["number"]) == ("downsample.", "1")
    layer = "shortcut" if match["kind"] == "downsample." else f"conv{match['number']}"
    return f"{place}.{layer}.{'norm.' if norm else ''}{match['value']}"


def pickle_state(state: Mapping[str, Tensor]) -> bytes:
    """Return a ResNet's state dict as the pickle that MoCo's converter writes for Detectron2."""
    import numpy as np

    def reduce(array: Any) -> tuple[Any, tuple[object, ...]]:
        return np.ndarray, (array.shape, array.dtype.str, bytearray(array.tobytes()))

    model = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    # By NumPy's public names: its own way names an inner module, which moved in NumPy 2, and
    # Detectron2 often runs on an older one.
    pickler.dispatch_table = {np.ndarray: reduce}
    pickler.dump({"model": model, "__author__": "mixmask", "matching_heuristics": True})
    return buffer.getvalue()
