"""A whole epoch of the trainer, beside the same loop fed by torchvision's transforms.

The counterpart takes the trainer's own steps, on views that torchvision draws image by image in
a DataLoader with two workers; its images are in memory and decoded, as ours are. A second
comparison is with the steps alone, on views that are ready: what is above 1 is not the step. The
trainer's epochs are those of one run by its own clock, in which checkpoints do not count, and
the other sides run between them.

`--recipe cifar10 --images 50000` takes random images at CIFAR's size, whose content costs
nothing: for a GPU that cannot download.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Figure, Side, arguments, compare, report, synchronise
from peers import Setting, TrainerStep
from roofline import busy_seconds, start_profile
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from views import torchvision_view

from mixmask.data.sets import load_data
from mixmask.trainers.loop import train_method
from mixmask.trainers.methods import make_config
from mixmask.trainers.run import random_view

_WORKERS = 2
# What an H200 is to need for CIFAR's 50,000 images, and how long it may stand idle.
_GPU_SECONDS, _GPU_IMAGES, _GPU_IDLE = 3.0, 50_000, 0.03


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of each image, as most training scripts draw them."""

    def __init__(self, images: Tensor, view: Callable[[Any], Tensor]) -> None:
        """Store decoded images and what takes a view of one."""
        self.images, self.view = images, view

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Draw both views of an image."""
        image = T.functional.to_pil_image(self.images[number])
        return self.view(image), self.view(image)


@dataclass
class Between:
    """Runs the other sides between two epochs of a run, where it asks for an accuracy.

    On a GPU the last epoch is for the profiler alone.
    """

    sides: Mapping[str, Side]
    epochs: int
    device: str
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    done: int = 0
    profile: torch.profiler.profile | None = None
    busy: float | None = None

    def __call__(self, backbone: nn.Module, thorough: bool) -> dict[str, float]:
        """Time each side once; what comes before and behind the first epoch is to warm up."""
        del backbone, thorough
        if self.profile is not None:
            self.busy = busy_seconds(self.profile)
            return {}
        for name, side in self.sides.items():
            synchronise(self.device)
            start = time.perf_counter()
            side()
            synchronise(self.device)
            if self.done > 1:
                self.samples[name].append(time.perf_counter() - start)
        self.done += 1
        if self.done > self.epochs:
            self.profile = start_profile(self.device)
        return {}


def loader_epoch(step: TrainerStep, loader: DataLoader[Any], setting: Setting) -> None:
    """Train one epoch on what the workers hand over."""
    for x1, x2 in loader:
        moved = (x.to(setting.device, non_blocking=True) for x in (x1, x2))
        step(*(setting.view(x) for x in moved))


def main() -> None:
    """Measure whole epochs, all sides interleaved."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--recipe", default="clothing64", choices=("clothing64", "cifar10"))
    parser.add_argument("--images", type=int, help="images per epoch; default: clothing64's 3,409")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true", help="compile the backbone")
    options = parser.parse_args()
    given: dict[str, Any] = {"precision": options.precision, "compile": options.compile}
    if options.small or options.batch_size:
        given["batch_size"] = options.batch_size or 16
    on_gpu = torch.device(options.device).type == "cuda"
    epochs = 1 + options.repeats + on_gpu
    config = make_config(data=options.recipe, epochs=epochs, measure_every=1, **given)
    images = _images(options.recipe, 64 if options.small else options.images)
    device, batch_size = options.device, config.batch_size
    setting = Setting(device, config.precision, channels_last=True, compile=config.compile)
    step, steps = TrainerStep(config, setting), len(images) // batch_size
    loader: DataLoader[Any] = DataLoader(
        TwoViews(images, torchvision_view(config)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=_WORKERS,
        pin_memory=on_gpu,
    )
    batch = images[:batch_size].to(device).repeat(2, 1, 1, 1)
    ready = random_view(config, images).to(device)(batch).chunk(2)

    def steps_alone() -> None:
        for _ in range(steps):
            step(*ready)

    between = Between(
        {"torchvision": lambda: loader_epoch(step, loader, setting), "steps": steps_alone},
        config.epochs - on_gpu,
        device,
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, rows = train_method(config, images, Path(folder), monitor=between, progress=False)
    # The row at the start has no time, the first epoch warms up, the last one is profiled.
    ours = [row["seconds"] for row in rows[2:]][: options.repeats]
    sizes = {
        "arch": config.arch,
        "images": [len(images), *images.shape[1:]],
        "view": config.image_size,
        "batch": batch_size,
        "dtype": setting.label,
    }
    name = f"an epoch of the trainer, {options.recipe}'s recipe"
    against = {
        "torchvision": f"its steps fed by torchvision in {_WORKERS} workers",
        "steps": "its steps alone, on views that are ready",
    }
    bounds = {"torchvision": 1 / 1.5}
    cases = [
        compare(
            name,
            label,
            ours,
            between.samples[other],
            sizes=sizes,
            images=steps * batch_size,
            bound=bounds.get(other),
        )
        for other, label in against.items()
    ]
    seconds = statistics.median(ours)
    share = 1 - statistics.median(between.samples["steps"]) / seconds
    judged = on_gpu and len(images) == _GPU_IMAGES
    figures = [
        Figure.bounded("an epoch of the trainer", seconds, "s", _GPU_SECONDS if judged else None),
        Figure("of which not the step", share, "share"),
    ]
    if between.busy is not None:
        idle = max(0.0, 1 - between.busy / rows[-1]["seconds"])
        figures.append(Figure.bounded("of which the device is idle", idle, "share", _GPU_IDLE))
    variant = "" if options.recipe == "clothing64" else options.recipe
    report("epoch", cases, options, figures, variant=variant)


def _images(recipe: str, count: int | None) -> Tensor:
    """Return images (N, 3, H, W) uint8: the photographs, or random ones of CIFAR's size."""
    if recipe == "clothing64":
        images = load_data("clothing64", 32).train.images
        assert isinstance(images, Tensor)
        return images[:count]
    return torch.randint(256, (count or _GPU_IMAGES, 3, 32, 32), dtype=torch.uint8)


if __name__ == "__main__":
    main()
