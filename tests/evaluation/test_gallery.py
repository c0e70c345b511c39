"""Pictures of features from Python, as a notebook draws them."""

from __future__ import annotations

import torch

from mixmask.backbones import build_backbone
from mixmask.data.sets import Split, load_data
from mixmask.evaluation import Task
from mixmask.evaluation.gallery import draw_map, draw_neighbours
from mixmask.evaluation.tasks import BackboneSource


def task() -> Task:
    images = Split(load_data("clothing64", 32).train.images[:24], torch.arange(24) % 2)
    source = BackboneSource("run/a", "mixmask", "narrow", False, "photographs", 32)
    backbones = (build_backbone("narrow"), build_backbone("narrow"))
    return Task(backbones, (source, source), images, images, ("a", "b"))


def test_runs_of_one_name_have_a_panel_each() -> None:
    figure, title = draw_map(task(), classes=["b"])
    assert title == "photographs, 12 of 24 training images"
    assert [axis.get_title() for axis in figure.axes] == ["run/a", "run/a"]


def test_neighbours_are_counted_in_the_title() -> None:
    figure, title = draw_neighbours(task(), queries=3, k=4)
    shown = [axis.get_title() for axis in figure.axes]
    same = 12 - sum(text[0] in "ab" and " " in text for text in shown)
    assert title == f"run/a: photographs, {same} of 12 neighbours are of the query's class"
