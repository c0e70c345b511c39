"""`mixmask pretrain` and `mixmask recipes`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixmask.cli._console import say
from mixmask.cli.options import add_fields, add_shared, check_resume
from mixmask.runs.options import flag

if TYPE_CHECKING:
    from mixmask.data.sets import ImageData
    from mixmask.runs.folder import Row
    from mixmask.trainers.config import RunConfig

# Share of an epoch's time.
_MUCH_WAITING = 0.1


def train_backbone(out: Path | None, resume: Path | None, **given: Any) -> None:
    """Train a backbone, measuring it before and after, and leave a run folder."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env

    from mixmask.data.sets import load_data
    from mixmask.evaluation.monitor import accuracy_monitor
    from mixmask.figures.masks import figure_views
    from mixmask.figures.runs import figure_curves
    from mixmask.figures.style import save_figure, short_path
    from mixmask.runs.folder import new_folder
    from mixmask.trainers.loop import first_views, pretrain
    from mixmask.trainers.methods import load_config, make_config

    if resume is not None:
        check_resume([*map(flag, given), *(["--out"] if out else [])])
        config = load_config(resume)
    else:
        config = make_config(**given)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    folder = resume
    if folder is None:  # One process chooses the folder, or refuses it, for all.
        name = f"{Path(config.data).name}-{config.method}-{config.mix}"
        chosen = [new_folder(out, name) if state.is_main_process else Path()]
        folder = broadcast_object_list(chosen)[0]
    data = load_data(config.data, config.image_size, stream=config.stream)
    # A resumed run must find its images where they were, however much memory is free by then.
    config = dataclasses.replace(config, stream="always" if data.streamed else "never")

    def start() -> None:
        _say_start(config, data, folder)
        views = first_views(config, data.train.images)
        figure = figure_views(views.images, views.query, views.mixed, views.key)
        save_figure(figure, folder / "views.png")

    began = time.perf_counter()
    _, rows = pretrain(
        config,
        data.train.images,
        folder,
        monitor=accuracy_monitor(data),
        on_start=start,
        resume=resume is not None,
    )
    if state.is_main_process:
        save_figure(figure_curves(rows, title=short_path(folder.resolve())), folder / "curves.png")
        _say_end(rows, folder, time.perf_counter() - began)
    state.destroy_process_group()


def print_recipes() -> None:
    """Print the named settings with their sources and published accuracies."""
    from mixmask.trainers.recipes import describe

    say(describe())


def add_pretrain(commands: Any) -> None:
    """Add `pretrain`, with an option for each field of the methods' configurations."""
    parser = commands.add_parser(
        "pretrain",
        help="train a backbone",
        description="Train a backbone. Without options: MoCo v2 + MixMask on clothing64, which "
        "comes with the package. Defaults in brackets are those for clothing64; other data sets "
        "and methods have their own, and config.json lists what a run used.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=train_backbone, out=None, resume=None)
    add_run_fields(parser)
    add_shared(parser, "--out", metavar="DIR", help="run folder to create [runs/DATA-METHOD-MIX]")
    add_shared(parser, "--resume", "--threads")


def add_run_fields(parser: argparse.ArgumentParser, only: Container[str] | None = None) -> None:
    """Add the options of all methods, or some of them, with the defaults of a plain run."""
    from mixmask.trainers.config import RunConfig
    from mixmask.trainers.methods import METHODS, make_config

    shared = {field.name for field in dataclasses.fields(RunConfig)}
    owners: dict[str, list[str]] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    # An option that moco-v2 lacks shows the default of the first method that has it.
    defaults = dataclasses.asdict(make_config())
    for method, entry in METHODS.items():
        defaults = dataclasses.asdict(make_config(method=method)) | defaults
        for field in dataclasses.fields(entry.config):
            if only is None or field.name in only:
                fields.setdefault(field.name, field)
                if field.name not in shared:
                    owners.setdefault(field.name, []).append(method)
    add_fields(
        parser,
        fields.values(),
        defaults=defaults,
        owners=owners,
        choices={"method": tuple(METHODS)},
    )


def add_recipes(commands: Any) -> None:
    """Add `recipes`."""
    parser = commands.add_parser(
        "recipes",
        help="list the named settings",
        description="List the named settings, their sources, and the accuracies that others have "
        "published with them.",
    )
    parser.set_defaults(command=print_recipes)


def _say_start(config: RunConfig, data: ImageData, out: Path) -> None:
    from mixmask.evaluation.monitor import MEASURED

    device = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    say(
        f"{config.method} + {config.mix} on {config.data}: {len(data.train.images):,} images, "
        f"{config.arch} at {config.image_size} px, {config.epochs} epochs, {device}\n"
        f"run folder: {out}"
    )
    if data.streamed:
        say("the images stay on disk and are decoded by workers in each epoch")
    if not data.labelled:
        say("no labelled test split: accuracies are off")
    elif data.streamed and len(data.train.images) > MEASURED:
        say(f"accuracies during training use {MEASURED:,} of the training images")


def _say_end(rows: list[Row], out: Path, seconds: float) -> None:
    first, last = rows[0], rows[-1]
    if "knn" in first and "knn" in last:
        say(f"\n{'on the test split':<22}{'untrained':>10}{'trained':>10}")
        for name, label in (("knn", "nearest neighbours"), ("linear", "linear probe")):
            say(f"{label:<22}{first[name]:>10.1%}{last[name]:>10.1%}")
    if last["wait"] > _MUCH_WAITING:
        say(
            f"\nthe training waited for images {last['wait']:.0%} of the last epoch; use more "
            "--workers or a faster disk"
        )
    say(f"\ndone in {seconds / 60:.1f} minutes; see {out / 'curves.png'}")
