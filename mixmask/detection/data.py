"""Detection data: Pascal VOC's layout is turned into COCO's form, which one path reads."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from mixmask.data.images import to_rgb
from mixmask.detection.layouts import ListedSplit, number, read_layout
from mixmask.detection.segments import check_segmentation, draw_masks
from mixmask.detection.tree import Tree

Target = dict[str, Tensor]

_LONGEST_SIDE = 1_000_000


@dataclass(frozen=True, eq=False)
class DetectionSplit(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) uint8 with targets for torchvision's detectors, read one by one.

    A target has `boxes` (n, 4), `labels` (n,), `iscrowd` (n,) and, where masks are asked for,
    `masks` (n, H, W) uint8. The objects of all N images, A of them, lie one after the other.
    """

    tree: Tree
    name: str
    files: tuple[str, ...]  # Paths of the N images within the tree.
    sizes: Tensor  # (N, 2) int64, width and height as annotated.
    starts: Tensor  # (N + 1,) int64, the place of each image's first object.
    boxes: Tensor  # (A, 4) float32, left, top, right, bottom in pixels.
    labels: Tensor  # (A,) int64, 1 for the first class: 0 is the background.
    # (A,) int64, 1 for what counts neither as hit nor as missed: COCO's crowds, VOC's difficult.
    iscrowd: Tensor
    segmentations: tuple[Any, ...]  # COCO's polygons or run lengths, or None; per object.
    masks: bool = False  # Whether targets have masks.

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Read an image, which must have its annotated size, and its target."""
        file = self.files[index]
        with self.tree.open_image(file) as opened:
            # Not upright: boxes are those of the pixels as they are stored.
            pixels = np.array(to_rgb(opened, upright=False))  # (H, W, 3)
        image = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
        (height, width), annotated = image.shape[1:], self.sizes[index].tolist()
        if [width, height] != annotated:
            raise ValueError(
                f"{file} has {width}x{height} pixels, but was annotated at "
                f"{annotated[0]}x{annotated[1]}; correct the size or the image"
            )
        objects = self._objects(index)
        target = {name: getattr(self, name)[objects] for name in ("boxes", "labels", "iscrowd")}
        if self.masks:
            target["masks"] = draw_masks(self.segmentations[objects], height, width)
        return image, target

    def with_masks(self) -> DetectionSplit:
        """Return the split with masks in its targets; every object needs a segmentation."""
        without = 0
        for i, (width, height) in enumerate(self.sizes.tolist()):
            segmentations = self.segmentations[self._objects(i)]
            without += None in segmentations
            for segmentation in filter(None, segmentations):
                check_segmentation(segmentation, height, width, self.files[i])
        if without:
            raise ValueError(
                f"--model mask-rcnn needs a segmentation of every object, but {without} of "
                f"{len(self)} images in {self.name} lack some; use --model faster-rcnn"
            )
        return dataclasses.replace(self, masks=True)

    def _objects(self, index: int) -> slice:
        return slice(*self.starts[index : index + 2].tolist())


class DetectionData(NamedTuple):
    """A training and a test split with the same classes, whose labels start at 1."""

    train: DetectionSplit
    test: DetectionSplit
    classes: tuple[str, ...]
    layout: str


def load_detection(path: Path, *, train: str = "", test: str = "") -> DetectionData:
    """Read annotations in Pascal VOC's or COCO's layout, and find their images.

    VOC: `JPEGImages`, `Annotations` and `ImageSets/Main/<split>.txt`; the classes are those of
    the training split, by name. COCO: `annotations/instances_<split>.json`, with the images in
    `<split>`, `images/<split>`, `images` or beside; the classes are ordered by their numbers.
    Either may lie in a folder within the folder or zip file. Boxes that extend beyond the image
    are clipped; objects without a box, with an empty box or with one outside of the image are
    left out. A warning counts each kind. COCO's crowds are used in tests only.

    Args:
        path: A folder, or a zip file, which is read in place.
        train: The training split. Default: VOC's trainval, else train; COCO's train...
        test: The split to test on. Default: VOC's test, else val; COCO's val..., else test...

    Raises:
        ValueError: If lists, annotations or images are missing or broken, a class is unknown, or
            a split has no object.
    """
    tree = Tree.of(path)
    layout, (first, second) = read_layout(tree, train, test)
    classes = tuple(first.names[key] for key in sorted(first.names))
    unknown = sorted(set(second.names.values()) - set(classes))
    if unknown:
        raise ValueError(
            f"the split {second.split} has classes that {first.split} lacks: "
            f"{', '.join(unknown)}; correct the names, or move such images"
        )
    # A crowd is a heap of objects in one box, so there is nothing to learn from it.
    learnt = [
        row for row in first.annotations if number(row.get("iscrowd")) != 1 or row.get("difficult")
    ]
    training = _build_split(tree, first._replace(annotations=learnt), classes)
    return DetectionData(training, _build_split(tree, second, classes), classes, layout)


def _build_split(tree: Tree, listed: ListedSplit, classes: Sequence[str]) -> DetectionSplit:
    """Turn a split into tensors, counting what is left out."""
    files, sizes = [row["file_name"] for row in listed.images], _sizes(listed)
    names = [listed.names[row["category_id"]] for row in listed.annotations]
    places = {row["id"]: i for i, row in enumerate(listed.images)}
    image = torch.tensor([places.get(row["image_id"], -1) for row in listed.annotations]).long()
    sides = [_four_numbers(row.get("bbox")) for row in listed.annotations]
    # Left, top, width, height -> left, top, right, bottom.
    boxes = box_convert(torch.tensor(sides, dtype=torch.float64).reshape(-1, 4), "xywh", "xyxy")
    # An object of no image, -1, has the last row's size, which is nobody's.
    limits = torch.cat([sizes, sizes.new_zeros(1, 2)])[image].repeat(1, 2)  # (A, 4)
    clipped = boxes.clamp(min=0).minimum(limits)
    # In this order: an object that has several problems counts for the first one.
    problems = {
        "belong to no image of it, and were left out": image < 0,
        "have no box, and were left out": ~boxes.isfinite().all(dim=1),
        "have an empty box, and were left out": _empty(boxes),
        "lie outside of their image, and were left out": _empty(clipped),
        # Half a pixel is what rounding leaves, and not an error of the annotator's.
        "reach out of their image, and were clipped": ((clipped - boxes).abs() > 0.5).any(dim=1),
    }
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for problem, affected in problems.items():
        if found := (affected & kept).nonzero().flatten().tolist():
            place = f"the first: {names[found[0]]} in {[*files, 'no image'][image[found[0]]]}"
            text = f"{len(found)} objects of {listed.split} {problem} ({place})"
            warnings.warn(text, stacklevel=3)
        if problem.endswith("left out"):
            kept &= ~affected
    if not kept.any():
        raise ValueError(
            f"{tree.root} has no object with a box in its split {listed.split}; annotate some"
        )
    left = kept.nonzero().flatten()
    left = left[image[left].argsort(stable=True)]  # (A,), the objects image by image.
    annotations = [listed.annotations[i] for i in left.tolist()]
    return DetectionSplit(
        tree=tree,
        name=listed.split,
        files=_find_images(tree, listed, files),
        sizes=sizes,
        # Objects are sorted by image: where each image's own begin, and where the last ones end.
        starts=torch.searchsorted(image[left], torch.arange(len(files) + 1)),
        boxes=clipped[left].float(),
        labels=torch.tensor([classes.index(names[i]) + 1 for i in left.tolist()]),
        iscrowd=torch.tensor([int(number(row.get("iscrowd")) == 1) for row in annotations]),
        segmentations=tuple(row.get("segmentation") or None for row in annotations),
    )


def _four_numbers(bbox: object) -> list[float]:
    """Return the four numbers of a box, NaN where there is no number."""
    sides = bbox if isinstance(bbox, list) and len(bbox) == 4 else [None] * 4
    return [number(side) for side in sides]


def _sizes(listed: ListedSplit) -> Tensor:
    """Return the sizes of a split's images, (N, 2) int64, width and height."""
    sides = [[number(row.get(side)) for side in ("width", "height")] for row in listed.images]
    sizes = torch.tensor(sides, dtype=torch.float64).reshape(-1, 2)
    valid = ((sizes >= 1) & (sizes <= _LONGEST_SIDE)).all(dim=1)  # NaN is not.
    for row, fits in zip(listed.images, valid.tolist(), strict=True):
        if not fits:
            raise ValueError(
                f"{listed.file} gives {row['file_name']!r} the size {row.get('width')!r} x "
                f"{row.get('height')!r}; expected two numbers from 1 to {_LONGEST_SIDE:,}"
            )
    return sizes.long()


def _empty(boxes: Tensor) -> Tensor:
    """Tell which boxes (A, 4) have no area -> (A,) bool."""
    return (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)


def _find_images(tree: Tree, listed: ListedSplit, files: Sequence[str]) -> tuple[str, ...]:
    """Find the folder of the images, check that each is there, and return their paths."""
    folder = next((name for name in listed.folders if tree.has(name + files[0])), None)
    if folder is None:
        raise ValueError(
            f"the first image of {listed.split}, {files[0]!r}, is in none of the folders "
            f"{', '.join(map(repr, listed.folders))}; put the images into one of them"
        )
    missing = [file for file in files if not tree.has(folder + file)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images of {listed.split} are missing in {folder!r}, "
            f"the first is {missing[0]}; add them, or remove them from the JSON file"
        )
    return tuple(folder + file for file in files)
