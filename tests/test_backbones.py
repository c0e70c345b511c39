"""Backbones by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from mixmask.backbones import build_backbone, check_sizes
from mixmask.checkpoints.load import load_backbone
from mixmask.runs.folder import save_checkpoint, write_config


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
