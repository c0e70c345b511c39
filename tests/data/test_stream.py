"""Batches that workers read from a folder: what is drawn, by whom, and what goes wrong."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import assert_same, interrupt_at, on_disk, read_rows, run, tiny_images
from torch.utils.data._utils import signal_handling

from mixmask.data import stream
from mixmask.data.images import UnreadableError, open_image, take_crops
from mixmask.data.sets import StoredImages
from mixmask.data.stream import Draw, Stream, start_worker
from mixmask.trainers import loop
from mixmask.trainers.loop import first_views
from mixmask.trainers.methods import make_config
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.run import Run

# Newer Pythons warn of what torch's loader does on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"epochs": 2, "batch_size": 8, "queue_size": 29, "dim": 16, "image_size": 16}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return 24 photographs, larger and smaller, as JPEG and PNG."""
    path = tmp_path / "photographs"
    path.mkdir()
    for i, image in enumerate(tiny_images(24)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((60 + 2 * i, 80 - i), Image.Resampling.BICUBIC)
        picture.convert("L" if i == 5 else "RGB").save(path / f"{i:02}.{'png' if i % 3 else 'jpg'}")
    return path


@pytest.fixture
def images(folder: Path) -> StoredImages:
    return on_disk(folder)


def draws(count: int = 3) -> list[Draw]:
    return [Draw(torch.randperm(24, generator=seeded(i))[:8], 2 + i % 2, i) for i in range(count)]


def opened(images: StoredImages, workers: int, drawn: list[Draw] | None = None) -> Stream:
    return Stream(images, drawn or draws(), size=16, min_scale=0.2, workers=workers, device=CPU)


def read_all(images: StoredImages, workers: int, drawn: list[Draw] | None = None) -> list[Any]:
    with closing(opened(images, workers, drawn)) as batches:
        return list(batches)


def configured(**options: Any) -> Any:
    return make_config(**(TINY | {"data": "photographs", "recipe": "clothing64"} | options))


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    assert active_children() == []
    assert all(thread.name != "read ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("damage", ["empty", "text", "half", "gone"])
def test_file_that_cannot_be_read(damage: str, folder: Path) -> None:
    for file in (folder / "00.jpg", folder / "01.png"):
        whole = file.read_bytes()
        content = {"empty": b"", "text": b"no image", "half": whole[: len(whole) // 2]}
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(content[damage])
        with pytest.raises(UnreadableError), open_image(file) as image:
            take_crops(image, 2, 8, min_scale=0.5, generator=seeded())


# Batches


def test_batches_are_the_same_whatever_the_number_of_workers(
    images: StoredImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_all(images, 0)
    monkeypatch.setattr(stream, "_PART", 3)
    for workers in (0, 1, 2):
        np.random.seed(workers)  # noqa: NPY002  # What is not to matter.
        random.seed(workers)
        torch.manual_seed(workers)
        batches = read_all(images, workers)
        assert [batch.shape for batch in batches] == [(8 * n, 3, 16, 16) for n in (2, 3, 2)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches, whole, strict=True))


def test_each_view_of_each_image_is_a_crop_of_its_own(images: StoredImages) -> None:
    draw = Draw(torch.tensor([3, 3, 7]), 2, 5)
    (batch,) = read_all(images, 0, [draw])
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert len(batch.flatten(1).unique(dim=0)) == 6
    (other,) = read_all(images, 0, [draw._replace(seed=6)])
    assert (other != batch).flatten(1).any(dim=1).all()
    means = batch.float().mean(dim=(2, 3))  # First all first views, then all second ones.
    assert (means[2] - means[5]).norm() < (means[2] - means[3]).norm()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(workers: int, images: StoredImages) -> None:
    state = torch.get_rng_state()
    read_all(images, workers)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_workers_are_given_can_be_pickled(images: StoredImages) -> None:
    batches = opened(images, 1)
    decoder = pickle.loads(pickle.dumps(batches.loader.dataset))
    (request, *_) = batches.loader.sampler
    ours, theirs = (
        d[pickle.loads(pickle.dumps(request))] for d in (decoder, batches.loader.dataset)
    )
    assert torch.equal(ours.crops, theirs.crops)
    assert pickle.loads(pickle.dumps(batches.loader.worker_init_fn)) is start_worker


def test_closing_early_ends_the_workers(images: StoredImages) -> None:
    batches = opened(images, 2, draws(50))
    next(batches)
    assert len(active_children()) == 2
    batches.close()
    assert active_children() == []
    with pytest.raises(StopIteration):
        next(batches)


def test_signals_to_all_processes_leave_the_workers_at_work(images: StoredImages) -> None:
    with closing(opened(images, 1, draws(8))) as batches:
        next(batches)
        for worker in active_children():
            assert worker.pid is not None
            for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(worker.pid, sent)
        assert len(list(batches)) == 7


# Damage


def test_broken_files_are_named_counted_and_replaced_alike(folder: Path) -> None:
    for name in ("01.png", "02.png"):
        (folder / name).write_bytes(b"no image")
    drawn = [Draw(torch.tensor([0, 1, 2, 9]), 2, 3)] * 2
    results = []
    for workers in (0, 1):
        with pytest.warns(UserWarning, match="readable") as caught:
            results.append(read_all(on_disk(folder), workers, drawn))
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == 2, messages
        assert "01.png is not a readable image (not in a format that Pillow reads)" in messages[0]
        assert messages[1].startswith("2 unreadable images so far")
        assert "; another stands in for it" in messages[0]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    # The next whole one stands in, and the others are what they would have been.
    (stand_in, *_) = read_all(on_disk(folder), 0, [Draw(torch.tensor([0, 3, 3, 9]), 2, 3)])
    same = (results[0][0] == stand_in).flatten(1).all(dim=1)
    assert same.tolist() == [True] * 8


def test_folder_of_which_nothing_can_be_read(folder: Path, images: StoredImages) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(OSError, match="24 images in a row cannot be read: "):
        read_all(images, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_that_vanishes_stops_the_run_which_goes_on_when_it_is_back(
    workers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, images = configured(measure_every=0), on_disk(folder)
    whole = run(config, images, tmp_path / "whole")
    away = tmp_path / "away"
    after_step, steps = MoCo.after_step, [0]

    def vanishing(self: MoCo, done: float) -> None:
        steps[0] += 1
        if steps[0] == 1:
            shutil.move(folder, away)
        after_step(self, done)

    monkeypatch.setattr(Run, "build", _with_workers(workers))
    with monkeypatch.context() as patch:
        patch.setattr(MoCo, "after_step", vanishing)
        expected = r"photographs, is gone; all steps before are saved: --resume"
        with pytest.raises(OSError, match=expected):
            run(config, images, tmp_path / "parts")
    assert 1 <= steps[0] < 6
    shutil.move(away, folder)
    assert_same(run(config, images, tmp_path / "parts", resume=True), whole)


def test_worker_that_dies_stops_the_run_with_its_steps_saved(
    images: StoredImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(epochs=40, measure_every=0, workers=1)
    after_step, steps = MoCo.after_step, [0]
    # As the first loader in a program's main thread does; it raises in the middle of a step.
    signal_handling._set_SIGCHLD_handler()
    before = signal.getsignal(signal.SIGCHLD)

    def killing(self: MoCo, done: float) -> None:
        steps[0] += 1
        for worker in active_children():
            worker.kill()
            time.sleep(0.1)  # The signal arrives here.
        after_step(self, done)

    monkeypatch.setattr(MoCo, "after_step", killing)
    with pytest.raises(OSError, match=r"a process that decodes images died .*--resume"):
        run(config, images, tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert kept["step"] == steps[0] < 120
    assert signal.getsignal(signal.SIGCHLD) is before


# Runs


def _with_workers(count: int) -> Callable[..., Any]:
    """Build runs as ever, but with a number of workers that no option asks for: none."""
    build = Run.build

    def built(*arguments: Any) -> Any:
        made = build(*arguments)
        made.workers = count
        return made

    return built


@pytest.mark.parametrize("step", [2, 3])
def test_interrupted_and_resumed_with_other_workers_ends_in_the_same_weights(
    step: int, images: StoredImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(mix="both", extra_crops=1, mix_every=2, measure_every=0, workers=2)
    whole = run(config, images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(step, MoCo, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, images, tmp_path / "parts")
    torch.manual_seed(12345)
    monkeypatch.setattr(Run, "build", _with_workers(0))
    assert_same(run(config, images, tmp_path / "parts", resume=True), whole)
    losses = [
        [float(row["loss"]) for row in read_rows(tmp_path / name)] for name in ("parts", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_crops_differ_from_epoch_to_epoch_and_seed_to_seed(
    images: StoredImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    next_batch = loop._next_batch

    def noting(*arguments: Any) -> torch.Tensor:
        seen.append(next_batch(*arguments))
        return seen[-1]

    monkeypatch.setattr(loop, "_next_batch", noting)
    monkeypatch.setattr(Run, "build", _with_workers(0))
    for seed in (0, 1):
        run(configured(seed=seed, measure_every=0), images, tmp_path / str(seed))
    crops = torch.cat(seen).flatten(1)
    assert len(crops) == 2 * 2 * 3 * 16
    assert len(crops.unique(dim=0)) == len(crops)


def test_processes_see_disjoint_parts_of_each_epoch(
    images: StoredImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "read_batches", lambda _, drawn, **__: list(drawn))
    parts: list[list[Draw]] = []
    for rank in range(2):
        accelerator = SimpleNamespace(process_index=rank, num_processes=2, device=CPU)
        part = SimpleNamespace(
            config=configured(batch_size=4), accelerator=accelerator, images=images, workers=0,
            steps=3, step=0,
        )  # fmt: skip
        parts.append(loop._batches(part))  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [6, 6]
    for epoch in (slice(0, 3), slice(3, 6)):
        both = torch.cat([draw.images for part in parts for draw in part[epoch]])
        assert sorted(both.tolist()) == list(range(24))
    seeds = {draw.seed for part in parts for draw in part}
    assert len(seeds) == 12


def test_time_spent_waiting_is_recorded(
    images: StoredImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pause = stream.read_batches, threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Any:
        with closing(read(*arguments, **options)) as batches:
            for batch in batches:
                pause.wait(0.05)
                yield batch

    monkeypatch.setattr(loop, "read_batches", slowly)
    run(configured(measure_every=0), images, tmp_path)
    for row in read_rows(tmp_path):
        assert float(row["wait"]) * float(row["seconds"]) >= 3 * 0.05
        assert float(row["wait"]) <= 1


def test_picture_of_a_step_is_drawn_from_a_folder_too(images: StoredImages, tmp_path: Path) -> None:
    views = first_views(Run.build(configured(), images, tmp_path), count=5)
    assert views.query.shape == views.key.shape == (5, 3, 16, 16)
    assert not torch.equal(views.query, views.key)


def test_batch_larger_than_the_folder(images: StoredImages, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size 25 is more than the 24 images"):
        run(configured(batch_size=25), images, tmp_path)
