"""Pictures of features from Python, as a notebook draws them."""

from __future__ import annotations

import torch

from mixmask.backbones import build_backbone
from mixmask.data.sets import load_data
from mixmask.evaluation.gallery import Gallery, draw_map, draw_neighbours


def gallery() -> Gallery:
    images = load_data("clothing64", 32).train.images[:24]
    backbones = [("run/a", build_backbone("narrow")), ("run/a", build_backbone("narrow"))]
    labels = torch.arange(24) % 2
    return Gallery(backbones, "photographs", "test", images, labels, images, labels, ("a", "b"))


def test_runs_of_one_name_have_a_panel_each() -> None:
    figure, title = draw_map(gallery(), classes=["b"])
    assert title == "photographs, 12 of 24 test images"
    assert [axis.get_title() for axis in figure.axes] == ["run/a", "run/a"]


def test_neighbours_are_counted_in_the_title() -> None:
    figure, title = draw_neighbours(gallery(), queries=3, k=4)
    shown = [axis.get_title() for axis in figure.axes]
    same = 12 - sum(text[0] in "ab" and " " in text for text in shown)
    assert title == f"run/a: photographs, {same} of 12 neighbours are of the query's class"
