"""Views of a folder: cropped by workers and coloured in batches, against torchvision's, one by one.

The counterpart is what most training scripts do: a DataLoader whose workers take both views of
an image through torchvision's transforms. Both sides read the same files with two workers, which
start and end within each sample.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from common import Case, arguments, compare, interleave, report
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from mixmask.data.folders import Files, list_folder
from mixmask.data.sets import StoredImages
from mixmask.data.stream import Draw, Stream
from mixmask.data.views import MEAN, STD, RandomView

_WORKERS = 2
# MoCo v2's views, on both sides.
_SCALE, _JITTER, _HUE, _GREY, _BLUR = 0.2, 0.4, 0.1, 0.2, 0.5


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of each file, drawn one by one on the CPU by torchvision."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        """Compose the transforms."""
        self.paths = paths
        jitter = T.ColorJitter(_JITTER, _JITTER, _JITTER, _HUE)
        blur = T.GaussianBlur(max(3, size // 10 // 2 * 2 + 1), (0.1, 2.0))
        self.view: Callable[[Image.Image], Tensor] = T.Compose(
            [
                T.RandomResizedCrop(size, (_SCALE, 1.0)),
                T.RandomHorizontalFlip(),
                T.RandomApply([jitter], p=0.8),
                T.RandomGrayscale(_GREY),
                T.RandomApply([blur], p=_BLUR),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.paths[number]) as image:
            whole = image.convert("RGB")
        return self.view(whole), self.view(whole)


def measure(name: str, paths: Files, size: int, batch_size: int, options: Any) -> list[Case]:
    """Measure one pass over a folder's files on both sides, and ours without the colours too."""
    device = torch.device(options.device)
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    view = RandomView(size, jitter=_JITTER, hue=_HUE, grey=_GREY, blur=_BLUR, crop=False).to(device)

    def crops() -> Stream:
        draws = [Draw(part, 2, i) for i, part in enumerate(order.split(batch_size))]
        return Stream(
            StoredImages(paths, size),
            draws,
            size=size,
            min_scale=_SCALE,
            workers=_WORKERS,
            device=device,
        )

    def ours() -> None:
        with closing(crops()) as batches:
            for batch in batches:
                view(batch)

    def ours_without_colours() -> None:
        with closing(crops()) as batches:
            for _ in batches:
                pass

    def theirs() -> None:
        loader = DataLoader(
            TwoViews([paths[int(i)] for i in order], size),
            batch_size,
            num_workers=_WORKERS,
            pin_memory=device.type == "cuda",
        )
        for first, second in loader:
            torch.cat([first, second]).to(device, non_blocking=True)

    samples, calls = interleave(
        {"ours": ours, "crops": ours_without_colours, "theirs": theirs},
        repeats=options.repeats,
        device=options.device,
        warmup=1,
    )
    with Image.open(paths[0]) as first:
        about = list(first.size)
    sizes = {
        "folder": name,
        "images": len(paths),
        "first_image": about,
        "views": size,
        "batch": batch_size,
        "workers": _WORKERS,
    }
    against = "torchvision's transforms in the workers"
    for side, seconds in samples.items():
        rate = len(paths) / sorted(seconds)[len(seconds) // 2]
        print(f"{name}, {size} px, {side}: {rate:.0f} images/s, two views each")
    return [
        compare(
            f"{text}, {name} at {size} px",
            against,
            samples[side],
            samples["theirs"],
            sizes=sizes,
            calls=calls,
        )
        for text, side in (("two views", "ours"), ("their crops alone", "crops"))
    ]


def main() -> None:
    """Measure folders, or the embedded photographs."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument(
        "folders",
        nargs="*",
        default=["clothing64:64"],
        metavar="FOLDER[:SIZE]",
        help="folders of images and the size of their views [clothing64:64, the embedded one]",
    )
    parser.add_argument("--images", type=int, default=512, help="how many of each folder")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    count, batch_size = (8, 4) if options.small else (options.images, options.batch_size)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as scratch:
        for given in options.folders:
            folder, _, size = given.rpartition(":") if ":" in given else (given, "", "224")
            if folder == "clothing64":
                with as_file(files("mixmask.data") / "clothing64.zip") as path:
                    ZipFile(path).extractall(scratch)
                folder = f"{scratch}/clothing64"
            found = list_folder(Path(folder)).train.files
            assert isinstance(found, Files)
            step = max(1, len(found) // count)
            chosen = found.subset(range(len(found))[::step][:count])
            cases += measure(Path(folder).name, chosen, int(size), batch_size, options)
    report("loader", cases, options)


if __name__ == "__main__":
    main()
