"""Checkpoints of runs and of others: what is recognised, what is taken, what is refused."""

from __future__ import annotations

import argparse
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from encoders import assert_same_features, pretrained, timm_backbone, torchvision_resnet
from safetensors.torch import save_file
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.checkpoints.export import export_backbone
from mixmask.checkpoints.load import load_backbone
from mixmask.checkpoints.resnets import infer_arch

State = dict[str, Any]


def moco(model: nn.Module, *, mlp: bool, arch: str = "resnet18") -> State:
    """Return a checkpoint as facebookresearch/moco and the MixMask authors save it."""
    head = ("fc.0", "fc.2") if mlp else ("fc",)
    state = {}
    for encoder, shift in (("encoder_q", 0.0), ("encoder_k", 1.0)):
        for key, value in model.state_dict().items():
            state[f"module.{encoder}.{key}"] = value + shift
        for name in head:
            state[f"module.{encoder}.{name}.weight"] = torch.randn(16, 512)
            state[f"module.{encoder}.{name}.bias"] = torch.randn(16)
    state |= {"module.queue": torch.randn(16, 32), "module.queue_ptr": torch.zeros(1).long()}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    return {"epoch": 200, "arch": arch, "state_dict": state, "optimizer": optimizer}


# Our runs.


def test_a_run_is_read_by_its_folder_and_by_its_file(tmp_path: Path) -> None:
    backbone = pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "last.pt"):
        loaded = load_backbone(path)
        assert_same_features(loaded.backbone, backbone)
        assert (loaded.layout, loaded.arch, loaded.small_stem) == ("mixmask", "narrow", False)
        assert loaded.config["method"] == "moco-v2"
        assert loaded.file == tmp_path / "last.pt"
        assert not set(loaded.taken) & set(loaded.left)
        assert {"head.0.weight", "key_backbone.bn1.weight", "queue.keys"} <= set(loaded.left)
    alone = (tmp_path / "last.pt").rename(tmp_path.parent / f"{tmp_path.name}.pt")
    loaded = load_backbone(alone)
    assert_same_features(loaded.backbone, backbone)
    assert (loaded.arch, loaded.config) == ("narrow", {})


# Small ones whose own names have what other formats call a shortcut or a wrapper.
OWN_NAMES = {
    "repghostnet_050": ".shortcut.",
    "iformer_t": ".module.",
    "gernet_s": ".shortcut.",
}


@pytest.mark.parametrize("arch, word", OWN_NAMES.items())
def test_an_architectures_own_names_are_never_renamed(arch: str, word: str, tmp_path: Path) -> None:
    model = build_backbone(arch).eval()
    state = model.state_dict()
    assert any(word in name for name in state)
    weights = {
        f"{part}.{name}": v for part in ("backbone", "key_backbone") for name, v in state.items()
    }
    content = {"model": weights, "optimizer": {}, "step": 1, "rows": [], "meter": {}}
    torch.save(content, tmp_path / "last.pt")
    (tmp_path / "config.json").write_text(json.dumps({"arch": arch}))
    torch.save({f"module.encoder_q.{name}": v for name, v in state.items()}, tmp_path / "moco.pth")
    export_backbone(load_backbone(tmp_path), "safetensors", tmp_path / "x.safetensors")
    for name, given in (("last.pt", None), ("moco.pth", arch), ("x.safetensors", None)):
        loaded = load_backbone(tmp_path / name, arch=given)
        assert loaded.arch == arch
        assert len(loaded.taken) == len(state)
        for key, value in loaded.backbone.state_dict().items():
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("arch", ["resnet10t", "tinynet_e"])
def test_norms_that_split_the_batch_are_ordinary_ones_again(arch: str, tmp_path: Path) -> None:
    backbone = pretrained(tmp_path, arch=arch, bn_splits=2)
    content = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    # timm's norm with an activation is a sequence then, as the second of these has it.
    assert ("backbone.bn1.0.weight" in content) == (arch == "tinynet_e")
    assert_same_features(load_backbone(tmp_path).backbone, backbone)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    backbone = pretrained(tmp_path, epochs=2)
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    previous.write_bytes(last.read_bytes())
    last.write_bytes(last.read_bytes()[:5000])
    with pytest.warns(UserWarning, match=r"last\.pt is damaged .*previous\.pt is used"):
        loaded = load_backbone(tmp_path)
    assert loaded.file == previous
    assert_same_features(loaded.backbone, backbone)
    previous.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no whole checkpoint .*last\.pt is .*previous\.pt is"):
        load_backbone(tmp_path)


def test_a_runs_options_must_be_readable(tmp_path: Path) -> None:
    pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read .* move it away"):
        load_backbone(tmp_path)


# Others'.


@pytest.mark.parametrize("mlp, legacy", [(True, False), (False, True)], ids=["v2", "v1"])
def test_moco_gives_the_query_encoder(mlp: bool, legacy: bool, tmp_path: Path) -> None:
    model = torchvision_resnet()
    path = tmp_path / "0200.pth.tar"
    torch.save(moco(model, mlp=mlp), path, _use_new_zipfile_serialization=not legacy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_backbone(path)
        load_backbone(path)
    noted = [str(each.message) for each in caught]
    assert len(noted) == legacy  # Once.
    assert all("0200.pth.tar is in torch's format of before 1.6" in text for text in noted)
    assert_same_features(loaded.backbone, model)
    assert (loaded.layout, loaded.arch) == ("moco", "resnet18")
    assert all(key.startswith("module.encoder_q.") for key in loaded.taken)
    assert len(loaded.taken) == 120
    assert "module.encoder_q.fc.0.weight" in loaded.left or not mlp
    assert "left module.encoder_q (" in loaded.describe()
    assert "module.queue (1)" in loaded.describe()


def test_a_bottleneck_resnet_of_moco_is_told_by_its_keys(tmp_path: Path) -> None:
    model = torchvision_resnet("resnet50")
    torch.save(moco(model, mlp=True, arch="resnet18"), tmp_path / "x.pth.tar")
    loaded = load_backbone(tmp_path / "x.pth.tar")
    assert loaded.arch == "resnet50"  # The keys are right where the entry is not.
    assert_same_features(loaded.backbone, model)


@pytest.mark.parametrize(
    "prefix, name",
    [
        ("", "x.pth"),
        ("", "x.safetensors"),
        ("module._orig_mod.", "x.pth"),
        ("model.net.module.0.", "x.safetensors"),
    ],
)
def test_state_dicts_are_found_behind_prefixes(prefix: str, name: str, tmp_path: Path) -> None:
    model = torchvision_resnet(small_stem=True)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    state |= {prefix + "fc.weight": torch.randn(10, 512), prefix + "fc.bias": torch.randn(10)}
    (save_file if name.endswith("rs") else torch.save)(state, tmp_path / name)
    loaded = load_backbone(tmp_path / name)
    assert_same_features(loaded.backbone, model)
    assert (loaded.arch, loaded.small_stem) == ("resnet18", True)
    assert set(loaded.left) == {prefix + "fc.weight", prefix + "fc.bias"}


def test_old_files_without_counters_and_in_half_precision(tmp_path: Path) -> None:
    model = torchvision_resnet()
    state = {k: v.half() for k, v in model.state_dict().items() if v.is_floating_point()}
    model.load_state_dict(state, strict=False)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    assert_same_features(load_backbone(tmp_path / "x.pth").backbone, model)


def test_other_families_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    model = timm_backbone("convnext_atto")
    torch.save(timm.create_model("convnext_atto").state_dict() | model.state_dict(), path)
    with pytest.raises(ValueError, match=r"holds no ResNet, .*stem\.0\.weight.* with --arch"):
        load_backbone(path)
    loaded = load_backbone(path, arch="convnext_atto")
    assert_same_features(loaded.backbone, model)
    assert (loaded.layout, loaded.left) == ("timm", ("head.fc.weight", "head.fc.bias"))
    torch.save({f"backbone.{k}": v for k, v in model.state_dict().items()}, path)
    assert_same_features(load_backbone(path, arch="convnext_atto").backbone, model)
    with pytest.raises(ValueError, match="and no backbone of the --arch given"):
        load_backbone(path, arch="vit_tiny_patch16_224")


RESNETS = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
    "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
]  # fmt: skip


@pytest.mark.parametrize("arch", RESNETS)
def test_resnets_are_told_by_their_blocks(arch: str) -> None:
    with torch.device("meta"):
        assert infer_arch(torchvision.models.get_model(arch).state_dict()) == arch


@pytest.mark.parametrize("arch", ["narrow", "medium"])
def test_our_own_backbones_are_told_by_their_width(arch: str) -> None:
    assert infer_arch(build_backbone(arch).state_dict()) == arch


@pytest.mark.parametrize("arch", ["resnet50d", "resnet50c", "resnet26", "resnet10t", "resnet18d"])
def test_variants_are_not_taken_for_plain_resnets(arch: str) -> None:
    with torch.device("meta"):
        assert infer_arch(timm.create_model(arch, num_classes=0).state_dict()) is None


def test_variants_are_asked_for(tmp_path: Path) -> None:
    model = timm_backbone("resnet10t")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"does not say which backbone it holds .* with --arch"):
        load_backbone(tmp_path / "x.pth")
    assert_same_features(load_backbone(tmp_path / "x.pth", arch="resnet10t").backbone, model)
    torch.save(timm.create_model("seresnet18", num_classes=0).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"does not fit resnet18: 32 unexpected \(layer1.0.se."):
        load_backbone(tmp_path / "x.pth")


def test_of_several_encoders_the_slow_ones_are_left(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    state = torchvision_resnet().state_dict()
    both = {f"{name}.{k}": v for name in ("student_net", "teacher_net") for k, v in state.items()}
    torch.save(both, path)
    assert all(key.startswith("student_net.") for key in load_backbone(path).taken)
    torch.save({f"{name}.{k}": v for name in ("left", "right") for k, v in state.items()}, path)
    with pytest.raises(ValueError, match=r"several encoders, left\., right\.; save only the"):
        load_backbone(path)


# What is refused.


@pytest.mark.filterwarnings("ignore:.*which has no checksums")
def test_flips_in_the_older_format_are_refused_in_a_line_or_leave_finite_weights(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.pth"
    state = {f"backbone.{k}": value for k, value in build_backbone("narrow").state_dict().items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    whole, chance, refused = path.read_bytes(), random.Random(0), 0
    told = 0
    for number in range(60):
        damaged = bytearray(whole)
        # Half of them where names and shapes are; the highest bit but one makes weights huge.
        place = chance.randrange(20_000 if number % 2 else len(whole))
        damaged[place] ^= 1 << (6 if number % 3 else chance.randrange(8))
        path.write_bytes(damaged)
        try:
            loaded = load_backbone(path, arch="narrow")
        except ValueError as error:
            refused += "\n" not in str(error)
            told += 1
        else:
            assert all(value.isfinite().all() for value in loaded.backbone.state_dict().values())
    assert refused == told >= 10
    state["backbone.conv1.0.weight"][0] = float("inf")
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"1 not finite \(conv1\.0\.weight\); the file is damaged"):
        load_backbone(path, arch="narrow")


class Mark:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "call, form, named",
    [
        (os.system, "touch {}", "system"),
        (exec, "open({!r}, 'w').close()", "exec"),
        (touch, "{}", "touch"),
        (Path.touch, None, "touch|getattr"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused(
    call: Any, form: str | None, named: str, legacy: bool, tmp_path: Path
) -> None:
    path, mark = tmp_path / "x.ckpt", tmp_path / "ran"
    argument = mark if form is None else form.format(str(mark))
    content = {"state_dict": {"w": torch.ones(1)}, "callbacks": Mark(call, argument)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf"could run code when it is read: .*({named})"):
        load_backbone(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # It would have.


def test_objects_that_nobody_knows_are_named(tmp_path: Path) -> None:
    model = torchvision_resnet()
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"holds a ResNet as a whole, .*\.state_dict\(\)"
    ) as caught:
        load_backbone(tmp_path / "model.pt")
    follow(str(caught.value), tmp_path, "model.pt")
    assert_same_features(load_backbone(tmp_path / "weights.pth").backbone, model)
    torch.save(Own(model), tmp_path / "own.pt")
    with pytest.raises(
        ValueError, match=r"own\.pt holds more than weights.*test_load\.Own"
    ) as caught:
        load_backbone(tmp_path / "own.pt")
    follow(str(caught.value), tmp_path, "own.pt")
    assert_same_features(load_backbone(tmp_path / "weights.pth").backbone, model)


class Own(nn.Module):
    """A class that only its own author has."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def follow(message: str, folder: Path, name: str) -> None:
    """Do what an error advises."""
    advice = message[message.index("torch.save(") :]
    advice = advice.replace("PATH", repr(str(folder / name)))
    exec(advice.replace("weights.pth", str(folder / "weights.pth")), {"torch": torch})  # noqa: S102


def test_harmless_objects_are_passed_over(tmp_path: Path) -> None:
    model = torchvision_resnet()
    content = moco(model, mlp=True)
    allowed = set(torch.serialization.get_safe_globals())
    content |= {"args": argparse.Namespace(data=Path("x")), "best": np.float64(0.5)}
    torch.save(content, tmp_path / "x.pth.tar")
    assert_same_features(load_backbone(tmp_path / "x.pth.tar").backbone, model)
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_the_context_of_stand_ins_leaves_the_users_own(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1), "w": torch.ones(1)}, tmp_path / "x.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        with pytest.raises(ValueError, match="with --arch"):
            load_backbone(tmp_path / "x.pt")
        content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert isinstance(content["args"], argparse.Namespace)
    assert isinstance(content["w"], Tensor)


@pytest.mark.parametrize("arch, channels", [("resnet18", 1), ("narrow", 4), ("convnext_atto", 13)])
def test_channels_follow_the_weights(arch: str, channels: int, tmp_path: Path) -> None:
    model = build_backbone(arch, in_chans=channels).eval()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    loaded = load_backbone(tmp_path / "x.safetensors", arch=arch)
    images = torch.randn(2, channels, 32, 32)
    assert torch.equal(loaded.backbone(images), model(images))
