"""From a file to pixels: depth, orientation, kinds, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from tiny_runs import tiny_images
from torch import Tensor

from mixmask.data import images as images_module
from mixmask.data.images import (
    UnreadableError,
    image_suffixes,
    open_image,
    take_crops,
    take_square,
    to_rgb,
)
from mixmask.data.sets import StoredImages, load_data
from mixmask.data.views import random_boxes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square(file: Path, size: int = 4) -> Tensor:
    with open_image(file) as image:
        return take_square(image, size)


def save_deep(file: Path, values: list[float], dtype: str, side: int = 8) -> Path:
    """Write a greyscale image of two halves."""
    halves = np.repeat(np.array(values, dtype), side * side // len(values)).reshape(side, side)
    Image.fromarray(halves).save(file)
    return file


@pytest.mark.parametrize(
    "name, dtype, values, expected",
    [
        ("x.png", "uint16", [3_000, 20_000], [12, 78]),
        ("x.tif", "uint16", [0, 65_535], [0, 255]),
        ("x.tif", "int32", [3_000, 20_000], [12, 78]),
        ("x.tif", "float32", [0.25, 1.0], [64, 255]),
    ],
)
def test_deep_greyscale_is_scaled_by_the_range_of_its_format(
    name: str, dtype: str, values: list[float], expected: list[int], tmp_path: Path
) -> None:
    file = save_deep(tmp_path / name, values, dtype)
    whole = square(file, 8)
    assert (whole.shape, whole.dtype) == ((3, 8, 8), torch.uint8)
    assert whole[:, 0, 0].tolist() == [expected[0]] * 3
    assert whole[:, -1, -1].tolist() == [expected[1]] * 3
    with open_image(file) as image:
        crop = take_crops(image, 1, 8, min_scale=1.0, generator=torch.Generator())
    assert [crop.min().item(), crop.max().item()] == expected


def test_sixteen_bits_of_pgm(tmp_path: Path) -> None:
    body = np.full((4, 4), 20_000, ">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(b"P5 4 4 65535\n" + body)
    assert square(tmp_path / "x.pgm").unique().tolist() == [78]


@pytest.mark.parametrize(
    "dtype, values, found",
    [
        ("int32", [0, 70_000], "from 0 to 70000, beyond 0 to 65535"),
        ("int32", [-5, 9], "from -5 to 9, beyond 0 to 65535"),
        ("float32", [0.0, 255.0], "from 0 to 255, beyond 0 to 1 of its format"),
        ("float32", [0.0, float("nan")], "nan"),
    ],
)
def test_deep_greyscale_beyond_its_range_is_refused(
    dtype: str, values: list[float], found: str, tmp_path: Path
) -> None:
    file = save_deep(tmp_path / "x.tif", values, dtype)
    with pytest.raises(UnreadableError, match=f"{found}.* --data package.module:function"):
        square(file)


def test_twelve_bits_in_sixteen_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for i in range(3):
        save_deep(tmp_path / f"{i}.png", [0, 4_095], "uint16")
    message = r"reach 6.25% of their format's range, of which 8 bits keep 17 levels; .* function"
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path), 4)
    save_deep(tmp_path / "2.png", [0, 40_000], "uint16")
    assert load_data(str(tmp_path), 4).train.images.shape == (3, 3, 5, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_lie_as_their_exif_orientation_says(orientation: int, tmp_path: Path) -> None:
    # How a camera stores what is to be seen with red on top, by its orientation.
    turns = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    seen = Image.new("RGB", (40, 60), "blue")
    seen.paste("red", (0, 0, 40, 30))
    seen.paste("lime", (0, 0, 20, 10))
    stored = seen
    for turn in turns[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    seen.save(tmp_path / "seen.png")
    assert torch.equal(square(tmp_path / "x.png", 16), square(tmp_path / "seen.png", 16))
    crops = []
    for name in ("x.png", "seen.png"):
        with open_image(tmp_path / name) as image:
            generator = torch.Generator().manual_seed(1)
            crops.append(take_crops(image, 3, 8, min_scale=0.2, generator=generator))
    assert torch.equal(*crops)


def test_a_large_jpeg_that_lies_on_its_side_is_decoded_smaller(tmp_path: Path) -> None:
    photograph = Image.fromarray(tiny_images(1)[0].permute(1, 2, 0).numpy())
    seen = photograph.resize((700, 1001), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    seen.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.jpg", exif=exif, quality=95)
    seen.save(tmp_path / "seen.jpg", quality=95)
    taken = []
    for name in ("x.jpg", "seen.jpg"):
        with open_image(tmp_path / name) as image:
            generator = torch.Generator().manual_seed(1)
            taken.append(take_crops(image, 3, 32, min_scale=0.3, generator=generator).float())
            assert max(image.size) < 600  # Decoded at a half or less.
    assert (taken[0] - taken[1]).abs().mean() < 1
    assert taken[0].std() > 20


def test_every_kind_that_pillow_reads_is_an_image(tmp_path: Path) -> None:
    assert {".pgm", ".ppm", ".jfif", ".gif", ".webp", ".bmp", ".tif"} <= image_suffixes()
    assert {".h5", ".eps", ".mpg", ".pdf"}.isdisjoint(image_suffixes())
    picture = Image.new("RGB", (8, 8), (10, 200, 30))
    for kind, form in (("jfif", "JPEG"), ("ppm", "PPM"), ("tga", "TGA"), ("BMP", "BMP")):
        picture.save(tmp_path / f"x.{kind}", form)
    picture.convert("L").save(tmp_path / "x.pgm", "PPM")
    data = load_data(str(tmp_path), 7)
    assert data.train.files == ("x.BMP", "x.jfif", "x.pgm", "x.ppm", "x.tga")
    assert isinstance(data.train.images, Tensor)
    assert (data.train.images[0].amax((1, 2)) == torch.tensor([10, 200, 30])).all()


def test_images_above_pillows_limit_are_refused_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for i in range(2):
        Image.new("L", (20, 20)).save(tmp_path / f"{i}.png")
    message = r"400 pixels\) exceeds limit of 200 .* allow more with MIXMASK_MAX_PIXELS"
    with pytest.raises(OSError, match=message):
        load_data(str(tmp_path), 10)
    monkeypatch.setenv("MIXMASK_MAX_PIXELS", "500")
    assert len(load_data(str(tmp_path), 10).train.images) == 2


def test_pipes_among_images_are_never_opened(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("L", (20, 20), i).save(tmp_path / f"{i}.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "0.png")
    expected = "2 pipes, devices or broken links"
    with pytest.warns(UserWarning, match=expected):
        data = load_data(str(tmp_path), 10, stream="always")
    assert isinstance(data.train.images, StoredImages)
    assert data.train.images[:][:, 0, 0, 0].tolist() == [0, 1, 0]


def read_crops(
    file: Path, count: int, size: int, *, min_scale: float, generator: torch.Generator
) -> torch.Tensor:
    with open_image(file) as image:
        return take_crops(image, count, size, min_scale=min_scale, generator=generator)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_crops_are_those_of_the_whole_image(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"photograph.{suffix}"
    pixels = tiny_images(1)[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((70, 60), Image.Resampling.BICUBIC).save(file)
    crops = read_crops(file, 3, 40, min_scale=0.3, generator=seeded(4))
    assert (crops.shape, crops.dtype) == ((3, 3, 40, 40), torch.uint8)
    whole = TF.pil_to_tensor(Image.open(file))
    boxes = random_boxes(3, 60, 70, 0.3, generator=seeded(4)).int().tolist()
    for crop, (left, top, w, h) in zip(crops, boxes, strict=True):
        expected = TF.resized_crop(whole, top, left, h, w, [40, 40], antialias=True)
        assert (crop.float() - expected.float()).abs().mean() < 0.5
    assert not torch.equal(crops[0], crops[1])


def test_large_jpegs_are_decoded_smaller_with_the_same_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large.jpg"
    pixels = tiny_images(1)[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((1201, 903), Image.Resampling.BICUBIC).save(file, quality=95)
    sizes = []

    def noting(image: Image.Image) -> Image.Image:
        sizes.append(to_rgb(image).size)
        return to_rgb(image)

    def taken() -> torch.Tensor:
        return read_crops(file, 2, 64, min_scale=0.3, generator=seeded(2)).float()

    monkeypatch.setattr(images_module, "to_rgb", noting)
    reduced = taken()
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    whole = taken()
    assert sizes == [(301, 226), (1201, 903)]
    assert (whole - reduced).abs().mean() < 0.5
    assert whole.std() > 20


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        picture = Image.fromarray(np.full((20, 20), 300, dtype=np.uint16))
    else:
        picture = Image.new("RGB", (20, 20), (204, 204, 204)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = bytes(range(256))
    picture.save(file)
    crops = read_crops(file, 2, 8, min_scale=0.5, generator=seeded())
    assert crops.shape == (2, 3, 8, 8)
    if mode != "I;16":
        assert (crops.float() - 204).abs().max() <= 3
