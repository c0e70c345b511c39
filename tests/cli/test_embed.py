"""`mixmask embed`, and what it has in common with maps and neighbours."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import cli
from mixmask.checkpoints.load import load_backbone
from mixmask.data.views import normalize


def test_embed_names_each_row(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.npy"
    words = ["embed", str(run), "--to", "npy", "--out", str(out), "--device", "cpu"]
    assert cli.main(words) == 0
    assert "58 images" in capsys.readouterr().out
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    features, backbone = np.load(out), load_backbone(run).backbone
    assert features.shape == (58, 128)
    assert features.dtype == np.float32
    for i in (0, 30, 57):
        folder = photographs / {"train": "train", "test": "val"}[rows[i]["split"]]
        assert rows[i]["file"].startswith(rows[i]["class"])
        with Image.open(folder / rows[i]["file"]) as image:
            small = np.array(image.resize((18, 18), Image.Resampling.BICUBIC))
        x = normalize(torch.from_numpy(small[1:17, 1:17]).permute(2, 0, 1)[None])
        np.testing.assert_allclose(features[i], backbone(x)[0].detach(), atol=1e-4)


def test_images_without_a_label_are_counted(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (
        "import torch\ndef load():\n    images = list(torch.zeros(9, 3, 18, 18))\n"
        "    return list(zip(images[:6], (0, -1, 1, -1, -1, 0))), list(zip(images[6:], (0, 1, -1)))"
    )
    (tmp_path / "partly.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    words = [str(run), "--data", "partly:load", "--device", "cpu"]
    told = "mixmask: left out of partly:load: 4 images without a label"
    for command in (["embed"], ["neighbours", "--k", "2", "--queries", "1"]):
        assert cli.main([*command, *words]) == 0
        assert capsys.readouterr().err.splitlines().count(told) == 1
    assert len(np.load(run / "features.npy")) == 5
    assert cli.main(["embed", str(run), "--force"]) == 0
    assert "left out" not in capsys.readouterr().err


def test_embed_counts_images_without_files(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    assert cli.main(["embed", str(run), "--data", "clothing64", "--out", str(out)]) == 0
    lines = out.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == len(np.load(out)) + 1
    assert lines[1].startswith("train,")
    assert lines[1].endswith(",0")


@pytest.mark.parametrize(
    "command, name", [("map", "x.png"), ("neighbours", "x.png"), ("embed", "x.npy")]
)
def test_files_are_replaced_with_force_alone(
    command: str, name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    words = [command, str(run), "--out", str(out)]
    out.write_text("mine")
    assert cli.main(words) == 2
    assert (
        f"{out} exists; name another --out, or overwrite it with --force" in capsys.readouterr().err
    )
    assert out.read_text() == "mine"
    assert cli.main([*words, "--force"]) == 0
    assert out.read_bytes()[:4] != b"mine"
    for bad in (["--image-size", "-1"], ["--device", "gpu"], ["--data", "nowhere"]):
        assert cli.main([*words, "--force", *bad]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"mixmask: {bad[0]} ")


def test_embed_needs_a_file_of_its_format(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["embed", str(run), "--out", "x.txt"]) == 2
    assert "--out must name a .npy file, got x.txt; use x.npy" in capsys.readouterr().err
