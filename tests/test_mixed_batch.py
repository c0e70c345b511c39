"""The record of a mixture: moved, pinned, collated and shown as a tensor is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmask import (
    BlockMaskGenerator,
    MixedBatch,
    erase_batch,
    mix_batch,
    mixup_batch,
)

# A record travels as a tensor does.


def _records() -> dict[str, MixedBatch]:
    images = torch.rand(6, 3, 16, 16)
    generator = BlockMaskGenerator(4, (0.2, 0.8))
    return {
        "shared": mix_batch(images, generator),
        "per sample": mix_batch(images, generator(6)),
        "without a mask": mixup_batch(images, per_sample=True),
        "per channel": erase_batch(images, torch.rand(6, 3, 4, 4) < 0.5),
    }


records = pytest.mark.parametrize("kind", ["shared", "per sample", "without a mask", "per channel"])


def _fields(record: MixedBatch) -> list[Tensor]:
    parts = (record.images, record.lam, record.partner, record.mask)
    return [part for part in parts if part is not None]


@records
def test_a_device_moves_all_of_a_record(kind: str) -> None:
    record = _records()[kind]
    for moved in (
        record.to("meta"),
        record.to(torch.device("meta")),
        record.to(device="meta", non_blocking=True),
        record.to(torch.empty(0, device="meta")),
    ):
        assert all(part.device.type == "meta" for part in _fields(moved))
        assert len(_fields(moved)) == len(_fields(record))
        assert moved.images.shape == record.images.shape
    assert all(part.device.type == "cpu" for part in _fields(record))
    assert all(map(torch.equal, _fields(record.to("cpu")), _fields(record)))


@records
def test_a_dtype_converts_the_images_alone(kind: str) -> None:
    record = _records()[kind]
    half = record.to(torch.bfloat16)
    assert half.images.dtype == torch.bfloat16
    assert half.lam.dtype == torch.float32
    assert torch.equal(half.lam, record.lam)
    assert half.partner.dtype == torch.int64
    assert half.mask is None or half.mask.dtype == torch.bool
    both = record.to("meta", torch.float16)
    assert (both.images.dtype, both.lam.dtype) == (torch.float16, torch.float32)
    assert all(part.device.type == "meta" for part in _fields(both))


def test_a_copy_of_a_record_shares_nothing() -> None:
    record = _records()["per sample"]
    copied = record.to("cpu", copy=True)
    for ours, theirs in zip(_fields(copied), _fields(record), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


@records
def test_accelerate_and_lightning_move_a_record(kind: str) -> None:
    from accelerate.utils import send_to_device

    record = _records()[kind]
    batch = {"x": [record, torch.zeros(2)]}
    sent = send_to_device(batch, torch.device("meta"), non_blocking=True)["x"][0]
    assert isinstance(sent, MixedBatch)
    assert all(part.device.type == "meta" for part in _fields(sent))
    fabric = pytest.importorskip(
        "lightning_fabric.utilities.apply_func", reason="comes with lightly, which is not installed"
    )
    moved = fabric.move_data_to_device(batch, torch.device("meta"))["x"][0]
    assert isinstance(moved, MixedBatch)
    assert all(part.device.type == "meta" for part in _fields(moved))


def _mix_collated(rows: list[Tensor]) -> MixedBatch:
    return mix_batch(torch.stack(rows), BlockMaskGenerator(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_returns_records(workers: int) -> None:
    images = list(torch.rand(12, 3, 8, 8))
    loader: Any = torch.utils.data.DataLoader(
        images,  # type: ignore[arg-type]
        batch_size=6,
        num_workers=workers,
        collate_fn=_mix_collated,
        multiprocessing_context="spawn" if workers else None,
    )
    batches = list(loader)
    assert len(batches) == 2
    for number, record in enumerate(batches):
        assert isinstance(record, MixedBatch)
        own = torch.stack(images[6 * number : 6 * number + 6])
        assert record.mask is not None
        expected = mix_batch(own, record.mask, partner=record.partner)
        assert torch.equal(record.images, expected.images)


@records
def test_every_part_of_a_record_is_pinned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loader asks for it; without an accelerator there is nothing to pin for."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    record = _records()[kind]
    batch = pin_memory([record])
    assert isinstance(batch[0], MixedBatch)
    assert sorted(pinned) == sorted(map(id, _fields(record)))
    assert all(map(torch.equal, _fields(batch[0]), _fields(record)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device found")
def test_a_loader_pins_records_for_a_device() -> None:
    loader: Any = torch.utils.data.DataLoader(
        list(torch.rand(12, 3, 8, 8)),  # type: ignore[arg-type]
        batch_size=6,
        collate_fn=_mix_collated,
        pin_memory=True,
    )
    for record in loader:
        assert all(part.is_pinned() for part in _fields(record))
        moved = record.to("cuda", non_blocking=True)
        assert all(part.device.type == "cuda" for part in _fields(moved))


@records
def test_records_compare_without_looking_at_values(kind: str) -> None:
    record, other = _records()[kind], _records()[kind]
    assert record == record
    assert record != other
    assert other not in [record]
    assert len({record, other, record}) == 2


@pytest.mark.parametrize(
    "kind, lam, mask",
    [
        ("shared", r"0\.\d+", r"\(16, 16\)"),
        ("per sample", r"0\.\d+\.\.\.0\.\d+", r"\(6, 16, 16\)"),
        ("without a mask", r"\S+\.\.\.\S+", "None"),
        ("per channel", r"0\.\d+\.\.\.0\.\d+", r"\(6, 3, 16, 16\)"),
    ],
)
def test_a_record_shows_in_one_line(kind: str, lam: str, mask: str) -> None:
    text = repr(_records()[kind])
    expected = rf"images=\(6, 3, 16, 16\) float32, lam={lam}, partner=\(6,\), mask={mask}"
    assert re.fullmatch(rf"MixedBatch\({expected}\)", text)
    assert "meta" in repr(_records()[kind].to("meta"))
