"""Runs that go on: after a kill, longer, elsewhere, as a copy, in other processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from started import TINY, equal, start, write_noise
from tiny_runs import read_rows

from mixmask.runs.folder import read_config
from mixmask.trainers.files import load_config
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.run import Run


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    out.mkdir()
    shutil.copy(whole / "config.json", out)
    (out / "last.pt.tmp").write_bytes(b"half")
    start(None, resume=out)
    assert equal(out, whole)


def test_a_start_killed_while_it_wrote_its_configuration_blocks_nothing(
    whole: Path, noise: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json.tmp").write_text("{")
    start(tmp_path, data=str(noise), **TINY)
    assert equal(tmp_path, whole)


def test_a_run_can_be_made_longer(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    shutil.copytree(whole, out)
    exact = "4 epochs instead of 2: weights, images, views and masks go on exactly"
    with pytest.warns(UserWarning, match=rf"{exact}.*\(learning rate 0.015 instead of 0\)"):
        start(None, resume=out, epochs=4)
    assert [row["epoch"] for row in read_rows(out)] == ["1", "2", "3", "4"]
    assert (load_config(out).epochs, load_config(whole).epochs) == (4, 2)
    with pytest.raises(ValueError, match=r"--epochs must be at least the 4 of .*, got 3"):
        start(None, resume=out, epochs=3)
    message = r"remove --lr, --mix \(only --epochs, --data, --out"
    with pytest.raises(ValueError, match=message):
        start(None, resume=out, lr=0.1, mix="none")


def test_a_copy_goes_on_exactly_and_its_original_stays(
    noise: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, copy = tmp_path / "part", tmp_path / "copy"
    _break_after(4, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        start(part, data=str(noise), **TINY, save_every=2)
    monkeypatch.undo()
    before = (part / "last.pt").read_bytes()
    assert torch.load(part / "last.pt", weights_only=True)["step"] == 4
    with pytest.warns(UserWarning, match="part stays as it is; .*copy goes on"):
        start(copy, resume=part)
    assert equal(copy, whole)
    assert (part / "last.pt").read_bytes() == before
    assert [row["epoch"] for row in read_rows(copy)] == ["1", "2"]
    start(None, resume=part)
    assert equal(part, whole)


def test_checkpoints_follow_the_clock(noise: Path, whole: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    save = Run.save

    def noting(self: Run, **options: Any) -> None:
        save(self, **options)
        steps.append(self.step)

    for minutes, expected in ((1e-9, [1, 2, 3, 4, 5, 6]), (1e9, [3, 6])):
        steps.clear()
        out = tmp_path / str(minutes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "save", noting)
            start(out, data=str(noise), **TINY, save_minutes=minutes)
        assert steps == expected
        assert equal(out, whole)
        assert load_config(out).save_minutes == minutes


def _break_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process' work in the middle of the next step, as a kill would."""
    terms, calls = MoCo.terms, [0]

    def broken(self: MoCo, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > steps:
            raise ZeroDivisionError
        return terms(self, *arguments, **options)

    monkeypatch.setattr(MoCo, "terms", broken)


def test_the_same_images_may_lie_elsewhere(whole: Path, noise: Path, tmp_path: Path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(noise, moved)
    shutil.copytree(whole, out)
    with pytest.warns(UserWarning, match=r"images are read from .*moved now: all else stays exact"):
        start(None, resume=out, data=str(moved))
    assert load_config(out).data == str(moved)
    other = write_noise(tmp_path / "other", seed=1)
    fewer = write_noise(tmp_path / "fewer", 12)
    for place, reason in (
        (other, "as many, but of other names"),
        (fewer, "12 training images ins"),
    ):
        with pytest.raises(ValueError, match=f"does not hold the images that .*run was.*{reason}"):
            start(None, resume=out, data=str(place))
    assert load_config(out).data == str(moved)


def test_a_run_whose_images_changed_is_told_by_every_command(
    whole: Path, noise: Path, tmp_path: Path
) -> None:
    from mixmask.evaluation import load_task

    changed, out = tmp_path / "changed", tmp_path / "run"
    shutil.copytree(noise, changed)
    shutil.copytree(whole, out)
    text = (out / "config.json").read_text().replace(str(noise.resolve()), str(changed))
    (out / "config.json").write_text(text)
    load_task(out, labelled=False)
    next(changed.rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="23 training images instead of 24; pass their location"):
        load_task(out, labelled=False)


def test_another_number_of_processes_takes_the_same_images_per_step(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    config = json.loads((out / "config.json").read_text())
    two = config | {"processes": 2, "batch_size": 4, "epochs": 3}
    (out / "config.json").write_text(json.dumps(two))
    with pytest.warns(UserWarning, match="1 process instead of 2: each step takes the same images"):
        result = start(None, resume=out)
    assert (result.config.batch_size, result.config.accumulate) == (8, 2)
    assert [row["step"] for row in result.rows] == [3, 6, 9]
    assert read_config(out)["processes"] == 1


def test_a_run_that_started_from_a_checkpoint_goes_on_without_it(
    noise: Path, whole: Path, tmp_path: Path
) -> None:
    origin, out = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(whole, origin)
    started = start(out, data=str(noise), init=str(origin), **TINY | {"epochs": 1})
    assert started.config.init == str(origin)
    shutil.rmtree(origin)
    with pytest.warns(UserWarning, match="2 epochs instead of 1"):
        start(None, resume=out, epochs=2)
    assert load_config(out).init == str(origin)
