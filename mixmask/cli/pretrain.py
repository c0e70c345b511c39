"""`mixmask pretrain` and `mixmask recipes`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixmask.cli._console import say
from mixmask.cli._training import MEASURED, accuracy_monitor

if TYPE_CHECKING:
    from mixmask.data.sets import ImageData
    from mixmask.trainers.config import RunConfig

# Share of an epoch's time.
_MUCH_WAITING = 0.1


def pretrain(out: Path | None, resume: Path | None, **given: Any) -> None:
    """Train a backbone, measuring it before and after, and leave a run folder."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env

    from mixmask.data.sets import load_data
    from mixmask.figures.masks import figure_views
    from mixmask.figures.runs import figure_curves
    from mixmask.figures.style import save_figure
    from mixmask.trainers.loop import first_views, pretrain
    from mixmask.trainers.methods import load_config, make_config

    if resume is not None:
        if given or out is not None:
            named = ", ".join("--" + name.replace("_", "-") for name in given) or "--out"
            raise ValueError(
                f"--resume goes on with the options of the run, got {named} too; leave it out"
            )
        config = load_config(resume / "config.json")
    else:
        config = make_config(**given)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if resume is not None:
        folder = resume
    else:  # One process chooses the folder, or refuses it, for all.
        chosen = [_new_folder(out, config) if state.is_main_process else Path()]
        folder = broadcast_object_list(chosen)[0]
    data = load_data(config.data, config.image_size, stream=config.stream)
    # A resumed run must find its images where they were, however much memory is free by then.
    config = dataclasses.replace(config, stream="always" if data.streamed else "never")

    def start() -> None:
        _say_start(config, data, folder)
        views = first_views(config, data.train.images)
        save_figure(figure_views(views.query, views.mixed, views.key), folder / "views.png")

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
        save_figure(figure_curves(rows), folder / "curves.png")
        _say_end(rows, folder, time.perf_counter() - began)
    state.destroy_process_group()


def recipes() -> None:
    """Print the named settings with their sources and published accuracies."""
    from mixmask.trainers.recipes import describe

    say(describe())


def add_pretrain(commands: Any) -> None:
    """Add `pretrain`, with an option for each field of the methods' configurations."""
    from mixmask.trainers.config import RunConfig
    from mixmask.trainers.methods import METHODS

    parser = commands.add_parser(
        "pretrain",
        help="train a backbone",
        description="Train a backbone; without options, MoCo v2 + MixMask on photographs that "
        "come with the package. Defaults in brackets are those for a folder of images; the named "
        "data sets and moco-v1 have their own, and config.json tells what a run used.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=pretrain, out=None, resume=None)
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    owners: dict[str, list[str]] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    for method, entry in METHODS.items():
        for field in dataclasses.fields(entry.config):
            fields.setdefault(field.name, field)
            owners.setdefault(field.name, []).append(method)
    for name, field in fields.items():
        add_option(parser, field, () if name in shared else owners[name])
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder, a new one")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a run")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to use")


def add_option(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], owners: Sequence[str]
) -> None:
    """Add the option of a field, with the methods that have it if not all do."""
    flag = "--" + field.name.replace("_", "-")
    text = f"{field.metadata['help']} [{field.default}]"
    if owners:
        text += f" ({', '.join(owners)})"
    if isinstance(field.default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif field.name == "ratio":
        parser.add_argument(flag, type=float, nargs="+", action=_RatioAction, help=text)
    else:
        choices = field.metadata["choices"] or None
        if field.name == "method":
            from mixmask.trainers.methods import METHODS

            choices = tuple(METHODS)
        metavar = None if choices else type(field.default).__name__.upper()
        parser.add_argument(
            flag, type=type(field.default), choices=choices, metavar=metavar, help=text
        )


def add_recipes(commands: Any) -> None:
    """Add `recipes`."""
    parser = commands.add_parser(
        "recipes",
        help="list the named settings",
        description="List the named settings, where they come from, and what was published with "
        "them. Accuracies are others'; none is a promise.",
    )
    parser.set_defaults(command=recipes)


class _RatioAction(argparse.Action):
    """One number for a constant, two for a range."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if len(values) > 2:
            parser.error(f"{option_string} takes one number or two, got {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


def _new_folder(out: Path | None, config: RunConfig) -> Path:
    """Name the run folder, refusing one that holds something."""
    if out is None:
        name = f"{Path(config.data).name}-{config.method}-{config.mix}"
        candidates = [Path("runs") / name]
        while candidates[-1].exists():
            candidates.append(Path("runs") / f"{name}-{len(candidates) + 1}")
        return candidates[-1]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and is not empty; go on with --resume {out}, or name another --out"
        )
    return out


def _say_start(config: RunConfig, data: ImageData, out: Path) -> None:
    device = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    say(
        f"{config.method} + {config.mix} on {config.data}: {len(data.train.images):,} images, "
        f"{config.arch} at {config.image_size} px, {config.epochs} epochs, {device}\n"
        f"run folder: {out}"
    )
    if data.streamed:
        by = "the device" if config.decode == "device" else "workers"
        say(f"the images stay on disk and are decoded by {by} anew in every epoch")
    if not data.labelled:
        say("no labelled test split: accuracies are off")
    elif data.streamed and len(data.train.images) > MEASURED:
        say(f"accuracies on the way are measured with {MEASURED:,} of the training images")


def _say_end(rows: list[dict[str, float]], out: Path, seconds: float) -> None:
    first, last = rows[0], rows[-1]
    if "knn" in first and "knn" in last:
        say(f"\n{'on the test split':<22}{'untrained':>10}{'trained':>10}")
        for name, label in (("knn", "nearest neighbours"), ("linear", "linear probe")):
            say(f"{label:<22}{first[name]:>10.1%}{last[name]:>10.1%}")
    if last["wait"] > _MUCH_WAITING:
        say(
            f"\nthe training waited for images {last['wait']:.0%} of the last epoch; more "
            "--workers or a faster disk would help"
        )
    say(f"\ndone in {seconds / 60:.1f} minutes; see {out / 'curves.png'}")
