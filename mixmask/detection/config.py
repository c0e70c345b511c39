"""Options of a detection run, from which the command line derives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixmask.runs.folder import read_config
from mixmask.runs.options import HELP, check_options, option, restore_config


@dataclass(frozen=True)
class DetectionConfig:
    """Options of a detection run; the defaults are MoCo's on Pascal VOC, at half the batch size."""

    data: str = option("", "folder or zip file in Pascal VOC's or COCO's layout")
    train_split: str = option("", "training split [VOC's trainval or COCO's train]")
    test_split: str = option("", "test split [VOC's test or COCO's val]")
    arch: str = option("", f"{HELP['arch']} [that of the run]")
    small_stem: bool = option(False, f"{HELP['small_stem']} [as in the run]")
    model: str = option(
        "faster-rcnn", "predict boxes, or boxes and masks", ("faster-rcnn", "mask-rcnn")
    )
    neck: str = option("c4", "features of one stage, or a pyramid of four", ("c4", "fpn"))
    batch_norm: str = option(
        "train",
        "train batch norm (for 4 or more images per step), or freeze it",
        ("train", "frozen"),
    )
    epochs: int = option(24, "passes over the training split", low=1)
    batch_size: int = option(8, "images per step", low=1)
    lr: float = option(0.0, "learning rate; 0 = 0.02 x batch size / 16", low=0)
    weight_decay: float = option(1e-4, HELP["weight_decay"], low=0)
    size: int = option(800, "shorter side of the images, in pixels", low=32)
    min_scale: float = option(0.6, "smallest training size, as a share of --size", low=0.1, high=1)
    rois: int = option(512, "regions per image that the head learns from in a step", low=1)
    proposals: int = option(
        1000, "regions proposed per image in a test; twice as many in training", low=1
    )
    measure_every: int = option(4, "epochs between tests; 0 = only at the end", low=0)
    workers: int = option(0, f"{HELP['workers']}; 0 = read in the training process", low=0)
    seed: int = option(0, HELP["seed"], low=0, high=2**31 - 1)
    mean: tuple[float, ...] = option((), f"{HELP['mean']} [that of the checkpoint]")
    std: tuple[float, ...] = option((), f"{HELP['std']} [that of the checkpoint]")

    def __post_init__(self) -> None:
        check_options(self)


def load_config(folder: Path) -> tuple[DetectionConfig, str]:
    """Read the options of a detection run's folder, and where its backbone came from.

    That is a path, "random", or "" if the caller did not record it.
    """
    try:
        content = read_config(folder)
        return restore_config(DetectionConfig, content), content.get("source", "")
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a detection run that can be resumed ({error}); pass the run folder "
            "that mixmask detect made"
        ) from None
