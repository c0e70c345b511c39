"""`mixmask detect`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mixmask._devices import choose_device
from mixmask.cli._console import describe_device, resumable, say
from mixmask.cli.options import add_fields, add_shared
from mixmask.detection.config import DetectionConfig, load_config
from mixmask.figures.style import short_path
from mixmask.runs.claim import new_folder
from mixmask.runs.folder import CONFIG, has_checkpoint
from mixmask.runs.options import check_resume, flag
from mixmask.runs.records import plural

# What `pip install '.[detection]'` adds to the trainers' libraries.
_LIBRARIES = ("pycocotools", "torchmetrics")


def detect(
    run: str | None, out: Path | None, resume: Path | None, device: str | None = None, **given: Any
) -> None:
    """Train a detector on a run's backbone, test it, and leave a folder of results."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"detection needs {', '.join(missing)}; run pip install '.[detection]' in the checkout "
            "of mixmask"
        )
    # Not for --help: they import torchvision's detectors.
    from mixmask.detection.data import load_detection
    from mixmask.detection.model import load_source
    from mixmask.detection.train import train_detector

    chosen = choose_device(device)
    if resume is not None:
        more = {"RUN": run, "--out": out}
        given_too = [*map(flag, given), *(name for name in more if more[name] is not None)]
        check_resume(resume, given_too)
        (config, source), folder = load_config(resume), resume
        # The checkpoint of a run holds the weights; one that was killed before has none.
        run, small_stem = "random", None
        if not has_checkpoint(resume):
            run, small_stem = source, config.small_stem
        if not run:
            raise ValueError(
                f"{resume} has no checkpoint, and its {CONFIG} does not say which backbone it "
                "started from; start it again with RUN and a new --out"
            )
    elif run is None or not given.get("data"):
        raise ValueError("detect needs RUN, or the word random, and --data; or --resume DIR alone")
    else:
        given["data"] = str(Path(given["data"]).resolve())  # A run goes on from any folder.
        config = DetectionConfig(**given)
        folder = new_folder(out, f"detect-{Path(config.data).stem}-{Path(run).stem}")
        small_stem = given.get("small_stem")
    data = load_detection(Path(config.data), train=config.train_split, test=config.test_split)
    backbone, config, origin = load_source(run, config, small_stem=small_stem)
    say(
        f"{config.model}, {config.neck} on {short_path(config.data)}: "
        f"{plural(len(data.train), 'image')} to train ({data.train.name}), "
        f"{len(data.test):,} to test ({data.test.name}), "
        f"{plural(len(data.classes), 'class')}, {config.arch} at {config.size} px, "
        f"{plural(config.epochs, 'epoch')}, {describe_device(chosen)}\nrun folder: {folder}"
    )
    start = time.perf_counter()
    said: list[int] = []

    def say_row(row: dict[str, Any]) -> None:
        said.append(row["epoch"])
        text = f"epoch {row['epoch']}: loss {row['loss']:.3f}"
        if "ap" in row:
            text += f", AP {row['ap']:.1%}, AP50 {row['ap50']:.1%}, AP75 {row['ap75']:.1%}"
        with tqdm.external_write_mode():  # Otherwise it would end the progress bar's line.
            say(text)

    with resumable("detect", folder):
        _, results = train_detector(
            config, data, backbone, folder,
            source=origin, device=chosen, resume=resume is not None, on_row=say_row,
        )  # fmt: skip
    for prefix, what in (("", "boxes"), ("mask_", "masks")):
        _say_table(results, prefix, what)
    done = f"done in {(time.perf_counter() - start) / 60:.1f} minutes"
    if not said:
        again = f"start another run with --epochs above {config.epochs}"
        done = f"nothing was left to do; to train longer, {again}"
    say(f"\n{done}; see {folder / 'detections.png'}")


def _say_table(results: dict[str, Any], prefix: str, what: str) -> None:
    if f"{prefix}ap" not in results:
        return
    say(f"\n{what:<22}{'AP':>8}{'AP50':>8}{'AP75':>8}")
    overall = {name: results[prefix + name] for name in ("ap", "ap50", "ap75")}
    for name, row in {"all classes": overall, **results[f"{prefix}per_class"]}.items():
        values = ["–"] * 3 if row is None else [f"{value:.1%}" for value in row.values()]
        say(f"{name:<22}" + "".join(f"{value:>8}" for value in values))


def add_detect(parser: argparse.ArgumentParser) -> None:
    """Add the options of `detect`: each field of its configuration."""
    parser.description = (
        "Train Faster R-CNN or Mask R-CNN on a run's backbone and measure its average precision. "
        "The defaults are MoCo's protocol on Pascal VOC, at half its batch size."
    )
    parser.set_defaults(command=detect, run=None, out=None, resume=None)
    text = "run folder, checkpoint file, or the word random for an untrained backbone"
    add_shared(parser, "run", nargs="?", type=str, help=text)
    # What depends on the run is shown by no value.
    add_fields(parser, dataclasses.fields(DetectionConfig), defaults={"small_stem": ""})
    add_shared(parser, "--out", metavar="DIR", help="folder of results [runs/detect-DATA-RUN]")
    add_shared(parser, "--resume", "--device", "--threads")
