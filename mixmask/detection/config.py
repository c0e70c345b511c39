"""Options of a detection run, from which the command line derives."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask._checks import check_choice

MODELS = ("faster-rcnn", "mask-rcnn")
NECKS = ("c4", "fpn")
BATCH_NORMS = ("train", "frozen")


def _option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class DetectionConfig:
    """Options of a detection run; the defaults are MoCo's on Pascal VOC, at half the batch."""

    data: str = _option("", "folder or zip file in Pascal VOC's or COCO's layout")
    train_split: str = _option("", "training split, without it VOC's trainval or COCO's train")
    test_split: str = _option("", "split to test on, without it VOC's test or COCO's val")
    arch: str = _option("", "backbone: a timm name or 'narrow'; without it the run's own")
    small_stem: bool = _option(False, "3x3 first convolution, no pooling; without it the run's own")
    model: str = _option("faster-rcnn", "boxes, or boxes and masks", MODELS)
    neck: str = _option("c4", "features of one stage, or a pyramid of four", NECKS)
    batch_norm: str = _option(
        "train", "tune batch norm (from about 4 images a step), or keep it as it is", BATCH_NORMS
    )
    epochs: int = _option(24, "passes over the training split")
    batch_size: int = _option(8, "images a step")
    lr: float = _option(0.0, "learning rate; without it 0.02 for 16 images, in proportion")
    weight_decay: float = _option(1e-4, "weight decay")
    size: int = _option(800, "shorter side of the images, in pixels")
    min_scale: float = _option(0.6, "smallest training size, as a share of --size")
    rois: int = _option(512, "regions an image that the head learns from in a step")
    proposals: int = _option(1000, "regions proposed an image in a test; twice as many in training")
    monitor: int = _option(4, "epochs between two tests; 0 for one at the end")
    workers: int = _option(0, "processes that read images; 0 reads them in between")
    seed: int = _option(0, "seed from which all randomness follows")

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        for f in dataclasses.fields(self):
            if f.metadata["choices"]:
                check_choice(_flag(f.name), getattr(self, f.name), f.metadata["choices"])
        for name, low in (("size", 32), ("monitor", 0), ("workers", 0), ("seed", 0)):
            _check_range(name, getattr(self, name), low)
        for name in ("epochs", "batch_size", "rois", "proposals"):
            _check_range(name, getattr(self, name), 1)
        _check_range("lr", self.lr, 0)
        _check_range("weight_decay", self.weight_decay, 0)
        _check_range("min_scale", self.min_scale, 0.1, 1)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"within {low} ... {high}"
        raise ValueError(f"{_flag(name)} must be {bounds}, got {value}")


def load_config(folder: Path) -> DetectionConfig:
    """Read the options of a run folder.

    Raises:
        ValueError: If it is no folder of a detection run.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return DetectionConfig(**content)
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} is no detection run that can be resumed ({error}); pass a run folder"
        ) from None
