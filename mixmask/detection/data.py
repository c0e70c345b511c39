"""Detection data in Pascal VOC's or COCO's layout, from a folder or a zip file of one."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from mixmask.detection.layouts import Coco, Raw, Voc
from mixmask.detection.tree import Tree

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Annotated:
    """An image's annotations.

    Attributes:
        image: Its path within the data.
        size: (width, height) as annotated, in pixels.
        boxes: (n, 4) float32, left, top, right, bottom in pixels.
        labels: (n,) int64, 1 for the first class: 0 is the background.
        ignored: (n,) bool, objects that count neither as found nor as missed: COCO's crowds and
            VOC's difficult ones.
        segmentations: COCO's polygons or run lengths of each object; None where any is missing.
    """

    image: str
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    segmentations: tuple[Any, ...] | None


class DetectionSplit(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) uint8 with targets for torchvision's detectors, read one by one.

    A target has `boxes`, `labels`, `iscrowd` and, where every object has a segmentation and masks
    are asked for, `masks` (n, H, W) uint8.

    Args:
        tree: Where the images are.
        name: The split's.
        annotated: Its images.
        masks: Whether to decode segmentations.
    """

    def __init__(
        self, tree: Tree, name: str, annotated: Sequence[Annotated], *, masks: bool = False
    ) -> None:
        """Keep the annotations; images stay where they are."""
        self.tree, self.name, self.annotated = tree, name, tuple(annotated)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.annotated)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Read an image and its target.

        Raises:
            ValueError: If the file is no image, or not of the size that was annotated.
        """
        annotated = self.annotated[index]
        image = _read_image(self.tree, annotated.image)
        height, width = image.shape[1:]
        if (width, height) != annotated.size:
            expected = "x".join(map(str, annotated.size))
            raise ValueError(
                f"{annotated.image} has {width}x{height} pixels, but was annotated at {expected}; "
                "correct the size or the image"
            )
        target = {
            "boxes": annotated.boxes,
            "labels": annotated.labels,
            "iscrowd": annotated.ignored.long(),
        }
        if self.masks:
            assert annotated.segmentations is not None
            target["masks"] = _decode_masks(annotated.segmentations, height, width)
        return image, target

    def with_masks(self) -> DetectionSplit:
        """Return the split with masks in its targets.

        Raises:
            ValueError: If some object has no segmentation.
        """
        without = sum(item.segmentations is None for item in self.annotated)
        if without:
            raise ValueError(
                f"--model mask-rcnn needs a segmentation of every object, but {without} of "
                f"{len(self)} images in {self.name} lack some; use --model faster-rcnn"
            )
        return DetectionSplit(self.tree, self.name, self.annotated, masks=True)


@dataclass(frozen=True)
class DetectionData:
    """A training and a test split with the same classes, whose labels start at 1."""

    train: DetectionSplit
    test: DetectionSplit
    classes: tuple[str, ...]
    layout: str


def load_detection(path: Path, *, train: str = "", test: str = "") -> DetectionData:
    """Read annotations in Pascal VOC's or COCO's layout, and find their images.

    VOC: `JPEGImages`, `Annotations` and `ImageSets/Main/<split>.txt`; the classes are those of
    the training split, by name. COCO: `annotations/instances_<split>.json`, with the images in
    `<split>`, `images/<split>`, `images` or beside. Either may lie in a folder within the folder
    or zip file. Boxes that reach out of the image are clipped; objects without a box, with an
    empty one or one outside of the image are left out, each kind with a warning that counts them.

    Args:
        path: A folder, or a zip file, which is read in place.
        train: The training split. Default: VOC's trainval, else train; COCO's train...
        test: The split to test on. Default: VOC's test, else val; COCO's val..., else test...

    Raises:
        ValueError: If lists, annotations or images are missing or broken, a class is unknown, or
            a split has no object.
    """
    tree = Tree(path)
    reader = _reader(tree)
    train, test = reader.choose(train, test)
    if train == test:
        raise ValueError(f"training and test split are both {train}; name others")
    raws = {name: reader.read(name) for name in (train, test)}
    classes = reader.classes(raws)
    splits = []
    for name in (train, test):
        kept = reader.to_learn(raws[name]) if name == train else raws[name]
        annotated = _annotate(name, kept, classes)
        if not any(len(item.boxes) for item in annotated):
            raise ValueError(f"{path} has no object with a box in its split {name}; annotate some")
        splits.append(DetectionSplit(tree, name, annotated))
    return DetectionData(splits[0], splits[1], classes, reader.layout)


def _reader(tree: Tree) -> Voc | Coco:
    for layout in (Voc, Coco):
        base = tree.above(layout.lists)
        if base is not None:
            return layout(tree, base)
    raise ValueError(
        f"{tree.root} holds neither {Voc.lists} (Pascal VOC) nor {Coco.lists} (COCO); pass the "
        "folder that does, or a zip file of it"
    )


def _annotate(split: str, raws: Sequence[Raw], classes: tuple[str, ...]) -> list[Annotated]:
    """Turn what was read into tensors, counting what is left out."""
    label = {name: i for i, name in enumerate(classes, start=1)}
    found: dict[str, list[str]] = {}
    annotated = []
    for raw in raws:
        boxes, labels, ignored, segmentations = [], [], [], []
        for item in raw.objects:
            box, problem = _checked(item.box, raw.size)
            if problem:
                found.setdefault(problem, []).append(f"{item.name} in {raw.image}")
            if box is None:
                continue
            boxes.append(box)
            labels.append(label[item.name])
            ignored.append(item.ignored)
            segmentations.append(item.segmentation)
        annotated.append(
            Annotated(
                raw.image,
                raw.size,
                torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                torch.tensor(labels, dtype=torch.int64),
                torch.tensor(ignored, dtype=torch.bool),
                tuple(segmentations) if all(segmentations) else None,
            )
        )
    for problem, places in found.items():
        warnings.warn(
            f"{len(places)} objects of {split} {problem} (the first: {places[0]})", stacklevel=3
        )
    return annotated


def _checked(
    box: tuple[float, float, float, float] | None, size: tuple[int, int]
) -> tuple[tuple[float, float, float, float] | None, str]:
    """Return a box within its image, or None, and what was wrong with it, or nothing."""
    if box is None:
        return None, "have no box, and were left out"
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        return None, "have an empty box, and were left out"
    width, height = size
    clipped = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        return None, "lie outside of their image, and were left out"
    # Half a pixel is what rounding leaves, and no error of the annotator's.
    far = max(abs(new - old) for new, old in zip(clipped, box, strict=True)) > 0.5
    return clipped, "reach out of their image, and were clipped" if far else ""


def _read_image(tree: Tree, name: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(tree.read(name))) as opened:
            pixels = np.array(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no readable image ({error}); replace it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_masks(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Draw COCO's polygons or run lengths: (n, H, W) uint8."""
    from pycocotools import mask as coco_mask

    masks = torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    for i, segmentation in enumerate(segmentations):
        runs = segmentation
        if isinstance(runs, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(runs, height, width))
        elif isinstance(runs["counts"], list):
            runs = coco_mask.frPyObjects(runs, height, width)
        with warnings.catch_warnings():
            # pycocotools 2.0.11 asks NumPy 2 for a copy in the old way.
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            masks[i] = torch.from_numpy(coco_mask.decode(runs))
    return masks
