"""Random views of a batch: ours beside kornia's pipeline and torchvision's transforms.

Operation by operation and whole, at the size of small photographs and at ImageNet's, and the
share of the time of a training step that the two views of its images take. Our operations take
parameters that were drawn before, all in one go, whose time stands by itself; kornia's draw their
own. The whole includes the draws on all sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kornia.augmentation as K
import torch
from common import Case, Figure, Side, arguments, compare, interleave, report
from peers import Setting, TrainerStep
from torch import Tensor, nn
from torchvision import transforms as T

from mixmask.data.views import MEAN, STD, RandomView, ViewParameters, luma
from mixmask.trainers.config import RunConfig
from mixmask.trainers.methods import make_config
from mixmask.trainers.run import random_view

_JITTERED, _SIGMA = 0.8, (0.1, 2.0)


@dataclass(frozen=True)
class Size:
    """A batch of images and the configuration whose views are taken of it."""

    batch_size: int
    image: int
    config: RunConfig


def kornia_view(config: RunConfig) -> nn.Sequential:
    """Build the pipeline of kornia with the same options, from float images within [0, 1]."""
    return nn.Sequential(*kornia_operations(config).values())


def kornia_operations(config: RunConfig) -> dict[str, nn.Module]:
    """Return its operations by the names of ours."""
    size, jitter = config.image_size, config.jitter
    kernel = RandomView(size).kernel
    crop = K.RandomResizedCrop(
        (size, size), scale=(config.min_scale, 1.0), cropping_mode="resample"
    )
    found: dict[str, nn.Module] = {
        "crop and flip": nn.Sequential(crop, K.RandomHorizontalFlip(p=0.5)),
        "colour jitter": K.ColorJitter(jitter, jitter, jitter, config.hue, p=_JITTERED),
        "grey": K.RandomGrayscale(p=config.grey),
    }
    if config.blur > 0:
        found["blur"] = K.RandomGaussianBlur((kernel, kernel), _SIGMA, p=config.blur)
    found["normalise"] = K.Normalize(mean=torch.tensor(MEAN), std=torch.tensor(STD))
    return found


def our_operations(
    view: RandomView, drawn: ViewParameters
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what `RandomView` does, in its order; its parameters are drawn all at once before."""

    def grey(x: Tensor) -> Tensor:
        chosen = drawn.grey.to(x.device, non_blocking=True)[:, None, None, None]
        return torch.where(chosen, luma(x), x)

    def normalise(x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).to(x.device).view(3, 1, 1) for v in (MEAN, STD))
        return (x - mean).div_(std)

    found: dict[str, Callable[[Tensor], Tensor]] = {
        "crop and flip": lambda x: view._crop(x, drawn),
        "colour jitter": lambda x: view._jitter(x, drawn),
        "grey": grey,
    }
    if view.blur > 0:
        found["blur"] = lambda x: view._blur(x, drawn)
    found["normalise"] = normalise
    return found


def torchvision_view(config: RunConfig) -> Callable[[Any], Tensor]:
    """Build torchvision's transforms of one PIL image with the same options."""
    jitter = T.ColorJitter(config.jitter, config.jitter, config.jitter, config.hue)
    steps: list[Any] = [
        T.RandomResizedCrop(config.image_size, (config.min_scale, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([jitter], p=_JITTERED),
        T.RandomGrayscale(config.grey),
    ]
    if config.blur > 0:
        blur = T.GaussianBlur(RandomView(config.image_size).kernel, _SIGMA)
        steps.append(T.RandomApply([blur], p=config.blur))
    view: Callable[[Any], Tensor] = T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])
    return view


def measure(at: Size, options: Any) -> tuple[list[Case], Figure]:
    """Measure one size: each operation, the whole, the share of a step, and the draws."""
    device, config, n = options.device, at.config, at.batch_size
    images = torch.randint(256, (n, 3, at.image, at.image), dtype=torch.uint8)
    pictures = [T.functional.to_pil_image(image) for image in images]
    images = images.to(device)
    ours, theirs = random_view(config, images).to(device), kornia_view(config).to(device)
    one_by_one = torchvision_view(config)
    px = config.image_size
    sizes = {"images": [n, 3, at.image, at.image], "view": px}

    def kornia_whole() -> Tensor:
        with torch.no_grad():
            view: Tensor = theirs(images.float() / 255)
        return view.contiguous(memory_format=torch.channels_last)

    def by_torchvision() -> Tensor:
        return torch.stack([one_by_one(picture) for picture in pictures]).to(device)

    def compared(name: str, against: dict[str, Side], own: Side, bound: float | None) -> list[Case]:
        samples, calls = interleave(
            {"ours": own, **against}, repeats=options.repeats, device=device
        )
        return [
            compare(
                name, other, samples["ours"], samples[other], sizes=sizes, calls=calls,
                images=n, bound=bound,
            )
            for other in against
        ]  # fmt: skip

    whole: dict[str, Side] = {"kornia": kornia_whole, "torchvision, image by image": by_torchvision}
    cases = compared(f"a view at {px} px", whole, lambda: ours(images), 1.0)
    operations = kornia_operations(config)
    drawn = ours.draw(n, at.image, at.image)
    for name, operation in our_operations(ours, drawn).items():
        before = at.image if name == "crop and flip" else px
        x = torch.rand(n, 3, before, before, device=device)
        peer = operations[name].to(device)
        with torch.no_grad():
            side: dict[str, Side] = {"kornia": lambda peer=peer, x=x: peer(x)}  # type: ignore[misc]
            own = lambda operation=operation, x=x: operation(x)  # noqa: E731
            cases += compared(f"{name} at {px} px", side, own, None)

    step = TrainerStep(config, Setting(device, channels_last=True))
    x1, x2 = ours(images.repeat(2, 1, 1, 1)).chunk(2)
    samples, calls = interleave(
        {"views": lambda: ours(images.repeat(2, 1, 1, 1)), "step": lambda: step(x1, x2)},
        repeats=min(3, options.repeats),  # A step of a large network takes long on a CPU.
        device=device,
        warmup=1,
    )
    share = compare(
        f"both views at {px} px",
        f"a MoCo v2 + MixMask step of {config.arch}, which they feed",
        samples["views"],
        samples["step"],
        sizes=sizes,
        calls=calls,
        images=n,
    )
    draws, _ = interleave(
        {"draw": lambda: ours.draw(n, at.image, at.image)}, repeats=options.repeats, device=device
    )
    seconds = statistics.median(draws["draw"])
    return [*cases, share], Figure(f"drawing the parameters of {n} views at {px} px", seconds, "s")


def main() -> None:
    """Measure both sizes."""
    options = arguments(__doc__, repeats=15).parse_args()
    n, n_large, px, large = (4, 2, 32, 48) if options.small else (128, 16, 32, 224)
    small = make_config(data="clothing64", image_size=px, batch_size=n)
    arch = "narrow" if options.small else "resnet50"
    large_config = make_config(
        data="imagenet", arch=arch, image_size=large, batch_size=n_large, queue_size=512
    )
    cases, draws = measure(Size(n, 2 * px, small), options)
    more, more_draws = measure(Size(n_large, large * 8 // 7, large_config), options)
    report("views", cases + more, options, [draws, more_draws])


if __name__ == "__main__":
    main()
