"""What a notebook shows, in a real kernel."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INLINE = "module://matplotlib_inline.backend_inline"

EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.execute(notebook, timeout=120)
nbformat.write(notebook, sys.argv[1])
"""
CELLS = (
    # A figure, and a record, as a cell's last line.
    """
import torch
from mixmask.data.sets import load_data
from mixmask.figures.masks import figure_masks
figure_masks(load_data("clothing64", 32).train.images[[0, 9]], grid_sizes=[2])
""",
    "import mixmask; mixmask.mix_batch(torch.rand(8, 3, 32, 32), mixmask.BlockMaskGenerator(2))",
    # The user's own pictures still show.
    """
import matplotlib.pyplot as plt
_ = plt.plot([1, 2])
""",
    # A notebook hands its environment on to the command line.
    "!{python} -m mixmask show --out {out}",
)


@pytest.mark.slow
def test_a_kernel_shows_figures_and_records(tmp_path: Path) -> None:
    reason = "nbclient and ipykernel, which run a notebook, are not installed"
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=reason)
    out, file = tmp_path / "masks.png", tmp_path / "notebook.ipynb"
    empty: dict[str, object] = {
        "cell_type": "code",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    cells = [{**empty, "source": cell.format(python=sys.executable, out=out)} for cell in CELLS]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    file.write_text(json.dumps(content))
    # Beside this process, where a client's sockets that are left open would be errors.
    words = [sys.executable, "-c", EXECUTE, str(file)]
    environment = {**os.environ, "MPLBACKEND": INLINE}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = json.loads(file.read_text())["cells"]
    figure, record, own, command = (cell["outputs"] for cell in cells)
    for shown in (figure[-1], own[-1]):
        assert base64.b64decode(shown["data"]["image/png"]).startswith(b"\x89PNG")
    (text,) = record[-1]["data"]["text/plain"]
    assert text.startswith("MixedBatch(")
    assert f"drew {out}" in "".join(line for part in command for line in part["text"])
    assert out.exists()
