"""Detectron2's configurations for the detection protocol of MoCo."""

from __future__ import annotations

from mixmask.checkpoints.resnets import ResNet
from mixmask.data.views import MEAN, STD

_SHARED = """\
# {title}
# {source}
#
#   python train_net.py --config-file {{file}} --num-gpus 8
#
# train_net.py is the one in facebookresearch/moco, folder detection: it registers the head that
# ROI_HEADS names, Detectron2's own with one more batch norm behind res5. WEIGHTS is looked for
# where training is started.
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: {{weights}}
  MASK_ON: {masks}
  # Pixels as the backbone saw them, red first: mean and deviation times 255.
  PIXEL_MEAN: {{mean}}
  PIXEL_STD: {{std}}
  BACKBONE:
    FREEZE_AT: 0  # Everything is fine-tuned.
  RESNETS:
    DEPTH: {{depth}}
    NUM_GROUPS: {{groups}}
    WIDTH_PER_GROUP: {{width}}
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
_VOC = _SHARED.format(
    title="Faster R-CNN C4 on Pascal VOC 07+12, 24,000 iterations.",
    source="He et al., 'MoCo', section 4.2.1; the MixMask paper, section 4.4.",
    masks="false",
    classes=20,
    sizes=[480, *range(512, 801, 32)],
    train="[voc_2007_trainval, voc_2012_trainval]",
    test="[voc_2007_test]",
    steps=[18_000, 22_000],
    iterations=24_000,
    warmup=100,
)
_COCO = _SHARED.format(
    title="Mask R-CNN C4 on COCO, Detectron2's 1x schedule.",
    source="The MixMask paper, section 4.4. MoCo's 2x: STEPS [120000, 160000], MAX_ITER 180000.",
    masks="true",
    classes=80,
    sizes=[*range(640, 801, 32)],
    train="[coco_2017_train]",
    test="[coco_2017_val]",
    steps=[60_000, 80_000],
    iterations=90_000,
    warmup=1000,
)


def configs(resnet: ResNet, weights: str) -> dict[str, str]:
    """Return the configurations by name, as YAML; none for ResNets without bottlenecks.

    Detectron2 builds res5 of a C4 head from bottleneck blocks only.

    Args:
        resnet: The backbone.
        weights: Name of the file with its weights.

    Example:
        >>> from mixmask.checkpoints.resnets import RESNETS
        >>> list(configs(RESNETS["resnet50"], "weights.pkl"))
        ['voc-faster-rcnn-c4-24k', 'coco-mask-rcnn-c4-1x']
    """
    if not resnet.bottleneck:
        return {}
    texts = {"voc-faster-rcnn-c4-24k": _VOC, "coco-mask-rcnn-c4-1x": _COCO}
    stem = weights.rpartition(".")[0]
    return {
        name: text.format(
            file=f"{stem}-{name}.yaml",
            weights=repr(weights),
            mean=[round(255 * value, 3) for value in MEAN],
            std=[round(255 * value, 3) for value in STD],
            depth=resnet.depth,
            groups=resnet.groups,
            width=resnet.width,
        )
        for name, text in texts.items()
    }
