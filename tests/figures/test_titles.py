"""Titles say what a figure shows, and never where it lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixmask.data.sets import Split
from mixmask.evaluation import protocols
from mixmask.evaluation.gallery import draw_map
from mixmask.evaluation.metrics import Accuracy
from mixmask.evaluation.neighbours import KNN
from mixmask.evaluation.tasks import BackboneSource, Details, Task
from mixmask.figures.style import write_figure
from mixmask.trainers.methods import make_config
from mixmask.trainers.studies import Cell, Report


def test_confusion_names_run_protocol_accuracy_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []

    def keep(figure: Any, path: Path) -> None:
        figures.append(figure)
        write_figure(figure, path)

    monkeypatch.setattr(protocols, "write_figure", keep)
    source = BackboneSource(
        str(tmp_path / "runs" / "a"), "mixmask", "narrow", False, "/data/pets", 32
    )
    confusion = torch.tensor([[400, 200], [250, 350]])
    accuracy = Accuracy(0.625, None, 0.6, torch.ones(2), confusion)
    details = Details(n_train=4000, dim=64)
    classes = ("cat", "dog")
    result = protocols.Result(KNN(), source, details, accuracy, classes, 1.0, "cpu", "today")
    result.write(tmp_path)
    title = figures[0].axes[0].get_title()
    measured = "top-1 62.5% (95 %: 59.7% ... 65.2%), n = 1,200 test images"
    assert title == f"runs/a, knn on data/pets\n{measured}"


def test_maps_and_studies_name_the_end_of_a_path(tmp_path: Path) -> None:
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    data = str(tmp_path / "sets" / "pets")
    backbone = torch.nn.Sequential(
        torch.nn.AvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(48, 4)
    )
    source = BackboneSource(str(tmp_path / "runs" / "a"), "mixmask", "narrow", False, data, 8)
    task = Task((backbone,), (source,), Split(images), Split(images), ())
    assert draw_map(task)[0].get_suptitle() == "sets/pets, 6 of 6 test images"
    cell = Cell("a", "grid size", "2", make_config(data=data))
    table = Report("masks", tmp_path, [cell], [], 6).write()
    assert "on sets/pets, resnet50 at" in table.splitlines()[0]
