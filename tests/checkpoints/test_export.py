"""Exports: what others' libraries load gives the features that ours gave, to the last bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from encoders import (
    assert_same_features,
    features,
    photographs,
    pretrained,
    timm_backbone,
    torchvision_resnet,
)
from safetensors import safe_open
from torch import nn

from mixmask import cli
from mixmask.backbones import build_backbone
from mixmask.checkpoints.detectron2 import detectron2_name
from mixmask.checkpoints.export import export_backbone
from mixmask.checkpoints.load import Loaded, load_backbone
from mixmask.checkpoints.resnets import RESNETS
from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy

# Detectron2's names as facebookresearch/moco's converter gives them, spelt out.
DETECTRON2 = {
    "conv1.weight": "stem.conv1.weight",
    "bn1.weight": "stem.conv1.norm.weight",
    "bn1.bias": "stem.conv1.norm.bias",
    "bn1.running_mean": "stem.conv1.norm.running_mean",
    "bn1.running_var": "stem.conv1.norm.running_var",
    "bn1.num_batches_tracked": "stem.conv1.norm.num_batches_tracked",
    "layer1.0.conv1.weight": "res2.0.conv1.weight",
    "layer1.0.bn1.weight": "res2.0.conv1.norm.weight",
    "layer1.0.conv3.weight": "res2.0.conv3.weight",
    "layer1.0.bn3.running_var": "res2.0.conv3.norm.running_var",
    "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
    "layer1.0.downsample.1.weight": "res2.0.shortcut.norm.weight",
    "layer1.0.downsample.1.running_mean": "res2.0.shortcut.norm.running_mean",
    "layer2.3.bn2.bias": "res3.3.conv2.norm.bias",
    "layer3.5.conv2.weight": "res4.5.conv2.weight",
    "layer4.2.bn3.running_var": "res5.2.conv3.norm.running_var",
}


def loaded(arch: str = "resnet18", *, small_stem: bool = False) -> Loaded:
    return Loaded(timm_backbone(arch, small_stem=small_stem), arch, small_stem, "mixmask")


def run_notes(notes: tuple[str, ...], model: nn.Module) -> None:
    """Do to a model what an export says in a note."""
    for note in notes:
        exec(note.partition(": ")[2], {"torch": torch, "model": model})  # noqa: S102


@pytest.mark.parametrize("name, small_stem", [("x.pth", True), ("x.safetensors", False)])
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_what_is_loaded_elsewhere_gives_the_same_features(
    to: str, name: str, small_stem: bool, tmp_path: Path
) -> None:
    ours = loaded(small_stem=small_stem)
    exported = export_backbone(ours, to, tmp_path / name)
    assert exported.files == (tmp_path / name,)
    assert len(exported.notes) == small_stem
    state = timm.models.load_state_dict(str(tmp_path / name))
    model: Any
    if to == "timm":
        model = timm.create_model("resnet18", num_classes=0)
        run_notes(exported.notes, model)
        model.load_state_dict(state)
    else:
        model = torchvision.models.resnet18()
        run_notes(exported.notes, model)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
        model.fc = nn.Identity()
    assert_same_features(ours.backbone, model.eval())
    again = load_backbone(tmp_path / name)
    assert_same_features(ours.backbone, again.backbone)
    assert (again.arch, again.small_stem, again.layout) == ("resnet18", small_stem, "mixmask")


@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_backbones_of_other_channels_load_elsewhere_as_the_note_says(
    channels: int, small_stem: bool, tmp_path: Path
) -> None:
    backbone = build_backbone("resnet18", small_stem=small_stem, in_chans=channels).eval()
    torch.save({f"backbone.{k}": v for k, v in backbone.state_dict().items()}, tmp_path / "x.pth")
    ours = load_backbone(tmp_path / "x.pth")
    assert (len(ours.mean), len(ours.std)) == (channels, channels)
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        expected = backbone(images)
        for to in ("torchvision", "timm", "safetensors"):
            file = tmp_path / f"{to}.safetensors"
            exported = export_backbone(ours, to, file)
            again = load_backbone(file)
            assert (again.mean, again.std) == (ours.mean, ours.std)
            assert torch.equal(again.backbone(images), expected)
            if to == "safetensors":
                assert not exported.notes
                continue
            (note,) = exported.notes
            model: Any = torchvision.models.resnet18()
            if to == "timm":
                assert small_stem or f"in_chans={channels}" in note
                in_chans = 3 if small_stem else channels
                model = timm.create_model("resnet18", num_classes=0, in_chans=in_chans)
            if to == "torchvision" or small_stem:
                run_notes(exported.notes, model)
            model.load_state_dict(timm.models.load_state_dict(str(file)), strict=False)
            model.fc = nn.Identity()
            assert torch.equal(model.eval()(images), expected)


def test_detectron2_refuses_other_channels(tmp_path: Path) -> None:
    wide = build_backbone("resnet50", in_chans=4)
    ours = Loaded(wide, "resnet50", False, "mixmask", mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(ValueError, match=r"images of 3 channels, got a backbone of 4; use --to"):
        export_backbone(ours, "detectron2", tmp_path / "x.pkl")
    assert not list(tmp_path.iterdir())


def test_detectron2_normalises_as_the_checkpoint_does(tmp_path: Path) -> None:
    ours = Loaded(
        timm_backbone("resnet50", small_stem=False), "resnet50", False, "timm",
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5),
    )  # fmt: skip
    export_backbone(ours, "detectron2", tmp_path / "x.pkl")
    for config in tmp_path.glob("*.yaml"):
        model = yaml.safe_load(config.read_text())["MODEL"]
        assert (model["PIXEL_MEAN"], model["PIXEL_STD"]) == ([127.5] * 3, [63.75, 127.5, 127.5])


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_bottlenecks_stride_and_pad_alike(to: str, tmp_path: Path) -> None:
    """At 33 pixels each stage has an odd side, where padding and stride show."""
    ours = loaded("resnet50")
    export_backbone(ours, to, tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    model: Any
    if to == "timm":
        model = timm.create_model("resnet50", num_classes=0)
        model.load_state_dict(state)
    else:
        model = torchvision.models.resnet50()
        model.load_state_dict(state, strict=False)
        model.fc = nn.Identity()
    images = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(ours.backbone(images), model.eval()(images))


@pytest.mark.parametrize("arch", RESNETS)
def test_torchvision_has_the_same_layers_under_these_names(arch: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch).state_dict()
        ours = timm.create_model(arch, num_classes=0).state_dict()
    shapes = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == shapes


@pytest.mark.parametrize(
    "to, padding, relu",
    [("torchvision", 1, False), ("timm", 1, False), ("timm", 2, True), ("safetensors", 2, False)],
)
def test_others_stems_survive(to: str, padding: int, relu: bool, tmp_path: Path) -> None:
    """A stem's padding, and whether it has an activation, are in no tensor."""
    ours = loaded(small_stem=True)
    ours.backbone.conv1.padding = (padding, padding)  # type: ignore[union-attr]
    if not relu:
        ours.backbone.act1 = nn.Identity()
    out = tmp_path / ("x.safetensors" if to == "safetensors" else "x.pth")
    exported = export_backbone(ours, to, out)
    assert_same_features(ours.backbone, load_backbone(out).backbone)
    if to != "safetensors":
        model = timm.create_model("resnet18", num_classes=0)
        if to == "torchvision":
            model = torchvision.models.resnet18()
            model.fc = nn.Identity()
        run_notes(exported.notes, model)
        model.load_state_dict(torch.load(out, weights_only=True))
        assert_same_features(ours.backbone, model.eval())


@pytest.mark.parametrize("arch", ["narrow", "convnext_atto"])
def test_safetensors_take_any_backbone(arch: str, tmp_path: Path) -> None:
    ours, out = loaded(arch), tmp_path / "x.safetensors"
    export_backbone(ours, "safetensors", out)
    assert_same_features(ours.backbone, load_backbone(out).backbone)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["arch"], metadata["small_stem"]) == (arch, "false")
    assert metadata["source"].startswith("mixmask: ")


def test_every_flipped_bit_of_an_export_is_told_or_changes_nothing(tmp_path: Path) -> None:
    ours, path = loaded("narrow"), tmp_path / "x.safetensors"
    export_backbone(ours, "safetensors", path)
    whole = path.read_bytes()
    for number, place in enumerate([*range(0, 400, 9), *range(400, len(whole), len(whole) // 40)]):
        changed = bytearray(whole)
        changed[place] ^= 1 << number % 8
        path.write_bytes(changed)
        try:
            again = load_backbone(path)
        except ValueError as error:
            told = str(error)
            continue
        # The name of the checksum itself, without which the file is read like any other.
        assert_same_features(ours.backbone, again.backbone)
    assert "is damaged" in told


# Detectron2.


def test_detectron2s_names() -> None:
    assert {name: detectron2_name(name) for name in DETECTRON2} == DETECTRON2
    names = timm_backbone("resnet50").state_dict()
    assert len({detectron2_name(name) for name in names}) == len(names)
    with pytest.raises(ValueError, match=r"no name for blocks\.0"):
        detectron2_name("blocks.0.attn.qkv.weight")


def test_detectron2s_file(tmp_path: Path) -> None:
    ours = loaded("resnet50")
    out = tmp_path / "mixmask.pkl"
    exported = export_backbone(ours, "detectron2", out)
    content = pickle.loads(out.read_bytes())
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    state = ours.backbone.state_dict()
    assert set(DETECTRON2.values()) < set(content["model"])
    assert len(content["model"]) == len(state)
    for name, tensor in state.items():
        array = content["model"][detectron2_name(name)]
        assert isinstance(array, np.ndarray)
        assert array.flags.writeable  # As torch.from_numpy wants it.
        assert torch.equal(torch.from_numpy(array), tensor), name
    # Older versions of NumPy have no numpy._core.
    assert b"numpy._core" not in out.read_bytes()
    voc, coco = (yaml.safe_load(path.read_text()) for path in exported.files[1:])
    assert [path.name for path in exported.files] == [
        "mixmask.pkl", "mixmask-voc-faster-rcnn-c4-24k.yaml", "mixmask-coco-mask-rcnn-c4-1x.yaml",
    ]  # fmt: skip
    assert voc["SOLVER"]["MAX_ITER"] == 24_000
    assert voc["SOLVER"]["STEPS"] == [18_000, 22_000]
    assert voc["DATASETS"]["TRAIN"] == ["voc_2007_trainval", "voc_2012_trainval"]
    assert (voc["MODEL"]["MASK_ON"], coco["MODEL"]["MASK_ON"]) == (False, True)
    assert coco["SOLVER"]["MAX_ITER"] == 90_000
    for config in (voc, coco):
        model = config["MODEL"]
        assert model["WEIGHTS"] == "mixmask.pkl"
        assert model["RESNETS"]["STRIDE_IN_1X1"] is False
        assert (model["RESNETS"]["DEPTH"], model["BACKBONE"]["FREEZE_AT"]) == (50, 0)
        # ImageNet's mean and deviation of red, green, blue, for pixels up to 255.
        assert model["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
        assert model["PIXEL_STD"] == [58.395, 57.12, 57.375]
        assert (config["INPUT"]["FORMAT"], config["INPUT"]["MIN_SIZE_TEST"]) == ("RGB", 800)
        assert (config["SOLVER"]["IMS_PER_BATCH"], config["SOLVER"]["BASE_LR"]) == (16, 0.02)
    with pytest.raises(ValueError, match="in Detectron2's format"):
        load_backbone(out)


def test_detectron2s_heads_have_bottlenecks(tmp_path: Path) -> None:
    exported = export_backbone(loaded(), "detectron2", tmp_path / "x.pkl")
    assert exported.files == (tmp_path / "x.pkl",)
    assert "C4 heads have bottlenecks, resnet18 has none" in exported.notes[0]


# What is refused.


@pytest.mark.parametrize(
    "arch, small_stem, to, out, message",
    [
        ("narrow", False, "timm", "x.pth", "timm has no backbone narrow.*--to safetensors"),
        ("narrow", False, "torchvision", "x.pth", "takes resnet18, .* got narrow; .* safetensors"),
        ("narrow", False, "detectron2", "x.pkl", "takes resnet18, .* got narrow; .* safetensors"),
        ("convnext_atto", False, "torchvision", "x.pth", "got convnext_atto; use --to timm"),
        ("convnext_atto", False, "detectron2", "x.pkl", "got convnext_atto; use --to timm"),
        ("resnet18", True, "detectron2", "x.pkl", "begin with a 7x7 .* --to torchvision"),
        ("resnet18", False, "detectron2", "x.pth", r"file named \*\.pkl.*use --out .*x\.pkl"),
        ("resnet18", False, "safetensors", "x.pth", r"file named \*\.safetensors"),
        ("resnet18", False, "onnx", "x.pth", "--to must be one of 'torchvision'"),
        ("resnet18", False, "timm", "no/x.pth", "which is not a folder; make it first"),
        ("resnet18", False, "timm", "folder", "folder is a folder; name a file in it"),
    ],
)
def test_what_a_format_does_not_have_is_refused(
    arch: str, small_stem: bool, to: str, out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    backbone = timm_backbone(arch, small_stem=small_stem)
    with pytest.raises(ValueError, match=message):
        export_backbone(Loaded(backbone, arch, small_stem, "mixmask"), to, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    ours = loaded("resnet50")
    config = tmp_path / "x-coco-mask-rcnn-c4-1x.yaml"
    config.write_text("mine")
    with pytest.raises(ValueError, match=r"1x\.yaml exists; .*overwrite it with --force"):
        export_backbone(ours, "detectron2", tmp_path / "x.pkl")
    assert [path.name for path in tmp_path.iterdir()] == [config.name]
    export_backbone(ours, "detectron2", tmp_path / "x.pkl", force=True)
    assert config.read_text() != "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pth").write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(loaded(), "torchvision", tmp_path / "x.pth", force=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# The whole way.


def test_from_pretraining_to_anothers_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "resnet18.safetensors"
    trained = pretrained(run, arch="resnet18")
    images, labels = photographs()
    ours = load_backbone(run).backbone
    x = extract_features(ours, images)
    assert torch.equal(x, extract_features(trained, images))
    half = len(x) // 2
    split = x[::2][:half], labels[::2][:half], x[1::2], labels[1::2]
    measured = knn_accuracy(*split), linear_accuracy(*split, penalties=(0.01,))
    assert cli.main(["export", str(run), "--to", "timm", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "mixmask: took 120 tensors of resnet18; left head (4), key_backbone (120)" in printed
    assert f"wrote {out}" in printed
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(out)).eval()
    theirs = extract_features(model, images)
    assert torch.equal(x, theirs)
    assert torch.equal(features(ours), features(model))
    split = theirs[::2][:half], labels[::2][:half], theirs[1::2], labels[1::2]
    assert (knn_accuracy(*split), linear_accuracy(*split, penalties=(0.01,))) == measured


def test_the_command_reads_others_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torchvision_resnet(small_stem=True)
    source, out = tmp_path / "x.pth", tmp_path / "y.pth"
    torch.save({"state_dict": {f"encoder_q.{k}": v for k, v in model.state_dict().items()}}, source)
    command = ["export", str(source), "--to", "torchvision", "--out", str(out)]
    assert cli.main(command) == 0
    assert "resnet18 with the stem for small images" in (printed := capsys.readouterr().out)
    assert "model.maxpool = torch.nn.Identity()" in printed
    assert_same_features(load_backbone(out).backbone, model)
    for more, message in (
        ([], "exists; name another --out"),
        (["--force", "--arch", "resnet34"], "does not fit resnet34"),
        (["--force", "--no-small-stem"], "1 of another shape (conv1.weight"),
    ):
        assert cli.main(command + more) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]
    assert cli.main([*command, "--force"]) == 0


def test_backbones_are_exported_as_graphs(tmp_path: Path) -> None:
    pretrained(tmp_path)
    backbone, x = load_backbone(tmp_path).backbone, torch.rand(1, 3, 16, 16)
    graph = torch.export.export(backbone, (x,)).module()
    torch.testing.assert_close(graph(x), backbone(x))
    onnx = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, with which torch writes ONNX, is not")
    file = tmp_path / "backbone.onnx"
    torch.onnx.export(backbone, (x,), file, dynamo=True)
    session = onnx.InferenceSession(file, providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(ours, backbone(x).detach(), atol=1e-5)
