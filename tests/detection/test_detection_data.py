"""Both layouts say the same, from folders and zip files, and what is broken is named."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detection import HEIGHT, WIDTH, draw, rectangles, voc_xml, write_coco, write_voc

from mixmask.detection.data import DetectionData, load_detection

Write = Callable[..., Path]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "voc")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco")


def zipped(folder: Path, prefix: str = "") -> Path:
    out = folder.with_suffix(".zip")
    with zipfile.ZipFile(out, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, prefix + path.relative_to(folder).as_posix())
    return out


def check_rectangles(data: DetectionData) -> None:
    """Images, boxes and labels are what was drawn."""
    assert sorted(data.classes) == ["blue", "red"]
    for split, first in ((data.train, 0), (data.test, 5)):
        for i in range(len(split)):
            image, target = split[i]
            assert image.shape == (3, HEIGHT, WIDTH)
            assert image.dtype == torch.uint8
            objects = rectangles(first + i)
            assert target["boxes"].tolist() == [list(box) for _, *box in objects]
            names = [data.classes[label - 1] for label in target["labels"].tolist()]
            assert names == [name for name, *_ in objects]
            for name, box in zip(names, target["boxes"].int().tolist(), strict=True):
                # The whole box has its class's colour, and what is just left of it has not.
                inside = image[:, box[1] + 4 : box[3] - 4, box[0] + 4 : box[2] - 4].float()
                red, _, blue = inside.mean(dim=(1, 2)).tolist()
                assert (red > 150, blue > 150) == (name == "red", name == "blue")
                assert image[0, box[1] + 8, box[0] - 4] in range(110, 160)


@pytest.mark.parametrize("write", [write_voc, write_coco])
@pytest.mark.parametrize("prefix", ["", "VOCdevkit/data/"])
def test_folder_and_zip_say_the_same(write: Write, prefix: str, tmp_path: Path) -> None:
    folder = write(tmp_path / prefix / "data")
    top = tmp_path / (prefix.split("/")[0] or "data")
    for path in (top, zipped(folder, prefix)):
        data = load_detection(path)
        assert (len(data.train), len(data.test)) == (5, 2)
        check_rectangles(data)


# torch before 2.6 warns when a tensor is unpickled.
@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")
def test_workers_read_a_zip_of_their_own(voc: Path) -> None:
    split = load_detection(zipped(voc)).train
    image, _ = split[0]
    again, _ = pickle.loads(pickle.dumps(split))[0]
    assert torch.equal(image, again)


def test_splits_by_name(voc: Path) -> None:
    lists = voc / "ImageSets" / "Main"
    (lists / "few.txt").write_text("i1  1\ni3 -1\n\n")  # VOC's lists of a class have a second word.
    data = load_detection(voc, train="few", test="trainval")
    assert (data.train.name, len(data.train), len(data.test)) == ("few", 2, 5)
    with pytest.raises(ValueError, match=r"--train-split many does not exist; .* has few, test"):
        load_detection(voc, train="many")
    with pytest.raises(ValueError, match="training and test split are both few"):
        load_detection(voc, train="few", test="few")
    (lists / "trainval.txt").unlink()
    with pytest.raises(
        ValueError, match=r"0 files could be the train split: .* has few, test; name"
    ):
        load_detection(voc)


@pytest.mark.parametrize(
    "box, problem, kept",
    [
        ("<bndbox><xmin>9</xmin></bndbox>", "have no box", None),
        ("", "have no box", None),
        ("{9 9 9 20}", "have an empty box", None),
        ("{30 9 20 20}", "have an empty box", None),
        ("{90 9 99 20}", "lie outside of their image", None),
        ("{70 9 99 20}", "reach out of their image, and were clipped", [69, 8, WIDTH, 20]),
        ("{70 9 80.4 20}", "", [69, 8, WIDTH, 20]),
    ],
)
def test_bad_boxes_are_counted(box: str, problem: str, kept: list[float] | None, voc: Path) -> None:
    if box.startswith("{"):
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box[1:-1].split(), strict=True)
        box = f"<bndbox>{''.join(f'<{k}>{v}</{k}>' for k, v in sides)}</bndbox>"
    extra = f"<object><name>red</name>{box}</object>"
    (voc / "Annotations" / "i0.xml").write_text(voc_xml(rectangles(0), extra=extra))
    if problem:
        with pytest.warns(UserWarning, match=f"1 objects of trainval {problem}.*red in .*i0.jpg"):
            data = load_detection(voc)
    else:
        data = load_detection(voc)
    boxes = data.train[0][1]["boxes"].tolist()
    assert boxes[2:] == ([] if kept is None else [kept])


def edit_json(coco: Path, split: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = coco / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_coco_boxes_without_place_or_extent(coco: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0].pop("bbox")
        content["annotations"][1]["bbox"][2] = 0
        content["annotations"][2]["image_id"] = 999

    edit_json(coco, "train2017", change)
    with pytest.warns(UserWarning, match="objects of train2017") as caught:
        data = load_detection(coco)
    texts = " ".join(str(warning.message) for warning in caught)
    for problem in ("have no box", "have an empty box", "belong to no image"):
        assert f"1 objects of train2017 {problem}" in texts
    assert len(data.train[0][1]["boxes"]) == 0
    assert data.train[0][1]["boxes"].shape == (0, 4)


def test_crowds_and_difficult_objects(coco: Path, voc: Path) -> None:
    for split in ("train2017", "val2017"):
        edit_json(coco, split, lambda content: content["annotations"][0].update(iscrowd=1))
    data = load_detection(coco)
    assert data.train[0][1]["iscrowd"].tolist() == [0]
    assert data.test[0][1]["iscrowd"].tolist() == [1, 0]
    for name in ("i0", "i5"):
        path = voc / "Annotations" / f"{name}.xml"
        text = path.read_text().replace("<difficult>0<", "<difficult>1<", 1)
        path.write_text(text)
    data = load_detection(voc)
    assert data.train[0][1]["iscrowd"].tolist() == [1, 0]
    assert data.test[0][1]["iscrowd"].tolist() == [1, 0]


def test_masks_from_polygons_and_run_lengths(coco: Path) -> None:
    from pycocotools import mask as coco_mask

    def change(content: dict[str, Any]) -> None:
        first, second = content["annotations"][:2]
        runs = coco_mask.merge(coco_mask.frPyObjects(first["segmentation"], HEIGHT, WIDTH))
        first["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
        # Uncompressed: columns from the left, zeros first.
        left, top, width, height = second["bbox"]
        counts = [left * HEIGHT + top]
        for column in range(width):
            counts += [height, HEIGHT - height if column < width - 1 else 0]
        counts[-1] = HEIGHT * WIDTH - sum(counts)
        second["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}

    edit_json(coco, "train2017", change)
    split = load_detection(coco).train.with_masks()
    for i in range(len(split)):
        target = split[i][1]
        expected = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
        for mask, (_, left, top, right, bottom) in zip(expected, rectangles(i), strict=True):
            mask[top:bottom, left:right] = 1
        assert torch.equal(target["masks"], expected)


def test_masks_need_segmentations(tmp_path: Path, voc: Path) -> None:
    coco = write_coco(tmp_path / "boxes", masks=False)
    for path, name in ((coco, "train2017"), (voc, "trainval")):
        with pytest.raises(ValueError, match=f"of 5 images in {name} lack some; use --model fast"):
            load_detection(path).train.with_masks()


def remove(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_text(text)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (remove("ImageSets"), r"holds neither ImageSets/Main \(Pascal VOC\) nor annotations"),
        (remove("JPEGImages/i2.jpg"), r"no image JPEGImages/i2.jpg, but ImageSets/Main names it"),
        (remove("Annotations/i2.xml"), "no Annotations/i2.xml, but ImageSets/Main names it"),
        (write("Annotations/i2.xml", "<annotation><object>"), "i2.xml is broken XML"),
        (write("Annotations/i2.xml", "<!DOCTYPE a []><annotation/>"), "declares a document type"),
        (write("Annotations/i2.xml", voc_xml([("", 1, 1, 9, 9)])), "an object without a name"),
        (write("Annotations/i5.xml", voc_xml([("cat", 1, 1, 9, 9)])),
         "the split test has classes that trainval lacks: cat"),
        (write("ImageSets/Main/trainval.txt", ""), "has classes that trainval lacks: blue, red"),
        (write("ImageSets/Main/test.txt", "../../etc/passwd\n"), "name a file outside of the data"),
    ],
)  # fmt: skip
def test_broken_voc_is_named(change: Callable[[Path], None], message: str, voc: Path) -> None:
    change(voc)
    with pytest.raises(ValueError, match=message):
        load_detection(voc)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            remove("annotations/instances_val2017.json"),
            "0 files could be the test split: .* has train",
        ),
        (
            write("annotations/instances_val2017.json", "{"),
            r"is not JSON in COCO's form \(JSONDecode",
        ),
        (
            write("annotations/instances_val2017.json", "{}"),
            "not in COCO's form: 'categories' must be a list",
        ),
        (write("annotations/instances_train2014.json", "{}"), "2 files could be the train split"),
        (remove("train2017/3.png"), "1 of 5 images of train2017 are missing .* first is 3.png"),
        (remove("train2017"), r"first image of train2017, '0.png', is in none of the folders"),
    ],
)
def test_broken_coco_is_named(change: Callable[[Path], None], message: str, coco: Path) -> None:
    change(coco)
    with pytest.raises(ValueError, match=message):
        load_detection(coco)


def test_categories_differ_or_are_unknown(coco: Path) -> None:
    edit_json(coco, "val2017", lambda content: content["categories"].append({"id": 9, "name": "x"}))
    with pytest.raises(ValueError, match="the split val2017 has classes that train2017 lacks: x"):
        load_detection(coco)
    edit_json(coco, "val2017", lambda content: content["annotations"][0].update(category_id=4))
    with pytest.raises(ValueError, match="an object of the unknown category 4"):
        load_detection(coco)


def test_path_out_of_the_data_is_refused(coco: Path) -> None:
    draw(coco.parent / "secret.png", rectangles(0))
    edit_json(
        coco, "train2017", lambda content: content["images"][0].update(file_name="../../secret.png")
    )
    for path in (coco, zipped(coco)):
        with pytest.raises(ValueError, match="name a file outside of the data"):
            load_detection(path)


@pytest.mark.parametrize("write", [write_voc, write_coco])
def test_no_annotation_at_all(write: Write, tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    for path in data.rglob("*.xml"):
        path.write_text(voc_xml([]))
    if write is write_coco:
        for split in ("train2017", "val2017"):
            edit_json(data, split, lambda content: content["annotations"].clear())
    with pytest.raises(ValueError, match="has no object with a box in its split train"):
        load_detection(data)


def test_images_that_cannot_be_read(voc: Path) -> None:
    (voc / "JPEGImages" / "i0.jpg").write_bytes(b"no image")
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(voc / "JPEGImages" / "i1.jpg")
    split = load_detection(voc).train
    with pytest.raises(ValueError, match=r"i0\.jpg is not a readable image"):
        split[0]
    with pytest.raises(ValueError, match=r"i1.jpg has 80x65 pixels, but was annotated at 80x64"):
        split[1]
    path = voc / "Annotations" / "i2.xml"
    path.write_text(path.read_text().replace(f"<width>{WIDTH}<", "<width>0<"))
    assert load_detection(voc).train[2][0].shape == (3, HEIGHT, WIDTH)


def test_what_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"broken\.zip is not a whole zip file"):
        load_detection(tmp_path / "broken.zip")
    with pytest.raises(ValueError, match=r"--data must be a folder or a zip file, got .*nowhere"):
        load_detection(tmp_path / "nowhere")


def test_greyscale_of_16_bits_is_scaled_by_its_range(voc: Path) -> None:
    values = np.full((HEIGHT, WIDTH), 30_000, np.uint16)
    (voc / "JPEGImages" / "i0.jpg").unlink()
    Image.fromarray(values).save(voc / "JPEGImages" / "i0.png")
    image, _ = load_detection(voc).train[0]
    assert image.unique().tolist() == [117]  # Of 255, as 30,000 of 65,535.
