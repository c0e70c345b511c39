"""The two layouts of detection data: Pascal VOC's lists and XML files, COCO's JSON files."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree as ET

from PIL import Image, UnidentifiedImageError

from mixmask.detection.tree import Tree

Box = tuple[float, float, float, float]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
# What else COCO's annotations folder holds.
_NO_INSTANCES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")


@dataclass
class Object:
    """An object as annotated; its box is left, top, right, bottom, or None where it has none."""

    name: str
    box: Box | None
    ignored: bool
    segmentation: Any = None


@dataclass
class Raw:
    """An image as annotated: its path within the data, (width, height), and its objects."""

    image: str
    size: tuple[int, int]
    objects: list[Object] = field(default_factory=list)


class Voc:
    """Pascal VOC's layout.

    Args:
        tree: The data.
        base: Path of the folder that holds `ImageSets`, "" or ending in "/".
    """

    layout = "voc"
    lists = "ImageSets/Main"

    def __init__(self, tree: Tree, base: str) -> None:
        """Note where the data are."""
        self.tree, self.base = tree, base

    def choose(self, train: str, test: str) -> tuple[str, str]:
        """Return the names of the two splits, those given or the usual ones."""
        known = [name.removesuffix(".txt") for name in self.tree.names(self._lists, ".txt")]
        where = f"{self._lists}/*.txt"
        return (
            _named("train", train, known, where) or _first("train", ("trainval", "train"), known),
            _named("test", test, known, where) or _first("test", ("test", "val"), known),
        )

    def read(self, split: str) -> list[Raw]:
        """Read a split's images and objects."""
        text = self.tree.read(f"{self._lists}/{split}.txt").decode(errors="replace")
        names = [line.split()[0] for line in text.splitlines() if line.strip()]
        return [self._image(name) for name in names]

    def classes(self, raws: dict[str, list[Raw]]) -> tuple[str, ...]:
        """Return the classes of the first split, by name; the second has none beside them."""
        (train, known), (test, met) = (
            (split, {item.name for raw in images for item in raw.objects})
            for split, images in raws.items()
        )
        if met - known:
            raise ValueError(
                f"the split {test} has classes that {train} lacks: {', '.join(sorted(met - known))}"
                "; correct the names, or move such images"
            )
        return tuple(sorted(known))

    def to_learn(self, raws: list[Raw]) -> list[Raw]:
        """Return what is learnt from: all, also what VOC calls difficult."""
        return raws

    @property
    def _lists(self) -> str:
        return self.base + self.lists

    def _image(self, name: str) -> Raw:
        images = (f"{self.base}JPEGImages/{name}{suffix}" for suffix in _SUFFIXES)
        image = next((path for path in images if self.tree.has(path)), None)
        if image is None:
            raise ValueError(
                f"there is no image {self.base}JPEGImages/{name}.jpg, but {self.lists} names it; "
                "add it, or take its name out"
            )
        path = f"{self.base}Annotations/{name}.xml"
        root = self._parse(path)
        size = _integer(root.findtext("size/width")), _integer(root.findtext("size/height"))
        if min(size) < 1:
            size = _size_in_header(self.tree, image)
        return Raw(image, size, [_voc_object(item, path) for item in root.iter("object")])

    def _parse(self, path: str) -> ET.Element:
        if not self.tree.has(path):
            raise ValueError(f"there is no {path}, but {self.lists} names it; add it")
        content = self.tree.read(path)
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            raise ValueError(f"{path} declares a document type; VOC's files have none, remove it")
        try:
            return ET.fromstring(content)  # noqa: S314  Entities are refused above.
        except ET.ParseError as error:
            raise ValueError(f"{path} is broken XML ({error}); correct it") from None


def _voc_object(item: ET.Element, path: str) -> Object:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{path} has an object without a name; give its class")
    texts = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(text) for text in texts if text is not None)
    except ValueError:
        box = None
    else:
        # VOC counts pixels from 1 and includes the last one. A box that starts where it ends is a
        # slip of the hand, not an object of one pixel.
        empty = right <= left or bottom <= top
        box = (left, top, left, top) if empty else (left - 1, top - 1, right, bottom)
    return Object(name, box, (item.findtext("difficult") or "0").strip() == "1")


class Coco:
    """COCO's layout.

    Args:
        tree: The data.
        base: Path of the folder that holds `annotations`, "" or ending in "/".
    """

    layout = "coco"
    lists = "annotations"

    def __init__(self, tree: Tree, base: str) -> None:
        """Note where the data are."""
        self.tree, self.base = tree, base
        self._categories: dict[str, dict[int, str]] = {}

    def choose(self, train: str, test: str) -> tuple[str, str]:
        """Return the names of the two splits, those given or the usual ones."""
        known = list(self._files())
        where = f"{self.base}{self.lists}/instances_*.json"
        trains = [name for name in known if name.startswith("train")]
        tests = [name for name in known if name.startswith("val")]
        tests = tests or [name for name in known if name.startswith("test")]
        return (
            _named("train", train, known, where) or _only("train", trains, known),
            _named("test", test, known, where) or _only("test", tests, known),
        )

    def read(self, split: str) -> list[Raw]:
        """Read a split's images and objects."""
        path = f"{self.base}{self.lists}/{self._files()[split]}"
        try:
            content = json.loads(self.tree.read(path))
            names = {int(item["id"]): str(item["name"]) for item in content["categories"]}
            images = {
                item["id"]: Raw(str(item["file_name"]), (int(item["width"]), int(item["height"])))
                for item in content["images"]
            }
            annotations: list[dict[str, Any]] = content["annotations"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no JSON in COCO's form ({type(error).__name__}: {error}); it needs "
                "images, annotations and categories"
            ) from None
        self._categories[split] = names
        strangers = 0
        for item in annotations:
            raw = images.get(item.get("image_id"))
            if raw is None:
                strangers += 1
                continue
            raw.objects.append(_coco_object(item, names, path))
        if strangers:
            warnings.warn(
                f"{strangers} objects of {split} belong to no image of it, and were left out",
                stacklevel=3,
            )
        return self._with_paths(split, list(images.values()))

    def classes(self, raws: dict[str, list[Raw]]) -> tuple[str, ...]:
        """Return the categories, in the order of their numbers; both splits have the same."""
        train, test = raws
        known, met = self._categories[train], self._categories[test]
        if known != met:
            differing = sorted(set(known.items()) ^ set(met.items()))
            listed = ", ".join(f"{number} {name}" for number, name in differing[:5])
            raise ValueError(
                f"the splits {train} and {test} have different categories ({listed}); give both "
                "files the same list"
            )
        return tuple(known[number] for number in sorted(known))

    def to_learn(self, raws: list[Raw]) -> list[Raw]:
        """Return what is learnt from: not the crowds, which are heaps of objects in one box."""
        return [
            Raw(raw.image, raw.size, [item for item in raw.objects if not item.ignored])
            for raw in raws
        ]

    def _files(self) -> dict[str, str]:
        """Return the files of instances by the names of their splits."""
        names = self.tree.names(self.base + self.lists, ".json")
        return {
            name.removesuffix(".json").removeprefix("instances_"): name
            for name in names
            if not name.startswith(_NO_INSTANCES)
        }

    def _with_paths(self, split: str, raws: list[Raw]) -> list[Raw]:
        """Find the folder of the images, and check that each is there."""
        folders = [
            f"{self.base}{name}" for name in (f"{split}/", f"images/{split}/", "images/", "")
        ]
        first = raws[0].image if raws else ""
        folder = next((name for name in folders if first and self.tree.has(name + first)), None)
        if folder is None:
            listed = ", ".join(repr(name) for name in folders)
            raise ValueError(
                f"the first image of {split}, {first!r}, is in none of the folders {listed}; put "
                "the images into one of them"
            )
        missing = [raw.image for raw in raws if not self.tree.has(folder + raw.image)]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(raws)} images of {split} are missing in {folder!r}, the "
                f"first is {missing[0]}; add them, or take them out of the JSON file"
            )
        return [Raw(folder + raw.image, raw.size, raw.objects) for raw in raws]


def _coco_object(item: dict[str, Any], names: dict[int, str], path: str) -> Object:
    category = item.get("category_id")
    if category not in names:
        raise ValueError(f"{path} has an object of the unknown category {category!r}; list it")
    try:
        left, top, width, height = (float(side) for side in item["bbox"])
        box = (left, top, left + width, top + height)
    except (KeyError, TypeError, ValueError):
        box = None
    crowd = bool(item.get("iscrowd", 0))
    return Object(names[category], box, crowd, item.get("segmentation") or None)


def _named(kind: str, split: str, known: Sequence[str], where: str) -> str:
    """Return the split that was asked for, "" if none was, or refuse it."""
    if split and split not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"--{kind}-split {split} is not there; {where} has {listed}")
    return split


def _first(kind: str, usual: Sequence[str], known: Sequence[str]) -> str:
    """Return the first of the usual names that there is."""
    for name in usual:
        if name in known:
            return name
    raise ValueError(
        f"there is no list named {' or '.join(usual)}, but {', '.join(known) or 'none'}; name "
        f"one with --{kind}-split"
    )


def _only(kind: str, candidates: Sequence[str], known: Sequence[str]) -> str:
    """Return the only candidate, or ask for a name."""
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"{len(candidates)} files could be the {kind} split, of {', '.join(known) or 'none'}; "
        f"name one with --{kind}-split"
    )


def _integer(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except ValueError:
        return 0


def _size_in_header(tree: Tree, image: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(tree.read(image))) as opened:
            return opened.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{image} is no readable image ({error}); replace it") from None
