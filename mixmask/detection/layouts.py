"""The two layouts of detection data, both read into COCO's form and checked there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from mixmask.detection.tree import Tree, explain

# A row of a JSON table, in which anything may stand.
TableRow = dict[str, Any]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
# Rows refer to each other by a number, or by text as some writers have it.
_KEY, _TEXT = ((int, float, str), "a number"), ((str,), "text")
_COLUMNS: dict[str, dict[str, tuple[tuple[type, ...], str]]] = {
    "categories": {"id": _KEY, "name": _TEXT},
    "images": {"id": _KEY, "file_name": _TEXT},
    "annotations": {"image_id": _KEY, "category_id": _KEY},
}


class ListedSplit(NamedTuple):
    """A split in COCO's form: rows of images and annotations, and category names by their ids.

    The columns that refer to others are checked; sizes, boxes and segmentations are not yet.
    The images are in the first of the folders that holds the first of them.
    """

    split: str
    file: str
    folders: tuple[str, ...]
    images: list[TableRow]
    annotations: list[TableRow]
    names: dict[Any, str]


def read_layout(tree: Tree, train: str, test: str) -> tuple[str, list[ListedSplit]]:
    """Read the training and the test split, "" for the usual ones, and name their layout."""
    for layout, (read, folder, pattern, usual) in _LAYOUTS.items():
        base, files = tree.find(folder, pattern)
        if files:
            where = f"{base}{folder} has {', '.join(files)}"
            asked = zip(("train", "test"), (train, test), usual, strict=True)
            splits = [_choose_split(*one, list(files), where) for one in asked]
            if splits[0] == splits[1]:
                raise ValueError(f"training and test split are both {splits[0]}; name others")
            return layout, [read(tree, base, split, files[split]) for split in splits]
    raise ValueError(
        f"{tree.root} holds neither ImageSets/Main (Pascal VOC) nor annotations (COCO) with lists "
        "of splits; pass the folder that does, or a zip file of it"
    )


def number(value: object) -> float:
    """Return a number, also one written as text; NaN for anything else."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _choose_split(
    kind: str, asked: str, usual: Sequence[str], known: Sequence[str], where: str
) -> str:
    if asked and asked not in known:
        raise ValueError(f"--{kind}-split {asked} does not exist; {where}")
    groups = ([name for name in known if re.fullmatch(pattern, name)] for pattern in usual)
    candidates = [asked] if asked else next(filter(None, groups), [])
    if len(candidates) != 1:
        raise ValueError(
            f"{len(candidates)} files could be the {kind} split: {where}; name one with "
            f"--{kind}-split"
        )
    return candidates[0]


def _read_coco(tree: Tree, base: str, split: str, file: str) -> ListedSplit:
    content = tree.read(file)
    with explain(f"{file} is not JSON in COCO's form"):
        parsed = json.loads(content)
    folders = tuple(base + name for name in (f"{split}/", f"images/{split}/", "images/", ""))
    return _check_split(split, file, folders, parsed)


def _check_split(split: str, file: str, folders: tuple[str, ...], content: object) -> ListedSplit:
    """Check that the rows of all tables fit each other."""
    categories, images, annotations = (_check_table(file, content, table) for table in _COLUMNS)
    names: dict[Any, str] = {row["id"]: row["name"] for row in categories}
    kinds = {isinstance(key, str) for key in names}
    unknown = [row["category_id"] for row in annotations if row["category_id"] not in names]
    problems = {
        "lists a category twice, or by text and number; correct it": len(kinds) > 1
        or len(set(names.values())) < len(categories),
        "has a category whose name cannot be printed; rename it": not all(
            map(str.isprintable, names.values())
        ),
        "has two images with the same id; correct it": len({row["id"] for row in images})
        < len(images),
        f"has an object of the unknown category {next(iter(unknown), None)!r}; list it": unknown,
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"{file} {problem}")
    return ListedSplit(split, file, folders, images, annotations, names)


def _check_table(file: str, content: object, table: str) -> list[TableRow]:
    """Return the rows of a table, after a check of its columns' types."""
    rows = content.get(table) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{file} is not in COCO's form: {table!r} must be a list of objects; it needs "
            "images, annotations and categories"
        )
    for column, (kinds, expected) in _COLUMNS[table].items():
        wrong = next((row for row in rows if not isinstance(row.get(column), kinds)), None)
        if wrong is not None:
            raise ValueError(
                f"{file} has {column!r}: {repr(wrong.get(column))[:60]} where COCO's form has "
                f"{expected}; correct it"
            )
    return rows


def _read_voc(tree: Tree, base: str, split: str, file: str) -> ListedSplit:
    """Read one of VOC's lists and the XML files that it names into COCO's form."""
    lines = tree.read(file).decode(errors="replace").splitlines()
    images: list[TableRow] = []
    objects: list[TableRow] = []
    for i, name in enumerate(line.split()[0] for line in lines if line.strip()):
        image, inside = _voc_image(tree, base, name)
        images.append({**image, "id": i})
        objects += [{**item, "image_id": i} for item in inside]
    # Names serve as numbers, so that the classes are in alphabetical order.
    classes = [{"id": name, "name": name} for name in {item["category_id"] for item in objects}]
    content = {"images": images, "annotations": objects, "categories": classes}
    return _check_split(split, file, (f"{base}JPEGImages/",), content)


def _voc_image(tree: Tree, base: str, name: str) -> tuple[TableRow, list[TableRow]]:
    """Read an XML file of VOC's into a row of COCO's images and rows of its annotations."""
    folder, path = f"{base}JPEGImages/", f"{base}Annotations/{name}.xml"
    file = next((name + end for end in _SUFFIXES if tree.has(folder + name + end)), None)
    if file is None or not tree.has(path):
        missing = path if file else f"image {folder}{name}.jpg"
        raise ValueError(
            f"there is no {missing}, but ImageSets/Main names it; add it, or remove its name"
        )
    content = tree.read(path)
    # Entities could blow up what is read. Without its zeros UTF-16 reads like ASCII here.
    if re.search(rb"<!(DOCTYPE|ENTITY)", content.replace(b"\0", b"")):
        raise ValueError(f"{path} declares a document type; VOC's files have none, remove it")
    with explain(f"{path} is broken XML"):
        root = ET.fromstring(content)  # noqa: S314  Entities are refused above.
    size: list[str | int] = [root.findtext(f"size/{side}") or 0 for side in ("width", "height")]
    # Some writers leave the size out, or write zeros.
    if any(number(side) <= 0 for side in size):
        with tree.open_image(folder + file) as opened:
            size = list(opened.size)
    objects = [_voc_object(item, path) for item in root.iter("object")]
    return {"file_name": file, "width": size[0], "height": size[1]}, objects


def _voc_object(item: ET.Element, path: str) -> TableRow:
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


# How a layout is read, the folder of its lists, their names, where the group is the split's, and
# the usual training and test split, best first. Users' own lists may lack COCO's prefix.
_LAYOUTS = {
    "voc": (_read_voc, "ImageSets/Main", r"([^/]*)\.txt", (("trainval", "train"), ("test", "val"))),
    "coco": (
        _read_coco,
        "annotations",
        r"(?!captions_|image_info_|panoptic_|person_keypoints_|stuff_)(?:instances_)?([^/]*)\.json",
        (("train.*",), ("val.*", "test.*")),
    ),
}
