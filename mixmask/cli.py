"""The command line: `mixmask pretrain`, `mixmask recipes` and `mixmask show`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from mixmask import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixmask.trainers.config import RunConfig
    from mixmask.trainers.data import ImageData

_EXTRA = ("accelerate", "kornia", "matplotlib", "timm", "torchvision", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name. Default: those of this process.

    Returns:
        0, 2 for input that is refused, 130 when interrupted.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"the trainers need {', '.join(missing)}: pip install 'mixmask[train]'")
    warnings.showwarning = lambda message, *_: _say(f"mixmask: {message}", sys.stderr)
    warnings.filterwarnings("always", category=UserWarning, module="mixmask")
    try:
        options = vars(_parser().parse_args(arguments))
        command: Callable[..., None] = options.pop("command")
        command(**options)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        return _refuse(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        return _refuse(
            "out of memory: --accumulate 2 halves what a step holds, --checkpointing and "
            "--precision bf16 help too"
        )
    except KeyboardInterrupt:
        _say("\nmixmask: interrupted", sys.stderr)
        return 130
    except SystemExit as stop:  # argparse, which has said why
        return int(stop.code or 0)
    return 0


def pretrain(out: Path | None, resume: Path | None, threads: int | None, **given: Any) -> None:
    """Train a backbone, measuring it before and after, and leave a run folder."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env

    from mixmask.trainers.data import load_data
    from mixmask.trainers.loop import first_views, pretrain
    from mixmask.trainers.methods import load_config, make_config
    from mixmask.visualize import figure_curves, figure_views, save_figure

    if threads is not None:
        if threads < 1:
            raise ValueError(
                f"--threads must be at least 1, got {threads}; use the number of cores"
            )
        torch.set_num_threads(threads)
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
    data = load_data(config.data, config.image_size)

    def start() -> None:
        _say_start(config, data, folder)
        views = first_views(config, data.train.images)
        save_figure(figure_views(views.query, views.mixed, views.key), folder / "views.png")

    began = time.perf_counter()
    _, rows = pretrain(
        config,
        data.train.images,
        folder,
        monitor=_monitor(data),
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

    _say(describe())


def show(images: list[Path], out: Path, grid_sizes: list[int], ratio: float, seed: int) -> None:
    """Draw block and discrete masks at several grids, and the two mixes of each pair."""
    from mixmask.trainers.data import load_data, read_square
    from mixmask.visualize import figure_masks, save_figure

    if len(images) == 1:
        raise ValueError(f"one image has nobody to mix with, got {images[0]} alone; name another")
    if not out.parent.is_dir():
        raise ValueError(f"--out lies in {out.parent}, which is no folder; make it first")
    if images:
        read = []
        for path in images:
            image = read_square(path, 224)
            if image is None:
                raise ValueError(f"{path} is no readable image; pass a JPEG or PNG file")
            read.append(torch.from_numpy(image).permute(2, 0, 1))
        pictures = torch.stack(read)
    else:
        pictures = load_data("clothing64", 64).train.images[[2520, 1100]]
    generator = torch.Generator().manual_seed(seed)
    figure = figure_masks(pictures, grid_sizes=grid_sizes, ratio=ratio, generator=generator)
    save_figure(figure, out)
    _say(f"drew {out}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mixmask", description="MixMask for self-supervised training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pretrain(commands)
    _add_recipes(commands)
    _add_show(commands)
    return parser


def _add_pretrain(commands: Any) -> None:
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
    parser.set_defaults(command=pretrain, out=None, resume=None, threads=None)
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    owners: dict[str, list[str]] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    for method, entry in METHODS.items():
        for field in dataclasses.fields(entry.config):
            fields.setdefault(field.name, field)
            owners.setdefault(field.name, []).append(method)
    for name, field in fields.items():
        _add_option(parser, field, () if name in shared else owners[name])
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder, a new one")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a run")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to use")


def _add_option(
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


def _add_recipes(commands: Any) -> None:
    parser = commands.add_parser(
        "recipes",
        help="list the named settings",
        description="List the named settings, where they come from, and what was published with "
        "them. Accuracies are others'; none is a promise.",
    )
    parser.set_defaults(command=recipes)


def _add_show(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        help="draw masks and mixes of images",
        description="Draw block and discrete masks at several grids, and the two mixes.",
    )
    parser.set_defaults(command=show)
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files, mixed in pairs; without any, two photographs of clothing64",
    )
    parser.add_argument("--out", type=Path, default=Path("mixmask.png"), help="the PNG to write")
    parser.add_argument(
        "--grid-sizes", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="cells a side"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="share of own pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"mixmask: {message}; see {self.prog} --help\n")


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


def _monitor(data: ImageData) -> Callable[[nn.Module, bool], dict[str, float]] | None:
    """Measure kNN and linear accuracy on the test split, where there are labels."""
    from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy

    if not data.labelled:
        return None
    train, test = _with_labels(data)

    def measure(backbone: nn.Module, thorough: bool) -> dict[str, float]:
        x, x_test = (extract_features(backbone, images) for images in (train[0], test[0]))
        measured = {"knn": knn_accuracy(x, train[1], x_test, test[1])}
        if thorough:
            measured["linear"] = linear_accuracy(x, train[1], x_test, test[1])
        return measured

    return measure


def _with_labels(data: ImageData) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the labelled images and labels of both splits; STL-10 has unlabelled ones too."""
    assert data.test is not None
    assert data.test.labels is not None
    assert data.train.labels is not None
    train = data.train.images, data.train.labels
    known = data.train.labels >= 0
    if not known.all():  # Selecting copies, which a large data set would feel.
        train = data.train.images[known], data.train.labels[known]
    return train, (data.test.images, data.test.labels)


def _say_start(config: RunConfig, data: ImageData, out: Path) -> None:
    device = "GPU" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    _say(
        f"{config.method} + {config.mix} on {config.data}: {len(data.train.images):,} images, "
        f"{config.arch} at {config.image_size} px, {config.epochs} epochs, {device}\n"
        f"run folder: {out}"
    )
    if not data.labelled:
        _say("no labelled test split: accuracies are off")


def _say_end(rows: list[dict[str, float]], out: Path, seconds: float) -> None:
    first, last = rows[0], rows[-1]
    if "knn" in first and "knn" in last:
        _say(f"\n{'on the test split':<22}{'untrained':>10}{'trained':>10}")
        for name, label in (("knn", "nearest neighbours"), ("linear", "linear probe")):
            _say(f"{label:<22}{first[name]:>10.1%}{last[name]:>10.1%}")
    _say(f"\ndone in {seconds / 60:.1f} minutes; see {out / 'curves.png'}")


def _refuse(message: str) -> int:
    _say(f"mixmask: {' '.join(message.split())}", sys.stderr)
    return 2


def _say(text: str, file: TextIO | None = None) -> None:
    (file or sys.stdout).write(text + "\n")
    (file or sys.stdout).flush()


if __name__ == "__main__":
    sys.exit(main())
