"""Detectors learn, resume to the same weights, and are judged as pycocotools does."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detection import write_coco, write_voc
from torch import Tensor, nn

from mixmask.backbones import build_backbone
from mixmask.detection.config import DetectionConfig, load_config
from mixmask.detection.data import load_detection
from mixmask.detection.metrics import predict
from mixmask.detection.model import batch_norms, build_detector, train_mode
from mixmask.detection.train import train_detector

TINY = DetectionConfig(
    data="data",
    arch="narrow",
    epochs=2,
    batch_size=2,
    size=64,
    rois=8,
    proposals=20,
    measure_every=0,
)

FILES = {"config.json", "detections.png", "last.pt", "results.json"}


@pytest.fixture
def backbone() -> nn.Module:
    return build_backbone("narrow")


@pytest.mark.parametrize("neck", ["c4", "fpn"])
@pytest.mark.parametrize("model", ["faster-rcnn", "mask-rcnn"])
@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_a_run_leaves_its_files(
    neck: str, model: str, layout: str, backbone: nn.Module, tmp_path: Path
) -> None:
    data = load_detection((write_voc if layout == "voc" else write_coco)(tmp_path / "data"))
    config = dataclasses.replace(TINY, neck=neck, model=model, epochs=1)
    out = tmp_path / "run"
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    if layout == "voc" and model == "mask-rcnn":
        with pytest.raises(ValueError, match="needs a segmentation of every object"):
            train_detector(config, data, backbone, out, progress=False)
        assert not out.exists()
        return
    source: dict[str, object] = {"run": "here"}
    detector, results = train_detector(config, data, backbone, out, source=source, progress=False)
    assert {path.name for path in out.iterdir()} == FILES
    written = json.loads((out / "results.json").read_text())
    assert {**written, "date": results["date"]} == json.loads(json.dumps(results))
    assert written["finished"]
    assert written["backbone"] == source
    assert set(written["per_class"]) == {"blue", "red"}
    assert ("mask_ap" in written) == (model == "mask-rcnn")
    [row] = written["epochs"]
    losses = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    losses += ["loss_mask"] if model == "mask-rcnn" else []
    assert row["loss"] == pytest.approx(sum(row[name] for name in losses))
    assert load_config(out) == (config, source["run"])
    # The backbone itself was trained, all stages of it.
    moved = [not torch.equal(value, before[name]) for name, value in backbone.state_dict().items()]
    assert all(moved)
    image, _ = data.test[0]
    [found] = predict(detector, [image])
    assert ("masks" in found) == (model == "mask-rcnn")
    if "masks" in found:
        assert found["masks"].shape == (len(found["boxes"]), *image.shape[1:])


def test_a_detector_learns_rectangles(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(
        "mixmask.detection.train.save_figure", lambda figure, _: figures.append(figure)
    )
    data = load_detection(write_voc(tmp_path / "data", train=8, test=2))
    config = dataclasses.replace(TINY, epochs=12, lr=0.1, min_scale=1.0, rois=16)
    _, results = train_detector(config, data, backbone, tmp_path / "run", progress=False)
    assert results["ap50"] > 0.5
    title = figures[0].get_suptitle()
    assert title.startswith(f"{tmp_path.name}/run: AP {results['ap']:.1%}, AP50 ")
    assert results["epochs"][-1]["loss"] < results["epochs"][0]["loss"]


@pytest.mark.parametrize("within", [True, False])
def test_resumed_run_ends_in_the_same_weights(
    within: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_detection(write_voc(tmp_path / "data"))

    def train(out: Path, *, resume: bool = False) -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        backbone = build_backbone("narrow")
        config = dataclasses.replace(TINY, measure_every=1)
        return train_detector(config, data, backbone, out, resume=resume, progress=False)

    whole, results = train(tmp_path / "whole")
    if within:  # Every step is saved.
        monkeypatch.setattr("mixmask.detection.train._SAVE_EVERY", -1)
    import mixmask.detection.train as module

    step, taken = module._train_step, 0

    def crash(*arguments: Any) -> dict[str, float]:
        nonlocal taken
        taken += 1
        if taken == 4:
            raise OSError("the power is gone")
        return step(*arguments)

    monkeypatch.setattr(module, "_train_step", crash)
    with pytest.raises(OSError, match="power"):
        train(tmp_path / "stopped")
    saved = torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)["step"]
    assert saved == (3 if within else 2)
    assert not json.loads((tmp_path / "stopped" / "results.json").read_text())["finished"]
    monkeypatch.setattr(module, "_train_step", step)
    resumed, again = train(tmp_path / "stopped", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for row, other in zip(results["epochs"], again["epochs"], strict=True):
        for key in set(row) - {"seconds", "test_seconds"}:
            assert row[key] == other[key], key


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    backbone: nn.Module, tmp_path: Path
) -> None:
    data, out = load_detection(write_voc(tmp_path / "data")), tmp_path / "run"
    train_detector(TINY, data, copy.deepcopy(backbone), out, progress=False)
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"last.pt is damaged .*previous.pt is used instead"):
        _, results = train_detector(TINY, data, backbone, out, resume=True, progress=False)
    assert [row["epoch"] for row in results["epochs"]] == [1, 2]
    for name in ("last.pt", "previous.pt"):
        (out / name).unlink()
    with pytest.raises(ValueError, match=r"holds neither last.pt nor previous.pt"):
        train_detector(TINY, data, backbone, out, resume=True, progress=False)


def test_other_data_or_no_run_is_not_resumed(backbone: nn.Module, tmp_path: Path) -> None:
    data = load_detection(write_voc(tmp_path / "data"))
    config = dataclasses.replace(TINY, epochs=1)
    train_detector(config, data, copy.deepcopy(backbone), tmp_path / "run", progress=False)
    more = load_detection(write_voc(tmp_path / "more", train=7))
    with pytest.raises(ValueError, match="was started on 5 images of blue, red, but data has 7"):
        train_detector(config, more, backbone, tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ValueError, match="is not a detection run that can be resumed"):
        load_config(tmp_path)


@pytest.mark.parametrize("change", [
    lambda content: content.pop("rows"),
    lambda content: content.update(model={}),
    lambda content: content.update(classes=3, images="few"),
    lambda content: content["optimizer"].pop("state"),
])  # fmt: skip
def test_checkpoint_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], backbone: nn.Module, tmp_path: Path
) -> None:
    data, out = load_detection(write_voc(tmp_path / "data")), tmp_path / "run"
    config = dataclasses.replace(TINY, epochs=1)
    train_detector(config, data, copy.deepcopy(backbone), out, progress=False)
    content = torch.load(out / "last.pt", weights_only=True)
    change(content)
    torch.save(content, out / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt (does not fit|cannot be used) [^\n]*$"):
        train_detector(config, data, backbone, out, resume=True, progress=False)


def test_loss_that_is_not_finite_stops_the_run(backbone: nn.Module, tmp_path: Path) -> None:
    data = load_detection(write_voc(tmp_path / "data"))
    config = dataclasses.replace(TINY, lr=1e20)
    with pytest.raises((FloatingPointError, AssertionError)):
        train_detector(config, data, backbone, tmp_path / "run", progress=False)


@pytest.mark.parametrize("arch, small_stem, stride", [
    ("narrow", False, 8), ("resnet18", False, 16), ("resnet18", True, 4), ("resnet50", False, 16),
])  # fmt: skip
def test_stages_and_anchors_fit_the_backbone(arch: str, small_stem: bool, stride: int) -> None:
    for neck in ("c4", "fpn"):
        backbone = build_backbone(arch, small_stem=small_stem)
        config = DetectionConfig(neck=neck, size=64, proposals=20)
        detector: Any = build_detector(backbone, 2, config)
        features = detector.backbone(torch.zeros(1, 3, 64, 96).contiguous())
        maps = features if isinstance(features, dict) else {"0": features}
        strides = [64 / level.shape[-2] for name, level in maps.items() if name != "pool"]
        levels = [stride] if neck == "c4" else [stride / 4, stride / 2, stride, 2 * stride]
        assert strides == levels
        pool = detector.roi_heads.box_roi_pool
        assert pool.scales == [1 / level for level in levels]
        # 32 ... 512 pixels at a size of 800.
        sizes = [size for level in detector.rpn.anchor_generator.sizes for size in level]
        assert sizes == [3, 5, 10, 20, 41]


@pytest.mark.parametrize("neck", ["c4", "fpn"])
def test_batch_norm_trained_or_frozen(neck: str) -> None:
    images = [torch.rand(3, 64, 80) for _ in range(2)]
    box = torch.tensor([[4.0, 6, 40, 50]])
    targets = [{"boxes": box, "labels": torch.tensor([1])} for _ in images]
    old = sum(1 for _ in batch_norms(build_backbone("narrow")))
    for mode in ("train", "frozen"):
        backbone = build_backbone("narrow")
        config = dataclasses.replace(TINY, neck=neck, batch_norm=mode)
        detector = build_detector(backbone, 1, config)
        new = sum(1 for _ in batch_norms(detector)) - old
        # One after the last stage; or two for each of the pyramid's four levels.
        assert new == ({"c4": 1, "fpn": 8}[neck] if mode == "train" else 0)
        train_mode(detector)
        stem = next(batch_norms(backbone)).running_mean
        assert stem is not None
        before = stem.clone()
        losses = detector(images, targets)
        sum(losses.values()).backward()
        assert torch.equal(before, stem) == (mode == "frozen")
        learnt = [norm.weight.grad is not None for norm in batch_norms(detector)]
        assert all(learnt) if mode == "train" else not any(learnt)


def test_statistics_are_those_of_the_last_weights(backbone: nn.Module, tmp_path: Path) -> None:
    """Before a test the first norm's mean is that of its input over the training images."""
    data = load_detection(write_voc(tmp_path / "data", train=4))
    config = dataclasses.replace(TINY, epochs=1, batch_size=4, min_scale=1.0, lr=0.5)
    detector: Any
    detector, _ = train_detector(config, data, backbone, tmp_path / "run", progress=False)
    images = [data.train[i][0].float() / 255 for i in range(4)]
    seen: list[Tensor] = []
    norm = detector.backbone.stem[1]
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    detector.eval()
    detector([*images])
    # Half of the images were flipped, which a mean over places of rectangles hardly sees.
    torch.testing.assert_close(norm.running_mean, seen[0].mean(dim=(0, 2, 3)), rtol=0.1, atol=0.02)
    assert norm.momentum == 0.1


def test_images_without_objects_can_be_learnt_from(backbone: nn.Module) -> None:
    for neck in ("c4", "fpn"):
        config = dataclasses.replace(TINY, model="mask-rcnn", neck=neck)
        detector = build_detector(copy.deepcopy(backbone), 1, config)
        train_mode(detector)
        empty = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 64, 80, dtype=torch.uint8),
        }
        losses = detector([torch.rand(3, 64, 80)] * 2, [empty, empty])
        total = sum(losses.values())
        total.backward()
        assert torch.isfinite(total)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"arch": "vit_tiny_patch16_224"}, "needs"),
        ({"arch": "convnext_atto", "neck": "c4"}, "--neck c4 needs a ResNet, got ConvNeXt"),
        ({"neck": "c5"}, "--neck must be one of 'c4', 'fpn', got 'c5'"),
    ],
)
def test_backbones_and_options_that_do_not_suit(options: dict[str, str], message: str) -> None:
    arch = options.pop("arch", "narrow")
    with pytest.raises(ValueError, match=message):
        build_detector(build_backbone(arch), 1, DetectionConfig(**options))  # type: ignore[arg-type]


def test_pyramid_takes_other_backbones_with_four_stages() -> None:
    config = dataclasses.replace(TINY, neck="fpn")
    detector = build_detector(build_backbone("convnext_atto"), 1, config).eval()
    [found] = detector([torch.rand(3, 64, 64)])
    assert found["boxes"].shape[1] == 4


@pytest.mark.parametrize("options, message", [
    ({"epochs": 0}, "--epochs must be at least 1, got 0"),
    ({"min_scale": 2.0}, "--min-scale must be within 0.1 ... 1, got 2.0"),
    ({"batch_norm": "sync"}, "--batch-norm must be one of 'train', 'frozen', got 'sync'"),
])  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionConfig(**options)


def test_learning_rate_rises_and_drops(backbone: nn.Module, tmp_path: Path) -> None:
    from mixmask.detection.train import Run

    data = load_detection(write_voc(tmp_path / "data", train=8))
    config = dataclasses.replace(TINY, epochs=30, batch_size=2)  # 120 steps, 12 of them to rise.
    run = Run(config, data, backbone, tmp_path, {})
    peak = 0.02 * 2 / 16
    for step, expected in ((0, peak / 13), (12, peak), (89, peak), (90, peak / 10),
                           (110, peak / 100)):  # fmt: skip
        run.step = step
        assert run.learning_rate() == pytest.approx(expected)
