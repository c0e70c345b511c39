"""Fine-tuning on all labels or on a few: subsets, and a backbone that learns with its head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from mixmask._checks import check_positive
from mixmask.data.sets import Images
from mixmask.evaluation.classifier import (
    Training,
    build_classifier,
    classifier_scores,
    train_classifier,
)
from mixmask.evaluation.metrics import count_classes
from mixmask.runs.schedules import cosine_decay, step_decay

# To a tenth after 60 and after 80 of MoCo's 100 epochs.
moco_decay = partial(step_decay, milestones=(0.6, 0.8))


def finetune_scores(
    backbone: nn.Module,
    images: Images,
    labels: Tensor,
    test: Images,
    training: Training,
    *,
    lr: float = 0.01,
    head_lr: float = 0.2,
    classes: int | None = None,
) -> Tensor:
    """Fine-tune a copy of a backbone with a linear head on it, and classify test images.

    SGD with momentum, no weight decay, batch norm in training mode, and a cosine from both
    learning rates to 0; random resized crops and flips. The defaults are those of SwAV's
    evaluation with 10 % of ImageNet's labels.

    Args:
        backbone: (n, 3, S, S) -> (n, D); left as it is.
        images: (N, 3, H, W) uint8.
        labels: (N,) int64, from 0.
        test: (M, 3, H, W) uint8.
        training: Epochs, batch size, image size, seed.
        lr: Learning rate of the backbone at the start.
        head_lr: Learning rate of the head at the start.
        classes: Number of classes. Default: one more than the largest label.

    Returns:
        (M, classes) float32 logits.

    Raises:
        ValueError: If an option is out of its range or labels do not fit.
        FloatingPointError: If the loss is no longer finite.
    """
    check_positive("--lr", lr)
    check_positive("--head-lr", head_lr)
    tuned = deepcopy(backbone).requires_grad_()
    head = build_classifier(tuned, count_classes(labels, classes), training.seed)
    train_classifier(tuned, head, images, labels, (head_lr, lr), cosine_decay, training)
    return classifier_scores(tuned, head, test, training.image_size)


def linear_sgd_scores(
    backbone: nn.Module,
    images: Images,
    labels: Tensor,
    test: Images,
    training: Training,
    *,
    lr: float = 30.0,
    classes: int | None = None,
) -> Tensor:
    """Train a linear head on a frozen backbone by SGD, as MoCo's paper does, and classify.

    The learning rate falls to a tenth after 60 % and 80 % of the epochs (MoCo's 60 and 80 of
    100); no weight decay. Views are drawn anew in every epoch: each costs a forward pass.

    Arguments, result and errors are those of `finetune_scores`, but `lr` is the head's, for a
    batch of 256, and the backbone is used in evaluation mode.
    """
    check_positive("--lr", lr)
    was_training = backbone.training
    head = build_classifier(backbone, count_classes(labels, classes), training.seed)
    try:
        train_classifier(backbone, head, images, labels, (lr,), moco_decay, training)
        return classifier_scores(backbone, head, test, training.image_size)
    finally:
        backbone.train(was_training)


def balanced_subset(
    labels: Tensor, percent: float, *, seed: int = 0, classes: Sequence[str] = ()
) -> Tensor:
    """Draw a share of the labels with equally many of each class.

    Of N labels of C classes, round(N * percent / 100 / C) of each class are drawn, at least one;
    100 % takes all labels, however many a class has.

    Args:
        labels: (N,) int64.
        percent: Above 0, at most 100.
        seed: Of the draw.
        classes: Their names, for messages.

    Returns:
        (n,) int64 indices in ascending order.

    Raises:
        ValueError: If the percentage is out of its range or a class has fewer images than asked.

    Example:
        >>> balanced_subset(torch.arange(200) % 2, 10).shape
        torch.Size([20])
    """
    if not 0 < percent <= 100:
        raise ValueError(
            f"--percent must be above 0 and at most 100, got {percent:g}; use for instance 10"
        )
    if percent == 100:
        return torch.arange(len(labels))
    present, counts = labels.unique(return_counts=True)
    wanted = max(1, round(len(labels) * percent / 100 / len(present)))
    if int(counts.min()) < wanted:
        number = int(present[counts.argmin()])
        raise ValueError(
            f"{percent:g} % of {len(labels)} images are {wanted} of each class, but class "
            f"{classes[number] if classes else number} has {int(counts.min())}; use a smaller "
            "--percent, or 100 for all images"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == number][:wanted] for number in present]
    return torch.cat(chosen).sort().values


def listed_subset(files: Sequence[str], names: Sequence[str]) -> Tensor:
    """Find the files of a published list among those of a data set.

    Args:
        files: Names of the images, with or without folders.
        names: Names as listed; one without a folder stands for the only file of that name.

    Returns:
        (n,) int64 indices into `files`, in ascending order.

    Raises:
        ValueError: If the list is empty, or a name is unknown, ambiguous or there twice.

    Example:
        >>> listed_subset(["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"], ["3.jpg", "cat/1.jpg"])
        tensor([0, 2])
    """
    if not names:
        raise ValueError("the subset list names no file; expected one file name per line")
    places = {name: i for i, name in enumerate(files)}
    shared = Counter(name.rpartition("/")[2] for name in files)
    last = {name.rpartition("/")[2]: i for i, name in enumerate(files)}
    index = []
    for name in names:
        if name not in places and shared[name] > 1:
            raise ValueError(
                f"{name} of the subset list is the name of {shared[name]} files; write their "
                "folders too, as in class/name.jpg"
            )
        place = places.get(name, last.get(name, -1))
        if place < 0:
            unknown = sum(name not in places and name not in last for name in names)
            raise ValueError(
                f"{unknown} of {len(names)} names of the subset list are not in the training "
                f"split, first {name}; check that --data is the data set of the list"
            )
        index.append(place)
    if len(set(index)) < len(index):
        raise ValueError("the subset list names a file twice; remove the repeated lines")
    return torch.tensor(index).sort().values
