"""A classifier of images: a backbone and a linear head, trained on random crops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mixmask.data.sets import Images
from mixmask.data.views import RandomView, normalize
from mixmask.evaluation.metrics import count_classes
from mixmask.runs.options import check_range

# Of images that are larger than a view, the usual part is tested: 224 px of 256.
_CENTRE = 7 / 8
# Smallest share of an image's area in a crop, as in torchvision's reference for ImageNet.
_MIN_SCALE = 0.08

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Training:
    """How a classifier is trained.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images per step, or all where there are fewer.
        image_size: Height and width of the views, in pixels.
        momentum: Of SGD, without weight decay.
        nesterov: Whether it is Nesterov's.
        seed: From which the head, the order and the views follow.
        progress: Show a progress bar.
    """

    epochs: int
    batch_size: int
    image_size: int
    momentum: float = 0.9
    nesterov: bool = False
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        """Check the limits of the values."""
        for name, least in (("epochs", 1), ("batch_size", 2), ("image_size", 1), ("seed", 0)):
            check_range(name, getattr(self, name), least)


def build_classifier(backbone: nn.Module, classes: int, seed: int) -> nn.Linear:
    """Build a linear head on a backbone's features, its weights drawn as MoCo draws them."""
    with torch.random.fork_rng(devices=[]):  # torch's own initial weights are thrown away.
        head = nn.Linear(int(backbone.num_features), classes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    return head.to(next(backbone.parameters()).device)


def train_classifier(
    backbone: nn.Module,
    head: nn.Linear,
    images: Images,
    labels: Tensor,
    rates: Sequence[float],
    schedule: Schedule,
    training: Training,
) -> None:
    """Train a head, and its backbone with it, on random resized crops and flips, by SGD.

    A frozen backbone is used in evaluation mode, and nothing of it changes. On a CPU the same
    seed gives the same weights; torch's global generator is left as it was.

    Args:
        backbone: (n, 3, S, S) -> (n, D).
        head: (n, D) -> (n, C).
        images: (N, 3, H, W) uint8; batches are moved to the backbone's device.
        labels: (N,) int64 below C.
        rates: Learning rates of the head and of the backbone; the head's alone freezes it.
        schedule: The factor of both, from the share of the steps that are done.
        training: The rest.

    Raises:
        ValueError: If there are fewer than two images, or labels beyond the head's.
        FloatingPointError: If the loss is no longer finite.
    """
    count_classes(labels, head.out_features)
    if len(images) < 2:
        raise ValueError(f"training needs at least two images, got {len(images)}; use more")
    frozen, device = len(rates) == 1, head.weight.device
    modules = [head] if frozen else [head, backbone]
    optimizer = torch.optim.SGD(
        [
            {"params": list(module.parameters()), "lr": rate, "rate": rate}
            for module, rate in zip(modules, rates, strict=True)
        ],
        momentum=training.momentum,
        nesterov=training.nesterov,
    )
    view = RandomView(training.image_size, min_scale=_MIN_SCALE, jitter=0, hue=0, grey=0, blur=0)
    generator = torch.Generator().manual_seed(training.seed)
    size = min(training.batch_size, len(images))
    steps = len(images) // size
    total = steps * training.epochs
    backbone.train(not frozen)
    cuda = [device] if device.type == "cuda" else []
    bar = tqdm(total=total, unit="step", disable=not training.progress)
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with bar, torch.random.fork_rng(cuda), exact:
        torch.manual_seed(training.seed)  # For the network alone, which may have dropout.
        for step in range(total):
            if step % steps == 0:
                order = torch.randperm(len(images), generator=generator)
            index = order[step % steps * size :][:size]
            x = view(images[index].to(device), generator=generator)  # (n, 3, S, S)
            with torch.set_grad_enabled(not frozen):
                features = backbone(x)  # (n, D)
            loss = F.cross_entropy(head(features.float()), labels[index].to(device))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * schedule(step / total)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            if (step + 1) % steps == 0:
                _check_loss(float(loss.detach()), bar)
    backbone.eval()


@torch.no_grad()
def classifier_scores(
    backbone: nn.Module, head: nn.Linear, images: Images, image_size: int, batch_size: int = 256
) -> Tensor:
    """Return logits (M, C) of images (M, 3, H, W), each seen once, in evaluation mode.

    Images larger than `image_size` are seen without their outer eighth, smaller ones whole; both
    are resized to it.
    """
    backbone.eval()
    device = head.weight.device
    parts = []
    for start in range(0, len(images), batch_size):
        x = normalize(_centre(images[start : start + batch_size].to(device), image_size))
        parts.append(head(backbone(x.contiguous(memory_format=torch.channels_last)).float()))
    return torch.cat(parts)


def _centre(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) > size:
        side = max(size, round(_CENTRE * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        images = images[..., top : top + side, left : left + side]
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(
        images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    if images.is_floating_point():
        return resized.clamp(0, 1)
    return resized.round().clamp(0, 255).byte()


def _check_loss(loss: float, bar: tqdm[NoReturn]) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss} while the classifier was trained; lower the learning rate"
        )
    bar.set_postfix_str(f"loss {loss:.3f}")
