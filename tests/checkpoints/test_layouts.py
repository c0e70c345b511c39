"""Every row of the table of layouts, against the library that writes such files."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from encoders import photographs, torchvision_resnet, used
from safetensors.torch import save_file
from torch import Tensor, nn

from mixmask.checkpoints.export import export_backbone
from mixmask.checkpoints.layouts import LAYOUTS
from mixmask.checkpoints.load import Loaded, load_backbone
from mixmask.data.views import MEAN, STD, normalize

State = dict[str, Any]
IMAGENET, HALF = (MEAN, STD), ((0.5,) * 3, (0.5,) * 3)
CIFAR = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))


def under(prefix: str, state: State, shift: float = 0.0) -> State:
    return {prefix + key: value + shift for key, value in state.items()}


def heads(*names: str) -> State:
    return {f"{name}.weight": torch.randn(4, 4) for name in names}


@torch.no_grad()
def assert_close(loaded: Loaded, expected: Callable[[Tensor], Tensor], size: int = 32) -> None:
    images = nn.functional.interpolate(normalize(photographs()[0][:3]), size)
    found = loaded.backbone(images)
    assert found.std(dim=0).max() > 1e-3
    torch.testing.assert_close(found, expected(images).flatten(1), rtol=1e-5, atol=1e-5)


def vit(arch: str = "vit_tiny_patch16_224", size: int = 32) -> Any:
    model = timm.create_model(arch, num_classes=0, img_size=size)
    with torch.no_grad():  # Weights as large as trained ones.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def normed(model: Any) -> Any:
    """Let a network's batch norms take their statistics from photographs, not from their start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    return used(model)


# ResNets in files of others: what the file is, and whose it is said to be.
NESTED: dict[str, tuple[str, Callable[[State], State]]] = {
    "net": ("torchvision", lambda s: {"net": s, "acc": 1.0, "epoch": 3}),
    "net parallel": ("torchvision", lambda s: {"net": under("module.", s), "acc": 1.0}),
    "encoder": ("torchvision", lambda s: {"encoder": s, "decoder": heads("up"), "epoch": 1}),
    "model_state": ("torchvision", lambda s: {"model_state": s, "cfg": "x"}),
    "network": ("torchvision", lambda s: {"network": s}),
    "deeper": ("torchvision", lambda s: {"checkpoint": {"parts": {"weights": s}}}),
    "timm's ema": ("torchvision", lambda s: {"state_dict": s, "state_dict_ema": under("", s, 1.0)}),
    "swav": ("swav", lambda s: under("module.", s | heads("projection_head.0", "prototypes"))),
    "dino": (
        "dino",
        lambda s: {
            "student": under("module.backbone.", s, 1.0) | heads("module.head.mlp.0"),
            "teacher": under("backbone.", s) | heads("head.mlp.0"),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
    ),
    "vissl": (
        "vissl",
        lambda s: {
            "phase_idx": 9,
            "classy_state_dict": {
                "base_model": {
                    "model": {
                        "trunk": under("_feature_blocks.", s),
                        "heads": heads("0.clf.0"),
                    },
                    "meters": {},
                }
            },
        },
    ),
    "lightly-train": (
        "lightly-train",
        lambda s: {
            "pytorch-lightning_version": "2.6",
            "state_dict": under("embedding_model.wrapped_model._features.", s)
            | heads("projection_head.layers.0"),
            "lightly_train": {
                "models": {
                    "model": nn.Sequential(nn.Conv2d(1, 1, 1), torchvision.ops.Permute([0]))
                },
                "normalize_args": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
            },
        },
    ),
    "lightly-train's dino": (
        "lightly-train",
        lambda s: {
            "state_dict": under("student_embedding_model.wrapped_model._features.", s, 1.0)
            | under("teacher_embedding_model.wrapped_model._features.", s),
            "lightly_train": {"normalize_args": None},
        },
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_resnets_are_found_where_others_keep_them(name: str, tmp_path: Path) -> None:
    model = torchvision_resnet()
    layout, wrap = NESTED[name]
    torch.save(wrap(dict(model.state_dict())), tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth")
    assert (loaded.layout, loaded.arch, len(loaded.taken)) == (layout, "resnet18", 120)
    assert_close(loaded, model)
    noted = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (loaded.mean, loaded.std) == (noted if name == "lightly-train" else IMAGENET)


def test_solo_learns_small_images_are_normalised_as_cifar(tmp_path: Path) -> None:
    for small, expected in ((True, CIFAR), (False, IMAGENET)):
        model = torchvision_resnet(small_stem=small, padding=2 if small else 3)
        state = under("backbone.", model.state_dict()) | heads("classifier")
        torch.save({"state_dict": state}, tmp_path / "x.ckpt")
        loaded = load_backbone(tmp_path / "x.ckpt")
        assert loaded.layout == "solo-learn"
        assert (loaded.mean, loaded.std) == expected
        assert_close(loaded, model)
        export_backbone(loaded, "safetensors", tmp_path / "x.safetensors", force=True)
        again = load_backbone(tmp_path / "x.safetensors")
        assert (again.mean, again.std) == expected


# ViTs.


def test_dinos_vit_is_the_teachers(tmp_path: Path) -> None:
    model = vit()
    content = {
        "student": under("module.backbone.", model.state_dict(), 0.1) | heads("module.head.mlp.0"),
        "teacher": under("backbone.", model.state_dict()) | heads("head.mlp.0"),
    }
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"its backbone is not named .* with --arch"):
        load_backbone(tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth", arch="vit_tiny_patch16_224")
    assert (loaded.layout, loaded.image_size, loaded.left) == ("dino", 32, ("head.mlp.0.weight",))
    assert (loaded.mean, loaded.std) == IMAGENET  # Not those of timm's weights of that name.
    assert_close(loaded, model)
    assert loaded.backbone(torch.zeros(1, 3, 48, 64)).shape == (1, 192)  # And other sizes.


def test_maes_decoder_is_left(tmp_path: Path) -> None:
    model = vit()
    decoder = heads("decoder_embed", "decoder_blocks.0.attn.qkv", "decoder_pred", "decoder_norm")
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    torch.save({"model": model.state_dict() | decoder | extra, "epoch": 3}, tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth", arch="vit_tiny_patch16_224")
    assert loaded.layout == "mae"
    assert set(loaded.left) == {*decoder, *extra}
    assert_close(loaded, model)


@pytest.mark.parametrize(
    "arch, expected",
    [
        ("vit_tiny_patch16_224", HALF),
        ("vit_tiny_patch16_224.augreg_in21k", HALF),
        ("deit_tiny_patch16_224.fb_in1k", IMAGENET),
    ],
)
def test_timms_own_files_are_normalised_as_timm_notes(
    arch: str, expected: Any, tmp_path: Path
) -> None:
    model = vit(arch)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    loaded = load_backbone(tmp_path / "x.safetensors", arch=arch)
    assert (loaded.layout, loaded.arch, loaded.image_size) == ("timm", arch, 32)
    assert (loaded.mean, loaded.std) == expected
    assert_close(loaded, model)
    export_backbone(loaded, "safetensors", tmp_path / "y.safetensors")
    again = load_backbone(tmp_path / "y.safetensors")
    assert (again.arch, again.mean, again.image_size) == (arch, loaded.mean, 32)
    assert_close(again, model)


# torchvision's networks, by its names, with the features that its users take.
TORCHVISION: dict[str, Callable[[Any], Any]] = {
    "convnext_tiny": lambda model: model.classifier.__setitem__(2, nn.Identity()),
    "vit_b_16": lambda model: setattr(model, "heads", nn.Identity()),
    "efficientnet_b0": lambda model: setattr(model, "classifier", nn.Identity()),
    "efficientnet_v2_s": lambda model: setattr(model, "classifier", nn.Identity()),
    "mobilenet_v2": lambda model: setattr(model, "classifier", nn.Identity()),
    "mobilenet_v3_small": lambda model: setattr(model, "classifier", nn.Identity()),
    "regnet_y_400mf": lambda model: setattr(model, "fc", nn.Identity()),
    "regnet_x_400mf": lambda model: setattr(model, "fc", nn.Identity()),
    "resnext101_64x4d": lambda model: setattr(model, "fc", nn.Identity()),
    "densenet121": lambda model: setattr(model, "classifier", nn.Identity()),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_by_their_names(name: str, tmp_path: Path) -> None:
    options = {"image_size": 32} if name.startswith("vit") else {}
    model: Any = normed(torchvision.models.get_model(name, **options))
    torch.save({"state_dict": under("module.", model.state_dict())}, tmp_path / "x.pth")
    TORCHVISION[name](model)
    loaded = load_backbone(tmp_path / "x.pth", arch=name)
    assert_close(loaded, model)
    assert loaded.left
    # Of a DenseNet, timm's name and keys are the same.
    assert loaded.layout == ("timm" if name == "densenet121" else "torchvision")
    assert (loaded.mean, loaded.std) == IMAGENET
    torch.save(model.state_dict(), tmp_path / "y.pth")
    assert_close(load_backbone(tmp_path / "y.pth", arch=loaded.arch), model)


def test_torchvisions_networks_can_be_exported(tmp_path: Path) -> None:
    model: Any = normed(torchvision.models.mobilenet_v3_small())
    torch.save(model.state_dict(), tmp_path / "x.pth")
    loaded = load_backbone(tmp_path / "x.pth", arch="mobilenet_v3_small")
    export_backbone(loaded, "safetensors", tmp_path / "x.safetensors")
    model.classifier = nn.Identity()
    assert_close(load_backbone(tmp_path / "x.safetensors"), model)
    with pytest.raises(ValueError, match="--to timm takes timm's backbones, got mobilenet_v3_sm"):
        export_backbone(loaded, "timm", tmp_path / "y.pth")


# transformers. Where it is installed its own models are asked, otherwise its names as of version 4
# and 5 are built from timm's models by this table.
_VIT = {
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"^blocks\.": "encoder.layer.",
}
TRANSFORMERS: dict[str, tuple[str, int, dict[str, str]]] = {
    "transformers' vit": (
        "vit_tiny_patch16_224",
        32,
        _VIT
        | {
            r"\.norm1\.": ".layernorm_before.",
            r"\.norm2\.": ".layernorm_after.",
            r"\.mlp\.fc1\.": ".intermediate.dense.",
            r"\.mlp\.fc2\.": ".output.dense.",
        },
    ),
    "transformers' dinov2": (
        "vit_small_patch14_dinov2",
        28,
        _VIT | {r"\.ls(\d)\.gamma$": r".layer_scale\1.lambda1"},
    ),
    "transformers' resnet": (
        "resnet18",
        32,
        {
            r"^conv1\.": "embedder.embedder.convolution.",
            r"^bn1\.": "embedder.embedder.normalization.",
            r"\.conv1\.": ".layer.0.convolution.",
            r"\.conv2\.": ".layer.1.convolution.",
            r"\.bn1\.": ".layer.0.normalization.",
            r"\.bn2\.": ".layer.1.normalization.",
            r"\.downsample\.0\.": ".shortcut.convolution.",
            r"\.downsample\.1\.": ".shortcut.normalization.",
            r"^layer1\.": "encoder.stages.0.layers.",
            r"^layer2\.": "encoder.stages.1.layers.",
            r"^layer3\.": "encoder.stages.2.layers.",
            r"^layer4\.": "encoder.stages.3.layers.",
        },
    ),
    "transformers' convnext": (
        "convnext_tiny",
        32,
        {
            r"^stem\.0\.": "embeddings.patch_embeddings.",
            r"^stem\.1\.": "embeddings.layernorm.",
            r"^head\.norm\.": "layernorm.",
            r"\.conv_dw\.": ".dwconv.",
            r"\.norm\.": ".layernorm.",
            r"\.mlp\.fc(\d)\.": r".pwconv\1.",
            r"\.gamma$": ".layer_scale_parameter",
            r"\.blocks\.": ".layers.",
            r"\.downsample\.": ".downsampling_layer.",
            r"^stages\.": "encoder.stages.",
        },
    ),
}


def theirs(state: State, names: dict[str, str], *, version: int) -> State:
    """Give timm's tensors the names that transformers has for them."""
    renamed: State = {}
    for name, value in state.items():
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name:
            old = (
                "attention.attention.query",
                "attention.attention.key",
                "attention.attention.value",
            )
            new_names = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
            for part, kind in zip(value.chunk(3), old if version == 4 else new_names, strict=True):
                renamed[name.replace("attn.qkv", kind)] = part
        elif version == 5:
            renamed[name.replace(".attention.output.dense.", ".attention.o_proj.")] = value
        else:
            renamed[name] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("layout", TRANSFORMERS)
def test_transformers_names(layout: str, version: int, prefix: str, tmp_path: Path) -> None:
    arch, size, names = TRANSFORMERS[layout]
    model = (
        vit(arch, size) if arch.startswith("vit") else used(timm.create_model(arch, num_classes=0))
    )
    if layout == "transformers' vit":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-12  # As transformers has it by default.
    state = theirs(model.state_dict(), names, version=version)
    state = under(prefix, state) | heads("pooler.dense", "classifier")
    # Sorted, so that keys come before queries.
    save_file(
        dict(sorted((k, v.contiguous()) for k, v in state.items())), tmp_path / "x.safetensors"
    )
    loaded = load_backbone(tmp_path / "x.safetensors", arch=None if "resnet" in arch else arch)
    assert loaded.layout == layout
    assert {key.split(".")[-2] for key in loaded.left} == {"dense", "classifier"}
    assert (loaded.mean, loaded.std) == (HALF if layout.endswith(" vit") else IMAGENET)
    assert_close(loaded, model, size)


@pytest.mark.skipif(
    find_spec("transformers") is None,
    reason="transformers is not installed; its names are tested above",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", TRANSFORMERS)
def test_transformers_own_models(layout: str, tmp_path: Path) -> None:
    import transformers as t  # type: ignore[import-not-found, unused-ignore]

    arch, size, _ = TRANSFORMERS[layout]
    wide = {"num_attention_heads": 3, "hidden_size": 192, "intermediate_size": 768}
    build: dict[str, Callable[[], Any]] = {
        "transformers' vit": lambda: t.ViTModel(t.ViTConfig(image_size=32, **wide)),
        "transformers' dinov2": lambda: t.Dinov2Model(
            t.Dinov2Config(image_size=28, hidden_size=384, num_attention_heads=6)
        ),
        "transformers' resnet": lambda: t.ResNetModel(
            t.ResNetConfig(
                layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]
            )
        ),
        "transformers' convnext": lambda: t.ConvNextModel(t.ConvNextConfig()),
    }
    model = build[layout]()
    if "vit" in arch:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    else:
        used(model)
    model.eval().save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path / "model.safetensors", arch=None if "resnet" in arch else arch)
    assert loaded.layout == layout

    def features(images: Tensor) -> Any:
        output = model(images)
        return output.last_hidden_state[:, 0] if "vit" in arch else output.pooler_output

    assert_close(loaded, features, size)


def test_the_table_ends_with_rows_that_match_anything() -> None:
    names = [row.name for row in LAYOUTS]
    assert len(set(names)) == len(names)
    assert names[-1] == "timm"
