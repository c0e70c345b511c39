"""Folders of coloured rectangles in both layouts, for the tests of detection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"blue": (30, 40, 220), "red": (220, 30, 30)}
WIDTH, HEIGHT = 80, 64
# Name, left, top, right, bottom; pixels counted from 0, the last one excluded.
Rectangle = tuple[str, int, int, int, int]


def rectangles(index: int) -> list[Rectangle]:
    """Two objects an image, at places of its own."""
    x = 4 + 3 * index % 12
    return [("blue", x, 6, x + 24, 30), ("red", x + 34, 20, x + 60, 56)]


def draw(path: Path, objects: Sequence[Rectangle]) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128))
    for name, left, top, right, bottom in objects:
        image.paste(COLOURS[name], (left, top, right, bottom))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def voc_xml(objects: Sequence[Rectangle], *, extra: str = "") -> str:
    """VOC counts pixels from 1 and includes the last one."""
    items = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left + 1}</xmin>"
        f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, left, top, right, bottom in objects
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation>{size}{items}{extra}</annotation>"


def write_voc(root: Path, *, train: int = 5, test: int = 2) -> Path:
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (root / "Annotations").mkdir()
    names = [f"i{number}" for number in range(train + test)]
    for number, name in enumerate(names):
        draw(root / "JPEGImages" / f"{name}.jpg", rectangles(number))
        (root / "Annotations" / f"{name}.xml").write_text(voc_xml(rectangles(number)))
    (lists / "trainval.txt").write_text("\n".join(names[:train]) + "\n")
    (lists / "test.txt").write_text("\n".join(names[train:]) + "\n")
    return root


def write_coco(root: Path, *, train: int = 5, test: int = 2, masks: bool = True) -> Path:
    (root / "annotations").mkdir(parents=True)
    numbers = {"train2017": range(train), "val2017": range(train, train + test)}
    for split, indices in numbers.items():
        content: dict[str, list[dict[str, Any]]] = {
            # Their numbers have a gap, as COCO's do.
            "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}],
            "images": [],
            "annotations": [],
        }
        for i in indices:
            draw(root / split / f"{i}.png", rectangles(i))
            content["images"].append(
                {"id": 100 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            )
            for name, left, top, right, bottom in rectangles(i):
                item = {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 100 + i,
                    "category_id": {"red": 3, "blue": 7}[name],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
                if masks:
                    item["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
                content["annotations"].append(item)
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return root
