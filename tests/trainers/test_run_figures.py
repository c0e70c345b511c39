"""What a run tells its figures: when its queue is full, and several draws of a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from started import TINY, start

from mixmask.data.sets import load_data
from mixmask.figures.runs import figure_curves
from mixmask.trainers import start as starting
from mixmask.trainers.loop import first_views
from mixmask.trainers.methods import make_config
from mixmask.trainers.parts import Queue
from mixmask.trainers.run import Run


@pytest.mark.parametrize(
    "options, steps", [({}, 2), ({"symmetric": True}, 1), ({"queue_size": 17}, 3)]
)
def test_curves_shade_the_steps_until_all_keys_of_the_queue_were_enqueued(
    options: dict[str, Any],
    steps: int,
    two_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, Any] = {}
    random: list[torch.Tensor] = []
    full: list[bool] = []
    enqueue = Queue.enqueue

    def draw(rows: Any, **given: Any) -> Any:
        drawn.update(given)
        return figure_curves(rows, **given)

    def watch(queue: Queue, keys: torch.Tensor) -> None:
        random.append(queue.keys.clone())
        enqueue(queue, keys)
        full.append(bool((queue.keys != random[0]).any(dim=1).all()))

    monkeypatch.setattr(starting, "figure_curves", draw)
    monkeypatch.setattr(Queue, "enqueue", watch)
    start(tmp_path / "run", data=str(two_classes), **TINY | options)
    assert drawn["queue_steps"] == full.index(True) + 1 == steps


def test_views_of_a_run_show_several_draws_of_a_mask_that_a_batch_shares(
    two_classes: Path, tmp_path: Path
) -> None:
    images = load_data(str(two_classes), 24).train.images
    config = make_config(
        data=str(two_classes), mix="mixmask", mixed_size=8, **TINY | {"grid_size": 4}
    )
    views = first_views(Run.build(config, images, tmp_path))
    [draws] = views.mixed
    assert len(draws) == len(views.query)
    assert {batch.images.shape for batch in draws} == {(len(draws), 3, 8, 8)}
    masks = [batch.mask for batch in draws if batch.mask is not None]
    assert {mask.ndim for mask in masks} == {2}
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1
