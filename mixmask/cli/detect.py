"""`mixmask detect`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixmask.cli._console import say

if TYPE_CHECKING:
    from torch import nn

    from mixmask.detection.config import DetectionConfig
    from mixmask.detection.data import DetectionData

# What `pip install 'mixmask[detection]'` adds to the trainers' libraries.
_LIBRARIES = ("pycocotools", "torchmetrics")


def detect(run: str | None, out: Path | None, resume: Path | None, **given: Any) -> None:
    """Train a detector on a run's backbone, test it, and leave a folder of results."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"detection needs {', '.join(missing)}: pip install 'mixmask[detection]'")
    try:
        _detect(run, out, resume, given)
    except (torch.OutOfMemoryError, MemoryError):
        raise ValueError(
            "out of memory: use a smaller --batch-size, --size or --rois, in this order"
        ) from None


def _detect(run: str | None, out: Path | None, resume: Path | None, given: dict[str, Any]) -> None:
    from mixmask.detection.config import DetectionConfig, load_config
    from mixmask.detection.data import load_detection
    from mixmask.detection.train import train_detector

    if resume is not None:
        if given or out is not None or run is not None:
            named = [_flag(name) for name in given] or ["--out" if run is None else "RUN"]
            raise ValueError(
                f"--resume goes on with the options of the run, got {', '.join(named)} too; "
                "leave it out"
            )
        config, folder = load_config(resume), resume
    else:
        config = DetectionConfig(**given)
        if run is None or not config.data:
            raise ValueError(
                "detect needs RUN, or the word random, and --data; or --resume DIR alone"
            )
        folder = _new_folder(out, run, config)
    data = load_detection(Path(config.data), train=config.train_split, test=config.test_split)
    backbone, config, source = _backbone(run, config, given.get("small_stem"))
    device = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    say(
        f"{config.model}, {config.neck} on {config.data}: {len(data.train):,} images to train "
        f"({data.train.name}), {len(data.test):,} to test ({data.test.name}), "
        f"{len(data.classes)} classes, {config.arch} at {config.size} px, {config.epochs} epochs, "
        f"{device}\nrun folder: {folder}"
    )
    began = time.perf_counter()
    detector, results = train_detector(
        config, data, backbone, folder, source=source, resume=resume is not None, on_row=_say_row
    )
    _draw(detector, data, folder, masks=config.model == "mask-rcnn")
    _say_end(results, folder, time.perf_counter() - began)


def _backbone(
    run: str | None, config: DetectionConfig, small_stem: bool | None
) -> tuple[nn.Module, DetectionConfig, dict[str, Any]]:
    """Return the backbone, the options with what it is, and what results say of it."""
    from mixmask._seeds import fold_seed
    from mixmask.backbones import build_backbone
    from mixmask.checkpoints.load import load_backbone

    if run is None:  # A run that goes on, whose checkpoint holds the weights.
        return build_backbone(config.arch, small_stem=config.small_stem), config, {}
    if run == "random":
        if not config.arch:
            raise ValueError("a random backbone needs --arch, for instance resnet18 or narrow")
        torch.manual_seed(fold_seed(config.seed, "backbone"))
        backbone = build_backbone(config.arch, small_stem=config.small_stem)
        source = {"run": run, "arch": config.arch, "small_stem": config.small_stem}
        return backbone, config, source
    loaded = load_backbone(Path(run), arch=config.arch or None, small_stem=small_stem)
    config = dataclasses.replace(config, arch=loaded.arch, small_stem=loaded.small_stem)
    source = {
        "run": run,
        "arch": loaded.arch,
        "small_stem": loaded.small_stem,
        "layout": loaded.layout,
        "taken": len(loaded.taken),
        "left": len(loaded.left),
        "pretraining": loaded.config,
    }
    return loaded.backbone, config, source


def _new_folder(out: Path | None, run: str, config: DetectionConfig) -> Path:
    """Name the folder of results, refusing one that holds something."""
    if out is None:
        name = f"detect-{Path(config.data).stem}-{Path(run).stem}"
        folder, number = Path("runs") / name, 1
        while folder.exists():
            number += 1
            folder = Path("runs") / f"{name}-{number}"
        return folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and is not empty; go on with --resume {out}, or name another --out"
        )
    return out


def _draw(
    detector: nn.Module, data: DetectionData, folder: Path, *, masks: bool, count: int = 4
) -> None:
    """Draw the first test images with what is annotated and what is detected."""
    from mixmask.detection.metrics import predict
    from mixmask.figures.masks import figure_detections
    from mixmask.figures.style import save_figure

    test = data.test.with_masks() if masks else data.test
    images, targets = zip(*(test[i] for i in range(min(count, len(test)))), strict=True)
    found = predict(detector, images, next(detector.parameters()).device)
    save_figure(figure_detections(images, targets, found, data.classes), folder / "detections.png")


def _say_row(row: dict[str, Any]) -> None:
    text = f"epoch {row['epoch']}: loss {row['loss']:.3f}"
    if "ap" in row:
        text += f", AP {row['ap']:.1%}, AP50 {row['ap50']:.1%}, AP75 {row['ap75']:.1%}"
    say(text)


def _say_end(results: dict[str, Any], folder: Path, seconds: float) -> None:
    for prefix, what in (("", "boxes"), ("mask_", "masks")):
        if prefix + "ap" not in results:
            continue
        say(f"\n{what:<22}{'AP':>8}{'AP50':>8}{'AP75':>8}")
        rows = {"all classes": {name: results[prefix + name] for name in ("ap", "ap50", "ap75")}}
        for name, row in {**rows, **results[prefix + "per_class"]}.items():
            figures = ["–"] * 3 if row is None else [f"{value:.1%}" for value in row.values()]
            say(f"{name:<22}" + "".join(f"{figure:>8}" for figure in figures))
    say(f"\ndone in {seconds / 60:.1f} minutes; see {folder / 'detections.png'}")


def add_detect(commands: Any) -> None:
    """Add `detect`, with an option for each field of its configuration."""
    from mixmask.detection.config import DetectionConfig

    parser = commands.add_parser(
        "detect",
        help="train and test an object detector on a backbone",
        description="Train Faster R-CNN or Mask R-CNN on a run's backbone and measure its average "
        "precision. The defaults are MoCo's protocol on Pascal VOC, at half its batch.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=detect, run=None, out=None, resume=None)
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="a run folder, a checkpoint file, or the word random for an untrained backbone",
    )
    for option in dataclasses.fields(DetectionConfig):
        kind = type(option.default)
        text = option.metadata["help"]
        if option.default:
            text += f" [{option.default}]"
        if kind is bool:
            parser.add_argument(
                _flag(option.name), action=argparse.BooleanOptionalAction, help=text
            )
        else:
            choices = option.metadata["choices"] or None
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(
                _flag(option.name), type=kind, choices=choices, metavar=metavar, help=text
            )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of results, a new one")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a run of detect")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to use")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
