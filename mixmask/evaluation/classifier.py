"""A linear head on a backbone, trained by SGD: alone, or both fine-tuned."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixmask.data.sets import Images
from mixmask.data.views import IMAGENET, Normalization, RandomView
from mixmask.evaluation.features import extract_features
from mixmask.evaluation.linear import linear_scores
from mixmask.evaluation.metrics import count_classes, top1_accuracy, wilson_interval
from mixmask.evaluation.subsets import balanced_subset, listed_subset
from mixmask.evaluation.tasks import Details, ProtocolOptions, Task
from mixmask.runs.options import HELP, check_range, option
from mixmask.runs.schedules import cosine_decay, step_decay

# A batch of a small subset is a tenth of it, so that an epoch has enough steps.
_BATCH, _LEAST_BATCH, _STEPS = 256, 16, 10
# Smallest share of an image's area in a crop, as in torchvision's reference for ImageNet.
_MIN_SCALE = 0.08


@dataclass(frozen=True)
class LinearSGD(ProtocolOptions):
    """A linear head on a frozen backbone, trained as in MoCo's paper, see `classifier_scores`.

    The learning rate falls to a tenth after 60 % and 80 % of the epochs.
    """

    epochs: int = option(100, "passes over the images", low=1)
    batch_size: int = option(_BATCH, "images per step", low=2)
    lr: float = option(30.0, "learning rate at the start", positive=True)
    seed: int = option(0, HELP["seed"], low=0, high=2**31 - 1)
    name: ClassVar[str] = "linear-sgd"

    def measure(self, task: Task, progress: bool) -> tuple[Tensor, Details]:
        """Return scores (M, C) of the test images."""
        schedule = "a tenth after 60 % and 80 % of the epochs"
        details: Details = {"n_train": len(task.train.images), "schedule": schedule}
        return _measure(self, task, task.train.images, task.labels[0], progress), details


@dataclass(frozen=True)
class FineTuning(ProtocolOptions):
    """Backbone and head trained on all labels or on some, see `classifier_scores`.

    The protocol is SimCLR's semi-supervised one: a class-balanced share of the labels, all weights
    trained, no regularisation. Both learning rates fall to 0 along a cosine; the defaults are those
    of SwAV's evaluation with 10 % of ImageNet's labels.
    """

    percent: float = option(100.0, "share of the labels in %, equally many per class")
    subset_list: str = option("", "file with one name of a training image per line")
    epochs: int = option(20, "passes over the images", low=1)
    batch_size: int = option(
        0, "images per step; 0: 256, or a tenth of the images where they are few, at least 16"
    )
    lr: float = option(0.01, "learning rate of the backbone at the start", positive=True)
    head_lr: float = option(0.2, "learning rate of the head at the start", positive=True)
    seed: int = option(0, HELP["seed"], low=0, high=2**31 - 1)
    name: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != 0:
            check_range("batch_size", self.batch_size, 2)
        if self.subset_list and self.percent != 100:
            raise ValueError("--percent and --subset-list cannot be combined; use one of them")

    def subset(self, task: Task) -> tuple[Tensor, str]:
        """Return the indices (n,) of the images to fine-tune on, and how they are chosen."""
        if not self.subset_list:
            index = balanced_subset(
                task.labels[0], self.percent, seed=self.seed, classes=task.classes
            )
            return index, f"{self.percent:g} %"
        files = task.train.files
        if len(files) != len(task.train.images):
            raise ValueError(
                f"--subset-list needs a folder of images, got {task.sources[0].data}, whose images "
                "have no file names; use --percent"
            )
        lines = map(str.strip, os.fsdecode(Path(self.subset_list).read_bytes()).splitlines())
        return listed_subset(files, list(filter(None, lines))), f"listed in {self.subset_list}"

    def batch_of(self, images: int) -> int:
        """Return the number of images per step for this number of images."""
        return self.batch_size or min(_BATCH, max(_LEAST_BATCH, images // _STEPS))

    def measure(self, task: Task, progress: bool) -> tuple[Tensor, Details]:
        """Return scores (M, C) of the test images."""
        index, subset = self.subset(task)
        images = task.train.subset(index).images
        labels, test_labels = task.labels[0][index], task.labels[1]
        scores = _measure(self, task, images, labels, progress)
        x, x_test = (task.extract(part) for part in (images, task.test.images))
        frozen, _ = linear_scores(x, labels, x_test, classes=len(task.classes), seed=self.seed)
        top1 = top1_accuracy(frozen, test_labels)
        return scores, {
            "n_train": len(index), "batch_size": self.batch_of(len(index)), "subset": subset,
            "frozen_top1": top1, "frozen_interval": wilson_interval(top1, len(test_labels)),
        }  # fmt: skip


def _measure(
    protocol: LinearSGD | FineTuning, task: Task, images: Images, labels: Tensor, progress: bool
) -> Tensor:
    """Train on images (N, C, H, W) and labels (N,) of a task, and score its test images (M, C)."""
    source = task.sources[0]
    return classifier_scores(
        task.backbones[0], images, labels, task.test.images, protocol,
        image_size=source.image_size, normalization=source.normalization,
        classes=len(task.classes), progress=progress,
    )  # fmt: skip


def classifier_scores(
    backbone: nn.Module,
    images: Images,
    labels: Tensor,
    test: Images,
    protocol: LinearSGD | FineTuning,
    *,
    image_size: int,
    normalization: Normalization = IMAGENET,
    classes: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Train a linear head on a copy of a backbone, or both, and classify test images.

    SGD with a momentum of 0.9 (Nesterov's to fine-tune), no weight decay, on random resized crops
    and flips. A frozen backbone is used in evaluation mode; one that is fine-tuned has its batch
    norm in training mode. Test images are seen once, see `resize`. On a CPU the same seed gives
    the same scores; torch's global generator is left as it was.

    Args:
        backbone: (n, C, S, S) -> (n, D); left as it is. `num_features` is its D.
        images: (N, C, H, W) uint8; batches are moved to the backbone's device.
        labels: (N,) int64, from 0.
        test: (M, C, H, W) uint8.
        protocol: Epochs, batch size, learning rates, seed.
        image_size: Height and width of the views, in pixels.
        normalization: Mean and deviation of each channel, see `normalize`.
        classes: Number of classes. Default: one more than the largest label.
        progress: Whether to show a progress bar.

    Returns:
        (M, classes) float32 logits.

    Raises:
        ValueError: If there are fewer than two images, or labels beyond the classes.
        FloatingPointError: If the loss is no longer finite.
    """
    classes = count_classes(labels, classes)
    if len(images) < 2:
        raise ValueError(f"training needs at least two images, got {len(images)}; use more")
    check_range("image_size", image_size, 1)
    # Without gradients the forward pass of a frozen backbone keeps nothing for a backward one.
    backbone = deepcopy(backbone).requires_grad_(isinstance(protocol, FineTuning))
    head = nn.utils.skip_init(nn.Linear, int(backbone.num_features), classes)  # type: ignore[arg-type]
    # As MoCo draws its weights.
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(protocol.seed))
    nn.init.zeros_(head.bias)
    head.to(next(backbone.parameters()).device)
    view = RandomView(
        image_size, min_scale=_MIN_SCALE, jitter=0, hue=0, grey=0, normalization=normalization
    )
    _train(backbone, head, images, labels, protocol, view, progress)
    x_test = extract_features(backbone, test, size=image_size, normalization=normalization)
    with torch.no_grad():
        scores: Tensor = head(x_test)  # (M, C)
    return scores


def _train(
    backbone: nn.Module,
    head: nn.Linear,
    images: Images,
    labels: Tensor,
    protocol: LinearSGD | FineTuning,
    view: RandomView,
    progress: bool,
) -> None:
    """Train the head by cross-entropy, and the backbone with it to fine-tune."""
    rates: dict[nn.Module, float] = {head: protocol.lr}
    size = protocol.batch_size
    decay: Callable[[float], float] = step_decay
    if isinstance(protocol, FineTuning):
        rates = {head: protocol.head_lr, backbone: protocol.lr}
        size, decay = protocol.batch_of(len(images)), cosine_decay
    groups = [{"params": module.parameters(), "lr": rate} for module, rate in rates.items()]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=backbone in rates)
    size = min(size, len(images))
    steps = len(images) // size
    total = steps * protocol.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step / total))
    generator = torch.Generator().manual_seed(protocol.seed)
    backbone.train(backbone in rates)
    device = head.weight.device
    cuda = [device] if device.type == "cuda" else []
    bar = tqdm(total=total, unit="step", disable=not progress)
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with bar, torch.random.fork_rng(cuda), exact:
        torch.manual_seed(protocol.seed)  # For the network alone, which may have dropout.
        for step in range(total):
            if step % steps == 0:
                order = torch.randperm(len(images), generator=generator)
            index = order[step % steps * size :][:size]
            x = view(images[index].to(device), generator=generator)  # (n, 3, S, S)
            logits = head(backbone(x).float())  # (n, C)
            loss = F.cross_entropy(logits, labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if (step + 1) % steps == 0:  # Once per epoch: to look at the loss waits for a GPU.
                bar.set_postfix_str(f"loss {loss.item():.3f}")
                if not loss.isfinite():
                    raise FloatingPointError(
                        f"the loss became {loss.item()} while training the classifier; lower "
                        "the learning rate"
                    )
