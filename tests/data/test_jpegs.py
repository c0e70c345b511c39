"""JPEGs that the device decodes: which ones, the same crops, and what happens to damaged ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import assert_same, interrupt_at, on_disk, run, tiny_images
from torch import Tensor

from mixmask.data import jpegs, stream
from mixmask.data.crops import Reader, Request, read_jpeg
from mixmask.data.jpegs import Jpeg, Jpegs, check_decoder, decode_crops, is_plain
from mixmask.data.sets import FolderImages
from mixmask.data.stream import Draw, Stream, part_bytes
from mixmask.trainers.methods import make_config
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.run import _large_file

# Newer Pythons warn of what torch's loader does on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CPU = torch.device("cpu")
# No image is so large that Pillow would decode it smaller for crops of so many pixels.
SIZE = 40


def picture(number: int) -> Image.Image:
    image = Image.fromarray(tiny_images(number + 1)[number].permute(1, 2, 0).numpy())
    return image.resize((60 + number, 72 - number), Image.Resampling.BICUBIC)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return twelve photographs: seven usual JPEGs, then what a worker decodes itself."""
    path = tmp_path / "photographs"
    path.mkdir()
    for i in range(6):
        picture(i).save(path / f"{i:02}.jpg", quality=90, progressive=i == 2)
    picture(6).convert("L").save(path / "06.jpg")
    picture(7).convert("CMYK").save(path / "07.jpg")
    picture(8).save(path / "08.jpg", exif=rotated())
    for i in range(9, 12):
        picture(i).save(path / f"{i:02}.png")
    return path


def read_all(
    images: FolderImages,
    decode: str,
    workers: int = 0,
    device: torch.device = CPU,
    steps: int = 2,
) -> list[Tensor]:
    drawn = [Draw(torch.arange(12).roll(i), 2 + i, i) for i in range(steps)]
    options: dict[str, Any] = {"size": SIZE, "min_scale": 0.4, "workers": workers}
    with closing(Stream(images, drawn, device=device, decode=decode, **options)) as batches:
        return [batch.cpu() for batch in batches]


def failing(fails: Callable[[Sequence[Tensor]], bool], error: Exception) -> Callable[[], Any]:
    """Return a decoder that fails as a whole, as TorchCodec does, if one of its images does."""
    decode_jpeg = jpegs._decoder()

    def decode(contents: Sequence[Tensor], **options: Any) -> list[Tensor]:
        if fails(contents):
            raise error
        return list(decode_jpeg(contents, **options))

    return lambda: decode


# The same crops


def test_crops_are_those_that_workers_take(folder: Path, device: torch.device) -> None:
    ours, theirs = (read_all(on_disk(folder), by, device=device) for by in ("device", "workers"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.is_contiguous(memory_format=torch.channels_last)
        # nvJPEG is not the decoder that Pillow has; it differs in how it enlarges chroma.
        assert torch.equal(a, b) if device.type == "cpu" else (a.float() - b).abs().mean() < 2
        assert a.float().std() > 20


def test_batches_are_the_same_whatever_the_number_of_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_all(on_disk(folder), "device")
    monkeypatch.setattr(stream, "_PART", 5)
    for workers in (0, 2):
        batches = read_all(on_disk(folder), "device", workers)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches, whole, strict=True))


def test_usual_jpegs_are_left_to_the_device(folder: Path) -> None:
    images = on_disk(folder)
    answer = Reader(images.files, SIZE, 0.4, keep_jpegs=True)[Request([*range(12)], 0, 12, 2, 5)]
    assert answer.places == [*range(7)]
    assert answer.images.shape == (2, 5, SIZE, SIZE, 3)
    content = b"".join((folder / f"{i:02}.jpg").read_bytes() for i in range(7))
    assert bytes(answer.jpegs.content.tolist()) == content
    assert answer.jpegs.pixels == [(60 + i) * (72 - i) for i in range(7)]
    assert answer.jpegs.boxes.shape == (7, 2, 4)
    plain = Reader(images.files, SIZE, 0.4)[answer.request]
    assert (plain.places, plain.images.shape[1]) == ([], 12)


def test_only_whole_upright_jpegs_in_colours_or_grey_are_plain(folder: Path) -> None:
    for number, expected in ((0, True), (2, True), (6, True), (7, False), (8, False), (9, False)):
        file = next(folder.glob(f"{number:02}.*"))
        with Image.open(file) as image:
            assert is_plain(image, file.read_bytes()) is expected, file
            assert not is_plain(image, file.read_bytes()[:-2])
            image.info["adobe_transform"] = 0  # RGB as it is, without luma and chroma.
            assert not is_plain(image, file.read_bytes())


# Damage


@pytest.mark.parametrize("damage", ["half", "text", "gone"])
def test_broken_files_are_replaced_as_workers_do(damage: str, folder: Path) -> None:
    images = on_disk(folder)
    file = folder / "03.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "half" else b"no image")
    if damage == "gone":
        file.unlink()
    results = []
    for by in ("device", "workers"):
        with pytest.warns(UserWarning, match="03.jpg is no readable image; another stands in"):
            results.append(read_all(FolderImages(images.files, 16), by))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_what_the_device_cannot_decode_is_read_as_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_all(on_disk(folder), "device")
    refused = torch.tensor([*(folder / "04.jpg").read_bytes()], dtype=torch.uint8)
    calls: list[int] = []

    def fails(contents: Sequence[Tensor]) -> bool:
        calls.append(len(contents))
        return any(torch.equal(content, refused) for content in contents)

    monkeypatch.setattr(jpegs, "_decoder", failing(fails, RuntimeError("unsupported")))
    found = read_all(on_disk(folder), "device")
    assert calls == [7, *[1] * 7] * 2
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_file_that_breaks_under_the_device_is_replaced_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = on_disk(folder)
    refused = (folder / "04.jpg").read_bytes()

    def fails(contents: Sequence[Tensor]) -> bool:
        (folder / "04.jpg").write_bytes(refused[:-200])
        return any(len(content) == len(refused) for content in contents)

    monkeypatch.setattr(jpegs, "_decoder", failing(fails, RuntimeError("unsupported")))
    with pytest.warns(UserWarning, match="04.jpg is no readable image; another stands in"):
        found = read_all(images, "device", steps=1)
    with pytest.warns(UserWarning, match="04.jpg is no readable image; another stands in"):
        expected = read_all(on_disk(folder), "workers", steps=1)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_device_out_of_memory_is_no_damaged_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(jpegs, "_decoder", failing(lambda _: True, error))
    with pytest.raises(torch.OutOfMemoryError):
        read_all(on_disk(folder), "device")


def test_large_photographs_are_decoded_few_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.Generator().manual_seed(0)
    found = [
        read_jpeg(folder / f"{i:02}.jpg", 2, SIZE, min_scale=0.4, generator=drawn) for i in range(7)
    ]
    packed = Jpegs.of([jpeg for jpeg in found if isinstance(jpeg, Jpeg)], 2)
    whole = list(decode_crops(packed, SIZE, CPU))
    calls: list[int] = []

    def noting(contents: Sequence[Tensor]) -> bool:
        calls.append(len(contents))
        return False

    monkeypatch.setattr(jpegs, "_decoder", failing(noting, RuntimeError()))
    for room, expected in ((9000, [2, 2, 2, 1]), (1, [1] * 7), (10**6, [7])):
        monkeypatch.setattr(jpegs, "_PIXELS", room)
        calls.clear()
        for ours, theirs in zip(decode_crops(packed, SIZE, CPU), whole, strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)
        assert calls == expected


# Runs


def test_interrupted_and_resumed_ends_in_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        data="photographs", recipe="clothing64", decode="device", image_size=16, epochs=2,
        batch_size=4, queue_size=29, dim=16, monitor=0, workers=1,
    )  # fmt: skip
    whole = run(config, on_disk(folder), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(4, MoCo, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, on_disk(folder), tmp_path / "parts")
    assert_same(run(config, on_disk(folder), tmp_path / "parts", resume=True), whole)


def test_in_memory_the_option_is_said_to_change_nothing(tmp_path: Path) -> None:
    config = make_config(
        data="clothing64", decode="device", epochs=1, batch_size=8, queue_size=29, monitor=0
    )
    with pytest.warns(
        UserWarning, match="--decode device changes nothing here: .* --stream always"
    ):
        run(config, tiny_images(8), tmp_path)


def test_missing_or_old_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    message = r"--decode device needs TorchCodec 0\.16 .*'mixmask\[decode\]', or use --decode work"
    with pytest.raises(ValueError, match=message):
        check_decoder(CPU)


def test_device_that_cannot_decode_stops_the_run_before_its_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("nvJPEG\nnot found")
    monkeypatch.setattr(jpegs, "_decoder", failing(lambda _: True, error))
    config = make_config(
        data="photographs", recipe="clothing64", decode="device", batch_size=4, queue_size=29
    )
    message = r"JPEGs cannot be decoded on cpu \(nvJPEG not found\); use --decode workers"
    with pytest.raises(ValueError, match=message):
        run(config, on_disk(folder), tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_shared_memory_is_reckoned_by_large_files(folder: Path) -> None:
    largest = max(file.stat().st_size for file in folder.iterdir())
    assert _large_file(on_disk(folder)) == largest
    assert part_bytes(8, 2, largest) == 32 * largest
    assert part_bytes(224, 2, largest) == 32 * 2 * 3 * 224 * 224
