"""The two layouts of detection data, both read into COCO's form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from mixmask.detection.tree import Tree, explain

_VOC_LISTS, _COCO_LISTS = "ImageSets/Main", "annotations"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
# What else COCO's annotations folder holds.
_NO_INSTANCES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")


class Source(NamedTuple):
    """A split in COCO's form: tables `images`, `annotations` and `categories`, not checked yet.

    The images are in the first of the folders that holds the first of them.
    """

    split: str
    file: str
    content: Any
    folders: tuple[str, ...]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return the rows of a table."""
        rows = self.content.get(table) if isinstance(self.content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                f"{self.file} is not in COCO's form: {table!r} must be a list of objects; it needs "
                "images, annotations and categories"
            )
        return rows

    def value(self, row: dict[str, Any], name: str, kinds: type | tuple[type, ...]) -> Any:
        """Return a value of one of some types from a row."""
        value = row.get(name)
        if not isinstance(value, kinds):
            raise ValueError(  # noqa: TRY004  It is the file's error, not the caller's.
                f"{self.file} has {name!r}: {repr(value)[:60]} where COCO's form has "
                f"{'text' if kinds is str else 'a number'}; correct it"
            )
        return value

    def key(self, row: dict[str, Any], name: str) -> Any:
        """Return what rows refer to each other by: a number, or text as some writers have it."""
        return self.value(row, name, (int, float, str))


def read_layout(tree: Tree, train: str, test: str) -> tuple[str, list[Source]]:
    """Read the training and the test split, and say in which layout they are.

    Args:
        tree: The data, or a folder within which they lie.
        train: Name of the training split, or "" for the usual one.
        test: Name of the test split, or "" for the usual one.
    """
    base = tree.find_parent(_VOC_LISTS)
    if base is not None:
        return "voc", _read_voc(tree, base, train, test)
    base = tree.find_parent(_COCO_LISTS)
    if base is not None:
        return "coco", _read_coco(tree, base, train, test)
    raise ValueError(
        f"{tree.root} holds neither {_VOC_LISTS} (Pascal VOC) nor {_COCO_LISTS} (COCO); pass the "
        "folder that does, or a zip file of it"
    )


def number(value: Any) -> float:
    """Return a number, also one written as text; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _choose_splits(
    asked: tuple[str, str], usual: tuple[list[str], list[str]], known: Sequence[str], where: str
) -> list[str]:
    """Return the names of the training and the test split: those asked for, or the usual ones."""
    listed = ", ".join(known) or "none"
    splits = []
    for kind, name, candidates in zip(("train", "test"), asked, usual, strict=True):
        if name and name not in known:
            raise ValueError(f"--{kind}-split {name} is not there; {where} has {listed}")
        if not name and len(candidates) != 1:
            raise ValueError(
                f"{len(candidates)} files could be the {kind} split: {where} has {listed}; name "
                f"one with --{kind}-split"
            )
        splits.append(name or candidates[0])
    if splits[0] == splits[1]:
        raise ValueError(f"training and test split are both {splits[0]}; name others")
    return splits


def _read_coco(tree: Tree, base: str, train: str, test: str) -> list[Source]:
    files = {
        name.removesuffix(".json").removeprefix("instances_"): f"{base}{_COCO_LISTS}/{name}"
        for name in tree.names(base + _COCO_LISTS, ".json")
        if not name.startswith(_NO_INSTANCES)
    }
    trains, vals, tests = (
        [name for name in files if name.startswith(start)] for start in ("train", "val", "test")
    )
    where = f"{base}{_COCO_LISTS}/instances_*.json"
    sources = []
    for split in _choose_splits((train, test), (trains, vals or tests), list(files), where):
        content = tree.read(files[split])
        with explain(f"{files[split]} is not JSON in COCO's form"):
            parsed = json.loads(content)
        folders = tuple(base + name for name in (f"{split}/", f"images/{split}/", "images/", ""))
        sources.append(Source(split, files[split], parsed, folders))
    return sources


def _read_voc(tree: Tree, base: str, train: str, test: str) -> list[Source]:
    """Read two of VOC's lists and the XML files that they name into COCO's form."""
    known = [name.removesuffix(".txt") for name in tree.names(base + _VOC_LISTS, ".txt")]
    usual = ("trainval", "train"), ("test", "val")
    trains, tests = ([name for name in names if name in known][:1] for names in usual)
    where = f"{base}{_VOC_LISTS}/*.txt"
    sources = []
    for split in _choose_splits((train, test), (trains, tests), known, where):
        list_file = f"{base}{_VOC_LISTS}/{split}.txt"
        lines = tree.read(list_file).decode(errors="replace").splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
        images, objects = [], []
        for i, name in enumerate(names):
            image, inside = _voc_image(tree, base, name)
            images.append({**image, "id": i})
            objects += [{**item, "image_id": i} for item in inside]
        # Names serve as numbers, so that the classes are in alphabetical order.
        classes = [{"id": name, "name": name} for name in {item["category_id"] for item in objects}]
        content = {"images": images, "annotations": objects, "categories": classes}
        sources.append(Source(split, list_file, content, (f"{base}JPEGImages/",)))
    return sources


def _voc_image(
    tree: Tree, base: str, name: str
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Read an XML file of VOC's into a row of COCO's images and rows of its annotations."""
    folder, path = f"{base}JPEGImages/", f"{base}Annotations/{name}.xml"
    file = next((name + end for end in _SUFFIXES if tree.has(folder + name + end)), None)
    if file is None or not tree.has(path):
        missing = path if file else f"image {folder}{name}.jpg"
        raise ValueError(
            f"there is no {missing}, but {_VOC_LISTS} names it; add it, or remove its name"
        )
    content = tree.read(path)
    # Entities could blow up what is read. Without its zeros UTF-16 reads like ASCII here.
    if re.search(rb"<!(DOCTYPE|ENTITY)", content.replace(b"\0", b"")):
        raise ValueError(f"{path} declares a document type; VOC's files have none, remove it")
    with explain(f"{path} is broken XML"):
        root = ET.fromstring(content)  # noqa: S314  Entities are refused above.
    size: list[str | int] = [root.findtext(f"size/{side}") or 0 for side in ("width", "height")]
    if any(number(side) <= 0 for side in size):
        with tree.open_image(folder + file) as opened:
            size = list(opened.size)
    width, height = size
    return {"file_name": file, "width": width, "height": height}, [
        _voc_object(item, path) for item in root.iter("object")
    ]


def _voc_object(item: ET.Element, path: str) -> dict[str, object]:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{path} has an object without a name; add its class")
    sides = ("xmin", "ymin", "xmax", "ymax")
    left, top, right, bottom = (number(item.findtext(f"bndbox/{side}")) for side in sides)
    # VOC counts pixels from 1 and includes the last one. A box that starts where it ends is a
    # slip of the hand, not an object of one pixel.
    empty = right <= left or bottom <= top
    extent = [0.0, 0.0] if empty else [right - left + 1, bottom - top + 1]
    difficult = number(item.findtext("difficult")) == 1
    bbox = [left - 1, top - 1, *extent]
    return {"category_id": name, "bbox": bbox, "iscrowd": difficult, "difficult": difficult}
