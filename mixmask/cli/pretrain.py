"""`mixmask pretrain` and `mixmask recipes`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Container
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from mixmask.cli._console import describe_device, quote, resumable, say
from mixmask.cli.options import add_fields, add_shared
from mixmask.evaluation import monitor
from mixmask.runs.options import flag
from mixmask.runs.records import plural
from mixmask.trainers.config import GROUPS, RunConfig
from mixmask.trainers.methods import METHODS, option_defaults
from mixmask.trainers.recipes import describe
from mixmask.trainers.start import Opened, open_run

# Share of an epoch's time.
_MUCH_WAITING = 0.1


def train_backbone(
    out: Path | None,
    resume: Path | None,
    config: Path | None = None,
    device: str | None = None,
    **given: object,
) -> None:
    """Train a backbone, measuring it before and after, and leave a run folder."""
    began = time.perf_counter()
    opening = open_run(given, config=config, out=out, resume=resume, device=device)
    # A failure before the first checkpoint takes the folder back, and an interruption says how to
    # continue: the run that goes on while it is opened, then the one that is open.
    asked = {"out": out, **given}  # What has to be repeated while nothing of it is stored.
    words = "".join(f" {flag(n)} {quote(v)}" for n, v in asked.items() if v is not None)
    with ExitStack() as held:
        with resumable("pretrain", resume, words) if resume else nullcontext():
            opened = held.enter_context(opening)
        held.enter_context(resumable("pretrain", opened.run.out))
        if opened.run.accelerator.is_main_process:
            _say_start(opened)
        idle = opened.run.step == opened.run.steps * opened.run.config.epochs
        opened.train(monitor.accuracy_monitor)
        if opened.run.accelerator.is_main_process:
            _say_end(opened, time.perf_counter() - began, idle=idle)


def _say_start(opened: Opened) -> None:
    data, config, out = opened.data, opened.run.config, opened.run.out
    images = plural(len(data.train.images), "image")
    device = describe_device(opened.run.accelerator.device)
    say(
        f"{config.method} + {config.mix} on {config.data}: {images}, recipe {config.recipe}, "
        f"{config.arch} at {config.image_size} px, batch size {config.batch_size}, "
        f"{plural(config.epochs, 'epoch')}, {device}\n"
        f"run folder: {out}"
    )
    for note in opened.notes:
        say(note)
    if data.streamed:
        say("the images stay on disk and are decoded by workers in each epoch")
    if not data.labelled:
        held = data.train.labels is not None and data.test is None
        fix = "; --holdout 0.1 sets a tenth of the images aside as one" if held else ""
        say(f"no labelled test split: accuracies are off{fix}")
    elif data.streamed and len(data.train.images) > monitor.MEASURED:
        say(f"accuracies during training use {monitor.MEASURED:,} of the training images")


def _say_end(opened: Opened, seconds: float, *, idle: bool) -> None:
    out, first, last = opened.run.out, opened.run.rows[0], opened.run.rows[-1]
    if "knn" in first and "knn" in last:
        say(f"\n{'on the test split':<22}{'untrained':>10}{'trained':>10}")
        for name, label in (("knn", "nearest neighbours"), ("linear", "linear probe")):
            say(f"{label:<22}{first[name]:>10.1%}{last[name]:>10.1%}")
    if last["wait"] > _MUCH_WAITING:
        say(
            f"\nthe training waited for images {last['wait']:.0%} of the last epoch; use more "
            "--workers or a faster disk"
        )
    done = f"done in {seconds / 60:.1f} minutes"
    if idle:
        more = f"{quote(out)} --epochs N, with N above {opened.run.config.epochs}"
        done = f"nothing was left to do; to train longer: mixmask pretrain --resume {more}"
    say(f"\n{done}; see {out / 'curves.png'}")
    data = "" if opened.data.labelled else " --data LABELLED"
    say(f"next: mixmask evaluate knn {quote(out)}{data}")
    say(f"      mixmask export {quote(out)} --to safetensors --out backbone.safetensors")


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pretrain`: each field of the methods' configurations."""
    parser.description = (
        "Train a backbone. Without options: MoCo v2 + MixMask on clothing64, which comes with the "
        "package. Defaults in brackets are those for clothing64; other data sets and methods have "
        "their own, and config.json lists what a run used."
    )
    parser.usage = "%(prog)s [--OPTION VALUE ...]"
    parser.set_defaults(command=train_backbone, out=None, resume=None)
    run = add_run_fields(parser)
    run.add_argument(
        "--config", type=Path, metavar="FILE",
        help="YAML or JSON file of options, such as a run's config.json; command-line options take "
        "precedence",
    )  # fmt: skip
    add_shared(run, "--out", metavar="DIR", help="run folder to create [runs/DATA-METHOD-MIX]")
    again = "run folder to continue; --epochs and --data may change, --out continues a copy"
    add_shared(run, "--resume", help=again)
    add_shared(run, "--device", "--threads")


def add_run_fields(
    parser: argparse.ArgumentParser, only: Container[str] | None = None
) -> argparse._ArgumentGroup:
    """Add the options of all methods, or some of them, in groups, and return the last group.

    The defaults that `--help` shows are those of a plain run.
    """
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    fields: dict[str, dataclasses.Field[Any]] = {}
    owners: dict[str, list[str]] = {}
    defaults: dict[str, object] = {}
    # An option that moco-v2 lacks shows the default of the first method that has it.
    for method in (RunConfig.method, *METHODS):
        defaults = option_defaults(method, RunConfig.data) | defaults
    for method, entry in METHODS.items():
        for field in dataclasses.fields(entry.config):
            fields.setdefault(field.name, field)
            if field.name not in shared:
                owners.setdefault(field.name, []).append(method)
    # A group begins at the field that GROUPS names; a method's own options go to that of methods.
    groups = {title: parser.add_argument_group(title) for title in GROUPS.values()}
    title = ""
    for name, field in fields.items():
        title = GROUPS.get(name, title) if name in shared else "method"
        # The channels are those of the data.
        if name != "channels" if only is None else name in only:
            words = {"method": tuple(METHODS)}
            add_fields(groups[title], [field], defaults=defaults, owners=owners, choices=words)
    return groups["run"]


def print_recipes() -> None:
    """Print the named settings with their sources and published accuracies."""
    say(describe())


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Add the description of `recipes`, which has no options."""
    parser.description = (
        "List the named settings, their sources, and the accuracies that others have published "
        "with them."
    )
    parser.set_defaults(command=print_recipes)
