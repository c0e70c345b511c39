"""Files that are refused: no checkpoints, damaged ones, and those of another network."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import timm_backbone, torchvision_resnet
from safetensors.torch import save_file
from torch import nn

from mixmask.backbones import build_backbone
from mixmask.checkpoints.load import load_backbone


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(torchvision_resnet().state_dict(), path)
    with pytest.raises(ValueError) as caught:
        load_backbone(path, arch="resnet50")
    text = str(caught.value)
    counters = "num_batches_tracked"
    wanted = set(timm_backbone("resnet50").state_dict()) - set(torchvision_resnet().state_dict())
    count = sum(not name.endswith(counters) for name in wanted)
    assert f"x.pth does not fit resnet50: {count} missing (layer1.0.conv3.weight, " in text
    assert "layer1.0.conv1.weight (64, 64, 3, 3) instead of (64, 64, 1, 1)" in text
    assert "its keys are those of resnet18" in text
    with pytest.raises(ValueError, match=r"1 of another shape \(conv1.weight .* --no-small-stem"):
        load_backbone(path, small_stem=True)
    state = timm_backbone().state_dict()
    torch.save({**state, "layer1.0.gate": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected \(layer1.0.gate\)"):
        load_backbone(path)


def truncated(path: Path) -> None:
    torch.save(torchvision_resnet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-10_000])


def truncated_legacy(path: Path) -> None:
    state = torchvision_resnet().state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:100_000])


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("folder/readme.txt", "weights")


def torchscript(path: Path) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.save(torch.jit.script(nn.ReLU()), str(path))


def detectron2(path: Path) -> None:
    content = {"model": {"stem.conv1.weight": np.zeros(3)}, "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "make, message",
    [
        (truncated, "is damaged or cut short"),
        (truncated_legacy, "is damaged or cut short"),
        (archive, "is a zip file but not a checkpoint"),
        (torchscript, "is a TorchScript archive"),
        (detectron2, "is in Detectron2's format"),
        (
            lambda path: path.write_text("<!DOCTYPE html>"),
            "is not a checkpoint: it begins with b'<",
        ),
        (lambda path: path.write_bytes(b""), "is damaged: it is empty"),
        (lambda path: torch.save([1, 2], path), "holds a list, but no weights"),
        (lambda path: torch.save({"epoch": 3}, path), "holds the keys 'epoch', but no weights"),
        (lambda path: torch.save({"w": torch.ones(2)}, path), r"its keys: w, .* with --arch"),
        (lambda path: torch.save(torch.ones(2), path), "holds a Tensor, but no weights"),
    ],
)
def test_files_that_are_no_checkpoints(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    make(path)
    with pytest.raises(ValueError, match=rf"x\.pt {message}|x\.pt .*{message}") as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


def test_safetensors_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        load_backbone(path)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: it holds neither last\.pt nor"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_backbone(tmp_path / "nowhere")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = torchvision_resnet().state_dict()
    state["layer1.0.bn1.weight"][3] = float("inf")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"1 not finite \(layer1\.0\.bn1\.weight\); the file is dam"
    ):
        load_backbone(tmp_path / "x.pth")


def test_weights_of_another_arch_name_the_one_to_pass(tmp_path: Path) -> None:
    # Also for pretrain --init, which does not take the architecture from the file.
    torch.save(torchvision_resnet().state_dict(), tmp_path / "x.pth")
    fix = "its keys are those of resnet18, as which it is read with --arch resnet18"
    with pytest.raises(ValueError, match=fix):
        load_backbone(tmp_path / "x.pth", arch="resnet34")


def test_an_arch_that_was_given_is_not_asked_for_again(tmp_path: Path) -> None:
    torch.save(build_backbone("convnext_atto").state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="pass the --arch that it was trained as"):
        load_backbone(tmp_path / "x.pth", arch="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="another network than convnext_femto; name the one"):
        load_backbone(tmp_path / "x.pth", arch="convnext_femto")
