"""Backbones by name."""

from __future__ import annotations

import pytest
import torch

from mixmask.backbones import build_backbone


@pytest.mark.parametrize(
    "arch, small_stem",
    [("narrow", False), ("medium", False), ("resnet18", True), ("lcnet_050", False)],
)
def test_backbone_returns_pooled_features(arch: str, small_stem: bool) -> None:
    backbone = build_backbone(arch, small_stem=small_stem)
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, backbone.num_features)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"--arch resnet81 is no backbone.*nearest names: resnet"):
        build_backbone("resnet81")


def test_small_stem_refuses_other_families() -> None:
    with pytest.raises(ValueError, match="--small-stem suits ResNets only, got convnext_atto"):
        build_backbone("convnext_atto", small_stem=True)
