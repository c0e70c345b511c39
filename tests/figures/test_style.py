"""Figures leave pyplot alone, and need no backend."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from PIL import Image

from mixmask.figures.masks import figure_masks
from mixmask.figures.style import new_figure, save_figure

DRAW = """
import sys
from pathlib import Path
import torch
from mixmask.figures.masks import figure_masks
from mixmask.figures.style import save_figure
images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
save_figure(figure_masks(images, grid_sizes=(2,)), Path({out!r}))
assert "matplotlib.pyplot" not in sys.modules
import os
assert os.environ["MPLBACKEND"] == {backend!r}
"""


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "no_such_backend"]
)
def test_figures_need_no_backend(backend: str, tmp_path: Path) -> None:
    out = tmp_path / "masks.png"
    environment = {**os.environ, "MPLBACKEND": backend}
    code = DRAW.format(out=str(out), backend=backend)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    with Image.open(out) as image:
        assert image.format == "PNG"


def test_libraries_that_import_matplotlib_need_no_backend_either() -> None:
    pytest.importorskip("torchmetrics", reason="pip install '.[detection]' for this test")
    code = "from mixmask.figures.style import import_matplotlib as f; f(); import torchmetrics"
    environment = {**os.environ, "MPLBACKEND": "no_such_backend"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_backend_that_is_there_is_used() -> None:
    code = "from mixmask.figures.style import import_matplotlib as f; f(); import matplotlib as m; "
    code += "assert m.get_backend() == 'svg'"
    environment = {**os.environ, "MPLBACKEND": "svg"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_backend_of_the_process_stays(tmp_path: Path) -> None:
    before = dict.__getitem__(mpl.rcParams, "backend")
    mpl.rcParams["backend"] = "svg"
    try:
        figure = figure_masks(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), grid_sizes=(2,))
        save_figure(figure, tmp_path / "masks.png")
        assert mpl.rcParams["backend"] == "svg"
    finally:
        dict.__setitem__(mpl.rcParams, "backend", before)


def test_a_dollar_in_a_name_begins_no_formula(tmp_path: Path) -> None:
    pictures = []
    for number, title in enumerate(("cost $5 to $10, $x^{", "cost S5 to S10, Sx^{")):
        figure: Any = new_figure(4, 1)
        figure.suptitle(title)
        axes = figure.add_subplot()
        axes.set_xticks([0.5], labels=[title])
        save_figure(figure, tmp_path / f"{number}.png")
        pictures.append(figure)
        assert figure._repr_png_()
    # As wide as with another letter: a formula has neither blanks nor the dollars.
    widths = [figure.texts[0].get_window_extent().width for figure in pictures]
    assert widths[0] == pytest.approx(widths[1], rel=0.05)


def test_a_notebook_shows_a_figure_as_a_picture() -> None:
    figure: Any = new_figure(2, 1)
    with Image.open(io.BytesIO(figure._repr_png_())) as image:
        assert image.size == (200, 100)
