"""MixMask for self-supervised training loops: filled masks and a λ-weighted loss.

Two lines around an existing criterion::

    mixed = mixmask.mix_batch(x_q, masks)
    loss = criterion(q, k) + mixmask.lambda_weighted_loss(criterion, encode(mixed.images), k, mixed)

Where things are::

    masks.py, mixing.py, losses/   the core: imports torch and einops only
    integrations/, examples/       adapters for other codebases; loops to copy
    data/                          data sets, streamed folders, random views
    trainers/                      the methods, one file each, and the training loop
    runs/, checkpoints/            run folders; reading, loading and exporting weights
    evaluation/, detection/        kNN, linear, fine-tuning, neighbours; Faster and Mask R-CNN
    figures/, cli/                 figures; the command line
"""

from mixmask import losses
from mixmask._version import __version__
from mixmask.integrations.recording import RecordingCriterion
from mixmask.losses.lambda_weighted import LambdaWeightedLoss, lambda_weighted_loss
from mixmask.masks import (
    BlockMaskGenerator,
    DiscreteMaskGenerator,
    block_masks,
    cells_to_pixels,
    discrete_masks,
)
from mixmask.mixing import (
    MixedBatch,
    MixMask,
    cutmix_batch,
    erase_batch,
    mix_batch,
    mixup_batch,
)

__all__ = [
    "BlockMaskGenerator",
    "DiscreteMaskGenerator",
    "LambdaWeightedLoss",
    "MixMask",
    "MixedBatch",
    "RecordingCriterion",
    "__version__",
    "block_masks",
    "cells_to_pixels",
    "cutmix_batch",
    "discrete_masks",
    "erase_batch",
    "lambda_weighted_loss",
    "losses",
    "mix_batch",
    "mixup_batch",
]
