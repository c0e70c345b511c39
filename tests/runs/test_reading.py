"""Checkpoints on disks that change them: every flipped bit and every cut is told."""

from __future__ import annotations

import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmask.runs.folder import has_checkpoint, is_run, load_checkpoint, save_checkpoint
from mixmask.runs.reading import DamagedError, is_sealed, read_checkpoint

CONTENT = {"step": 3, "model": {"w": torch.arange(2000.0), "names": ["a", "b"]}, "rows": []}


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def places(size: int, trials: int) -> list[int]:
    """Choose every byte of both ends, where pickle and directory are, and some between."""
    ends = {*range(64), *range(size - 300, size)}
    return sorted(ends | set(random.Random(0).sample(range(size), trials)))


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def test_every_flipped_bit_of_ours_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONTENT)
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    assert is_sealed(path)
    assert same(read_checkpoint(path)[0], CONTENT)
    for number, place in enumerate(places(len(whole), 200)):
        path.write_bytes(flipped(whole, place, number % 8))
        with pytest.raises(DamagedError, match=r"last\.pt is damaged") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert not is_sealed(path)


def test_every_cut_of_ours_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONTENT)
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    for place in places(len(whole), 100)[2:]:
        for rest in (b"", bytes(len(whole) - place)):
            path.write_bytes(whole[:place] + rest)
            with pytest.raises(DamagedError, match=r"last\.pt is damaged"):
                read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_flip_in_others_files_is_told_or_changes_nothing(legacy: bool, tmp_path: Path) -> None:
    """The older format has no checksums: there a flip may change a weight, silently."""
    path = tmp_path / "x.pth"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=not legacy)
    whole, told = path.read_bytes(), 0
    chosen = places(len(whole), 200)
    for number, place in enumerate(chosen):
        path.write_bytes(flipped(whole, place, number % 8))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content, _ = read_checkpoint(path)
        except ValueError:  # Anything else would be a traceback.
            told += 1
        else:
            assert legacy or same(content, CONTENT)
    assert told > (20 if legacy else 150)


def test_others_files_without_sums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_checkpoint(tmp_path / "x.pth")[0], CONTENT)


def test_a_seal_is_an_ordinary_comment(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONTENT)
    assert same(torch.load(tmp_path / "last.pt", weights_only=True), CONTENT)
    with zipfile.ZipFile(tmp_path / "last.pt") as archive:
        assert archive.comment.startswith(b"mixmask sha256 ")
        assert archive.testzip() is None


def find_misfit(content: Any) -> str:
    return "" if is_run(content) else "foreign"


def saved(folder: Path, steps: int = 3) -> Path:
    for step in range(1, steps + 1):
        save_checkpoint(folder, {**CONTENT, "step": step, "meter": {}})
    return folder / "last.pt"


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda path: path.write_bytes(flipped(path.read_bytes(), 900)), "is damaged"),
        (lambda path: torch.save({"state_dict": {}}, path), r"cannot be used \(foreign"),
        (lambda path: torch.save([1], path), r"cannot be used \(it is not a ch"),
        (lambda path: torch.save({"step": 3, "model": {}}, path), r"cannot be used \(for"),
    ],
    ids=["damaged", "foreign", "no mapping", "a part missing"],
)
def test_the_newest_whole_one_is_used_and_never_replaced(
    spoil: Callable[[Path], Any], told: str, tmp_path: Path
) -> None:
    last = saved(tmp_path)
    spoil(last)
    with pytest.warns(UserWarning, match=rf"last\.pt {told}.*previous\.pt is used") as caught:
        file, content = load_checkpoint(tmp_path, find_misfit)
    assert len(caught) == 1
    assert (file.name, content["step"]) == ("previous.pt", 2)
    save_checkpoint(tmp_path, {**content, "step": 4})
    assert load_checkpoint(tmp_path, find_misfit)[1]["step"] == 4
    last.unlink()
    assert load_checkpoint(tmp_path, find_misfit)[1]["step"] == 2


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    last = saved(tmp_path)
    unfinished = last.rename(tmp_path / "last.pt.tmp")
    assert has_checkpoint(tmp_path)
    file, content = load_checkpoint(tmp_path, find_misfit)
    assert (file, content["step"]) == (unfinished, 3)
    save_checkpoint(tmp_path, {**content, "step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    last.unlink()
    assert load_checkpoint(tmp_path, find_misfit)[1]["step"] == 3


def test_a_kill_while_writing_is_passed_over(tmp_path: Path) -> None:
    last = saved(tmp_path)
    (tmp_path / "last.pt.tmp").write_bytes(last.read_bytes()[:500])
    assert load_checkpoint(tmp_path, find_misfit)[0] == last
    last.unlink()
    assert load_checkpoint(tmp_path, find_misfit)[1]["step"] == 2
