"""Damaged and hostile data sets are refused in one line, and nothing else happens."""

from __future__ import annotations

import json
import math
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detection import HEIGHT, WIDTH, rectangles, voc_xml, write_coco, write_voc

from mixmask import cli
from mixmask.detection.data import load_detection
from mixmask.detection.segments import check_segmentation, draw_masks

COCO_JSON = "annotations/instances_train2017.json"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3.5, math.inf, -math.inf, math.nan, 10**400, "", "x", "7", "\ud800", "a\nb",
    [], [[]], [1], [[1, 2]], [None] * 4, {}, {"counts": 1}, {"size": [HEIGHT, WIDTH]},
)  # fmt: skip


def read_all(root: Path) -> None:
    """Read annotations, masks and images, as a run does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load_detection(root)
        for split in (data.train, data.test):
            masked = split.with_masks()
            for i in range(len(masked)):
                masked[i]


def refusal(root: Path) -> str:
    """Return the one line with which data are refused."""
    with pytest.raises(ValueError) as refused:
        read_all(root)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def zip_with(
    root: Path, change: Callable[[bytearray, zipfile.ZipInfo, int], None], name: str
) -> Path:
    """Zip a folder, and change the record of one member."""
    out = root.with_suffix(".zip")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(root).as_posix())
        member, directory = file.getinfo(name), 0
    content = bytearray(out.read_bytes())
    directory = content.rindex(name.encode()) - 46  # Its header in the central directory.
    change(content, member, directory)
    out.write_bytes(content)
    return out


def damage(content: bytearray, member: zipfile.ZipInfo, _: int) -> None:
    start = member.header_offset + 30 + len(member.filename)
    for i in range(start, start + member.compress_size):
        content[i] ^= 0x55


def encrypt(content: bytearray, member: zipfile.ZipInfo, directory: int) -> None:
    content[member.header_offset + 6] |= 1
    content[directory + 8] |= 1


def use_unknown_compression(content: bytearray, member: zipfile.ZipInfo, directory: int) -> None:
    struct.pack_into("<H", content, member.header_offset + 8, 99)
    struct.pack_into("<H", content, directory + 10, 99)


@pytest.mark.parametrize("change", [damage, encrypt, use_unknown_compression])
@pytest.mark.parametrize(
    "write, name",
    [
        (write_coco, COCO_JSON),
        (write_coco, "train2017/2.png"),
        (write_voc, "Annotations/i2.xml"),
        (write_voc, "ImageSets/Main/test.txt"),
    ],
)
def test_zip_members_that_cannot_be_read(
    change: Callable[..., None], write: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    line = refusal(zip_with(write(tmp_path / "data"), change, name))
    assert f"{name} in " in line
    assert "cannot be read" in line


def test_a_worker_says_it_in_one_line_too(tmp_path: Path) -> None:
    from mixmask.detection.metrics import read_batches

    root = write_voc(tmp_path / "data")
    (root / "JPEGImages" / "i2.jpg").write_bytes(b"no image")
    split = load_detection(root).train
    for workers in (0, 1):
        with pytest.raises(
            ValueError, match=r"^JPEGImages/i2.jpg is not a readable image \([^\n]*$"
        ):
            list(read_batches(split, range(5), 2, workers))
        assert active_children() == []  # Although the error still lives.


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 200_000, "RecursionError"),
        ('{"a":' * 200_000, "RecursionError"),
        ("9" * 5000, "Exceeds the limit"),
        (b"\xff\xfe{", "UnicodeDecodeError"),
        ("[]", "'categories' must be a list"),
        ('{"categories": 3}', "'categories' must be a list"),
        ('{"categories": [3]}', "'categories' must be a list"),
    ],
)
def test_json_that_is_not_coco(content: str | bytes, message: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    raw = content.encode() if isinstance(content, str) else content
    (root / COCO_JSON).write_bytes(raw)
    line = refusal(root)
    assert COCO_JSON in line
    assert message in line


@pytest.mark.parametrize("table, message", [
    ("annotations", "'annotations' must be a list of objects"),
    ("images", "'images' must be a list of objects"),
])  # fmt: skip
def test_rows_that_are_numbers(table: str, message: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    content = json.loads((root / COCO_JSON).read_text())
    content[table][1] = 7
    (root / COCO_JSON).write_text(json.dumps(content))
    assert message in refusal(root)


@pytest.mark.parametrize("side", ["1e999", "-1", "NaN", '"wide"', "0", "1" * 400, "null", "[80]"])
def test_sizes_that_no_image_has(side: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    text = (root / COCO_JSON).read_text().replace(f'"width": {WIDTH}', f'"width": {side}', 1)
    (root / COCO_JSON).write_text(text)
    assert "gives '0.png' the size" in refusal(root)


@pytest.mark.parametrize("table, key", [
    ("categories", "id"), ("categories", "name"), ("images", "id"), ("images", "file_name"),
    ("images", "width"), ("annotations", "image_id"), ("annotations", "category_id"),
    ("annotations", "bbox"), ("annotations", "iscrowd"), ("annotations", "segmentation"),
    ("", "categories"), ("", "images"), ("", "annotations"),
])  # fmt: skip
def test_odd_values_are_refused_or_left_out(table: str, key: str, tmp_path: Path) -> None:
    """No value at any place of the JSON file raises anything but one line."""
    root = write_coco(tmp_path / "data", train=2, test=1)
    path = root / COCO_JSON
    content, lines = path.read_text(), []
    for value in ODD:
        changed = json.loads(content)
        place = changed[table][0] if table else changed
        for parent, name in (
            (place, key),
            *([(place[key], 0)] if isinstance(place[key], list) else []),
        ):
            kept, parent[name] = parent[name], value
            path.write_text(json.dumps(changed))
            parent[name] = kept
            try:
                read_all(root)
            except ValueError as refused:
                lines.append(str(refused))
    assert all(len(line.splitlines()) == 1 for line in lines)


@pytest.mark.parametrize(
    "segmentation",
    [
        7, "polygon", [7], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, math.inf]], [[1, 2, 3, 4, 5, math.nan]], [[1, 2, 3, 4, 5, 1e9]],
        [[1, 2, 3, 4, 5, 10**400]],
        {"size": [8, 8]}, {"counts": [64]}, {"size": [8, 9], "counts": [64]},
        {"size": [8, 8], "counts": [63]}, {"size": [8, 8], "counts": [65]},
        {"size": [8, 8], "counts": [-1, 65]}, {"size": [8, 8], "counts": [32.0, 32.0]},
        {"size": [8, 8], "counts": []}, {"size": [8, 8], "counts": ""},
        {"size": [8, 8], "counts": "o" * 10_000}, {"size": [8, 8], "counts": "ö\ud7ff"},
    ],
)  # fmt: skip
def test_segmentations_that_cannot_be_drawn(segmentation: Any) -> None:
    with pytest.raises(
        ValueError, match=r"x\.png has a broken segmentation, .*; expected polygons"
    ):
        check_segmentation(segmentation, 8, 8, "x.png")


def test_run_lengths_read_as_pycocotools_reads_them() -> None:
    import numpy as np
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        pixels = np.asfortranarray(rng.random((37, 53)) < share, dtype=np.uint8)
        runs = coco_mask.encode(pixels)
        segmentation = {"size": [37, 53], "counts": runs["counts"].decode()}
        check_segmentation(segmentation, 37, 53, "x.png")
        assert torch.equal(draw_masks([segmentation], 37, 53)[0], torch.from_numpy(pixels))


def test_random_run_lengths_and_polygons_never_crash() -> None:
    """What is not refused is drawn; pycocotools alone ends the process within such strings."""
    rng = random.Random(0)
    drawn = 0
    for _ in range(2000):
        text = "".join(chr(rng.randrange(48, 112)) for _ in range(rng.randrange(1, 6)))
        points = [rng.choice([-8, 0, 0.5, 3, 8, 15.9]) for _ in range(2 * rng.randrange(3, 6))]
        for segmentation in ({"size": [8, 8], "counts": text}, [points]):
            try:
                check_segmentation(segmentation, 8, 8, "x.png")
            except ValueError:
                continue
            drawn += 1
            assert draw_masks([segmentation], 8, 8).shape == (1, 8, 8)
    assert drawn > 2000  # Every polygon, and a few of the strings.


@pytest.mark.parametrize(
    "content, message",
    [
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "is broken XML (LookupError"),
        ("<?xml version='1.0' encoding='utf-7'?><annotation/>", "is broken XML"),
        (voc_xml(rectangles(2)).replace(f"<width>{WIDTH}<", "<width>1e999<"), "the size '1e999' x"),
        (voc_xml(rectangles(2)).replace(f"<width>{WIDTH}<", "<width>wide<"), "the size 'wide' x"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><a/>".encode("utf-16"), "declares a document type"),
        (b"\0\xff\x81", "is broken XML"),
    ],
)  # fmt: skip
def test_xml_that_is_not_voc(content: str | bytes, message: str, tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data")
    raw = content.encode() if isinstance(content, str) else content
    (root / "Annotations" / "i2.xml").write_bytes(raw)
    assert message in refusal(root)


@pytest.mark.parametrize("side", ["1e999", "-1e999", "nan", "1" * 400])
def test_voc_boxes_that_are_not_finite(side: str, tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data")
    text = voc_xml([("red", 4, 4, 9, 9), *rectangles(2)]).replace("<xmax>9<", f"<xmax>{side}<")
    (root / "Annotations" / "i2.xml").write_text(text)
    with pytest.warns(UserWarning, match="1 objects of trainval have "):
        data = load_detection(root)
    assert len(data.train[2][1]["boxes"]) == 2


def test_deep_xml(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data")
    deep = "<a>" * 100_000 + "</a>" * 100_000
    (root / "Annotations" / "i2.xml").write_text(voc_xml(rectangles(2), extra=deep))
    assert len(load_detection(root).train[2][1]["boxes"]) == 2


def test_an_image_listed_twice(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data")
    content = json.loads((root / COCO_JSON).read_text())
    content["images"][1]["id"] = content["images"][0]["id"]
    (root / COCO_JSON).write_text(json.dumps(content))
    assert "two images with the same id" in refusal(root)


def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_coco(tmp_path / "data")
    content = json.loads((root / COCO_JSON).read_text())
    content["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": "oooo`~1`"}
    (root / COCO_JSON).write_text(json.dumps(content))
    words = ["--data", str(root), "--arch", "narrow", "--out", str(tmp_path / "out")]
    assert cli.main(["detect", "random", *words, "--model", "mask-rcnn"]) == 2
    [*_, line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mixmask: train2017/0.png has a broken segmentation")
    assert not (tmp_path / "out").exists()
