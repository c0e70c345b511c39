"""Backbones by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_runs import tiny_config
from torch import Tensor

from mixmask.backbones import build_backbone, check_sizes
from mixmask.checkpoints.load import load_backbone
from mixmask.runs.folder import save_checkpoint, write_config
from mixmask.trainers.methods import build_encoder


@pytest.mark.parametrize(
    "arch, small_stem, in_chans",
    [
        ("narrow", False, 3),
        ("medium", False, 1),
        ("resnet18", True, 13),
        ("lcnet_050", False, 3),
        ("vit_tiny_patch16_224.augreg_in21k", False, 4),
        ("mobilenet_v3_small", False, 3),
        ("torchvision/resnet18", True, 3),
    ],
)
def test_backbone_returns_pooled_features(arch: str, small_stem: bool, in_chans: int) -> None:
    backbone = build_backbone(arch, small_stem=small_stem, image_size=32, in_chans=in_chans)
    assert backbone.training
    features = backbone(torch.randn(2, in_chans, 32, 32))
    assert features.shape == (2, backbone.num_features)


@pytest.mark.parametrize("arch, own", [("vit_tiny_patch16_224", 224), ("swin_s3_tiny_224", 224)])
def test_fixed_sizes_are_built_for_the_runs_own(arch: str, own: int) -> None:
    backbone = build_backbone(arch, image_size=96)
    assert backbone(torch.randn(2, 3, 96, 96)).shape == (2, backbone.num_features)
    assert build_backbone(arch)(torch.randn(2, 3, own, own)).ndim == 2


@pytest.mark.parametrize("arch, size", [("inception_v3", 32), ("vit_b_16", 100), ("resnet18", 0)])
def test_a_size_that_cannot_be_is_refused_in_a_line(arch: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"cannot take .*{size} pixels") as caught:
        check_sizes(build_backbone(arch, image_size=size), arch, (size,))
    assert "\n" not in str(caught.value)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"--arch resnet81 is not a timm backbone; nearest names: r"
    ):
        build_backbone("resnet81")
    with pytest.raises(ValueError, match=r"--arch resnet18\.nobodys is not a timm backbone"):
        build_backbone("resnet18.nobodys")


def test_small_stem_refuses_other_families() -> None:
    with pytest.raises(ValueError, match="--small-stem suits ResNets only, got convnext_atto"):
        build_backbone("convnext_atto", small_stem=True)
    with pytest.raises(ValueError, match="takes 3 channels only; use one of timm"):
        build_backbone("mobilenet_v3_small", in_chans=4)


# Words by which timm names small networks, the smallest first.
_SMALL = (
    "test_", "atto", "femto", "pico", "_050", "nano", "_xxs", "_xs", "xx_small", "_n0", "_n1",
    "_t0", "_b0", "_m0", "_s0", "tiny", "_t", "small", "18", "_s", "",
)  # fmt: skip


def smallest(module: str) -> str:
    names = timm.list_models(module=module)
    return min(names, key=lambda name: (next(i for i, w in enumerate(_SMALL) if w in name), name))


@pytest.mark.slow
@pytest.mark.parametrize("module", timm.list_modules())
def test_a_network_of_every_family_is_read_from_our_own_run(module: str, tmp_path: Path) -> None:
    arch = smallest(module)
    backbone = build_backbone(arch).eval()
    state = backbone.state_dict()
    weights = {f"backbone.{name}": tensor for name, tensor in state.items()}
    save_checkpoint(
        tmp_path, {"model": weights, "optimizer": {}, "step": 1, "rows": [], "meter": {}}
    )
    write_config(tmp_path, {"arch": arch})
    loaded = load_backbone(tmp_path)
    assert (loaded.arch, len(loaded.taken), loaded.left) == (arch, len(state), ())
    for name, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def _cache_weights(arch: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Lay random weights where timm finds what was downloaded before, and cut the network off."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    notes: Any = timm.get_pretrained_cfg(arch)
    name = str(notes.hf_hub_id)
    home = folder / f"models--{name.replace('/', '--')}"
    for place in (home / "refs", home / "snapshots" / "abc"):
        place.mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    torch.manual_seed(3)
    state: dict[str, Tensor] = timm.create_model(arch).state_dict()
    save_file(state, home / "snapshots" / "abc" / "model.safetensors")
    return state


@pytest.mark.parametrize("arch, size", [("resnet18", 32), ("vit_tiny_patch16_224", 48)])
def test_timms_weights_are_loaded_where_they_are_installed(
    arch: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = _cache_weights(arch, tmp_path, monkeypatch)
    loaded = build_backbone(arch, image_size=size, pretrained=True).state_dict()
    same = [name for name in loaded if torch.equal(loaded[name], state[name])]
    assert set(loaded) - set(same) <= {"pos_embed"}  # Resampled to other sizes.
    if arch == "resnet18":
        grey = build_backbone(arch, in_chans=1, pretrained=True)
        expected = state["conv1.weight"].sum(dim=1, keepdim=True)
        torch.testing.assert_close(grey.state_dict()["conv1.weight"], expected)
        with pytest.raises(ValueError, match=r"weights of resnet18 .*--small-stem"):
            build_backbone(arch, small_stem=True, pretrained=True)


def test_timms_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cache_weights("resnet18", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"weights of resnet34 .*fetch them once"):
        build_backbone("resnet34", pretrained=True)
    with pytest.raises(ValueError, match="needs an --arch with pretrained weights, got narrow"):
        build_backbone("narrow", pretrained=True)
    config = tiny_config("moco-v2", arch="resnet18", init="timm", image_size=32)
    encoder = build_encoder(config)
    again = build_encoder(config)
    assert torch.equal(encoder.state_dict()["conv1.weight"], again.state_dict()["conv1.weight"])
