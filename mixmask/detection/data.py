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

from mixmask.detection.layouts import Source, number, read_layout
from mixmask.detection.segments import check_segmentation, draw_masks
from mixmask.detection.tree import Tree

Target = dict[str, Tensor]

_LONGEST_SIDE = 1_000_000


@dataclass(frozen=True, eq=False)
class DetectionSplit(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) uint8 with targets for torchvision's detectors, read one by one.

    A target has `boxes` (n, 4), `labels` (n,), `iscrowd` (n,) and, where masks are asked for,
    `masks` (n, H, W) uint8. The objects of all images, A of them, lie one after the other.

    Attributes:
        tree: Where the images are.
        name: The split's name.
        files: Paths of the N images within the tree.
        sizes: (N, 2) int64, width and height as annotated.
        starts: (N + 1,) int64, the place of each image's first object.
        boxes: (A, 4) float32, left, top, right, bottom in pixels.
        labels: (A,) int64, 1 for the first class: 0 is the background.
        iscrowd: (A,) int64, 1 for objects that count neither as hit nor as missed: COCO's crowds
            and VOC's difficult objects.
        segmentations: COCO's polygons or run lengths of each object, None where there are none.
        masks: Whether targets have masks.
    """

    tree: Tree
    name: str
    files: tuple[str, ...]
    sizes: Tensor
    starts: Tensor
    boxes: Tensor
    labels: Tensor
    iscrowd: Tensor
    segmentations: tuple[Any, ...]
    masks: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Read an image and its target.

        Raises:
            ValueError: If the file is not an image, or not of the size that was annotated.
        """
        file = self.files[index]
        with self.tree.open_image(file) as opened:
            image = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)  # (3, H, W)
        (height, width), annotated = image.shape[1:], self.sizes[index].tolist()
        if [width, height] != annotated:
            raise ValueError(
                f"{file} has {width}x{height} pixels, but was annotated at "
                f"{annotated[0]}x{annotated[1]}; correct the size or the image"
            )
        objects = self._objects(index)
        target = {
            "boxes": self.boxes[objects],
            "labels": self.labels[objects],
            "iscrowd": self.iscrowd[objects],
        }
        if self.masks:
            target["masks"] = draw_masks(self.segmentations[objects], height, width)
        return image, target

    def with_masks(self) -> DetectionSplit:
        """Return the split with masks in its targets.

        Raises:
            ValueError: If an object has no segmentation, or one that cannot be drawn.
        """
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
    `<split>`, `images/<split>`, `images` or beside; the classes are ordered by their numbers.
    Either may lie in a folder within the folder or zip file. Boxes that extend beyond the image
    are clipped; objects without a box, with an empty box or with one outside of the image are
    left out. A warning counts each kind. COCO's crowds serve in tests only.

    Args:
        path: A folder, or a zip file, which is read in place.
        train: The training split. Default: VOC's trainval, else train; COCO's train...
        test: The split to test on. Default: VOC's test, else val; COCO's val..., else test...

    Raises:
        ValueError: If lists, annotations or images are missing or broken, a class is unknown, or
            a split has no object.
    """
    tree = Tree(path)
    layout, sources = read_layout(tree, train, test)
    names = [_names(source) for source in sources]
    objects = [
        _objects(source, names[i], learn=source is sources[0]) for i, source in enumerate(sources)
    ]
    classes = tuple(names[0][key] for key in sorted(names[0]))
    unknown = sorted(set(names[1].values()) - set(classes))
    if unknown:
        raise ValueError(
            f"the split {sources[1].split} has classes that {sources[0].split} lacks: "
            f"{', '.join(unknown)}; correct the names, or move such images"
        )
    splits = [_build_split(tree, *parts, classes) for parts in zip(sources, objects, strict=True)]
    return DetectionData(splits[0], splits[1], classes, layout)


def _names(source: Source) -> dict[Any, str]:
    """Return the classes of a split by their numbers."""
    rows = source.rows("categories")
    names = {source.key(row, "id"): source.value(row, "name", str) for row in rows}
    if len(set(names.values())) < len(rows) or len({isinstance(key, str) for key in names}) > 1:
        raise ValueError(f"{source.file} lists a category twice, or by text and number; correct it")
    if not all(name.isprintable() for name in names.values()):
        raise ValueError(f"{source.file} has a category whose name cannot be printed; rename it")
    return names


class _Object(NamedTuple):
    """A row of COCO's annotations; `image` is the place of its image among the images."""

    image: int
    name: str
    bbox: list[float]
    crowd: bool
    segmentation: Any


def _objects(source: Source, names: dict[Any, str], *, learn: bool) -> list[_Object]:
    """Check the annotations of a split, row by row, and order them by image."""
    places = {source.key(row, "id"): i for i, row in enumerate(source.rows("images"))}
    if len(places) < len(source.rows("images")):
        raise ValueError(f"{source.file} has two images with the same id; correct it")
    objects, strangers = [], 0
    for row in source.rows("annotations"):
        category, place = source.key(row, "category_id"), places.get(source.key(row, "image_id"))
        crowd = number(row.get("iscrowd")) == 1
        if category not in names:
            raise ValueError(
                f"{source.file} has an object of the unknown category {category!r}; list it"
            )
        if place is None:
            strangers += 1
        # A crowd is a heap of objects in one box, so there is nothing to learn from it.
        elif not (learn and crowd and not row.get("difficult")):
            bbox = row.get("bbox")
            sides = bbox if isinstance(bbox, list) and len(bbox) == 4 else [None] * 4
            numbers, segmentation = [number(side) for side in sides], row.get("segmentation")
            objects.append(_Object(place, names[category], numbers, crowd, segmentation or None))
    if strangers:
        _warn(f"{strangers} objects of {source.split} belong to no image of it, and were left out")
    return sorted(objects, key=lambda item: item.image)


def _sizes(source: Source) -> Tensor:
    """Return the sizes of a split's images, (N, 2) int64, width and height."""
    rows = source.rows("images")
    sides = [[number(row.get(side)) for side in ("width", "height")] for row in rows]
    sizes = torch.tensor(sides, dtype=torch.float64).reshape(-1, 2)
    valid = ((sizes >= 1) & (sizes <= _LONGEST_SIDE)).all(dim=1)  # NaN is not.
    if not valid.all():
        row = rows[valid.tolist().index(False)]
        raise ValueError(
            f"{source.file} gives {row.get('file_name')!r} the size {row.get('width')!r} x "
            f"{row.get('height')!r}; expected two numbers from 1 to {_LONGEST_SIDE:,}"
        )
    return sizes.long()


def _build_split(
    tree: Tree, source: Source, objects: list[_Object], classes: tuple[str, ...]
) -> DetectionSplit:
    """Turn a split into tensors, counting what is left out."""
    sizes = _sizes(source)
    files = [source.value(row, "file_name", str) for row in source.rows("images")]
    image = torch.tensor([item.image for item in objects], dtype=torch.int64)  # (A,)
    boxes = torch.tensor([item.bbox for item in objects], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # Left, top, width, height -> left, top, right, bottom.
    clipped = boxes.clamp(min=0).minimum(sizes[image].repeat(1, 2))  # (A, 4)
    problems = {
        "have no box, and were left out": ~boxes.isfinite().all(dim=1),
        "have an empty box, and were left out": _empty(boxes),
        "lie outside of their image, and were left out": _empty(clipped),
        # Half a pixel is what rounding leaves, and not an error of the annotator's.
        "reach out of their image, and were clipped": ((clipped - boxes).abs() > 0.5).any(dim=1),
    }
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for problem, rows in problems.items():
        affected = (rows & kept).nonzero().flatten().tolist()
        if affected:
            first = objects[affected[0]]
            place = f"the first: {first.name} in {files[first.image]}"
            _warn(f"{len(affected)} objects of {source.split} {problem} ({place})")
        if problem.endswith("left out"):
            kept &= ~rows
    if not kept.any():
        raise ValueError(
            f"{tree.root} has no object with a box in its split {source.split}; annotate some"
        )
    left = [item for item, keep in zip(objects, kept.tolist(), strict=True) if keep]
    return DetectionSplit(
        tree,
        source.split,
        _find_images(tree, source, files),
        sizes,
        torch.searchsorted(image[kept], torch.arange(len(files) + 1)),
        clipped[kept].float(),
        torch.tensor([classes.index(item.name) + 1 for item in left]),
        torch.tensor([int(item.crowd) for item in left]),
        tuple(item.segmentation for item in left),
    )


def _empty(boxes: Tensor) -> Tensor:
    """Tell which boxes (A, 4) have no area -> (A,) bool."""
    return (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)


def _find_images(tree: Tree, source: Source, files: Sequence[str]) -> tuple[str, ...]:
    """Find the folder of the images, check that each is there, and return their paths."""
    folder = next((name for name in source.folders if tree.has(name + files[0])), None)
    if folder is None:
        raise ValueError(
            f"the first image of {source.split}, {files[0]!r}, is in none of the folders "
            f"{', '.join(map(repr, source.folders))}; put the images into one of them"
        )
    missing = [file for file in files if not tree.has(folder + file)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images of {source.split} are missing in {folder!r}, "
            f"the first is {missing[0]}; add them, or remove them from the JSON file"
        )
    return tuple(folder + file for file in files)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
