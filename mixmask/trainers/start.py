"""How a run is started or gone on with: options, images and processes that fit together."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from mixmask._version import __version__
from mixmask.data.sets import ImageData
from mixmask.figures.masks import figure_views
from mixmask.figures.runs import figure_curves
from mixmask.figures.style import save_figure, short_path
from mixmask.runs.claim import new_folder, starting
from mixmask.runs.folder import Row, read_config, read_options
from mixmask.runs.images import fingerprint_of, load_images, resolve_data
from mixmask.runs.options import FACTS, Options, check_resume, flag
from mixmask.runs.records import plural
from mixmask.trainers.config import RunConfig
from mixmask.trainers.loop import Monitor, first_views, learning_rate, train
from mixmask.trainers.methods import (
    METHODS,
    build_config,
    load_config,
    make_config,
    option_defaults,
    options_of_run,
)
from mixmask.trainers.processes import agree, gather_objects, start_processes, together
from mixmask.trainers.run import Run

# What may change when a run goes on.
CHANGEABLE = ("epochs", "data")
_ALLOWED = ("--epochs", "--data", "--out", "--device", "--threads")
# What may differ between processes on several machines.
_OWN = ("data", "workers")
# Options that take numbers with a fraction.
_FLOATS = {
    name
    for method in METHODS
    for name, value in option_defaults(method).items()
    if isinstance(value, float)
}


@dataclass(frozen=True)
class Pretrained:
    """A trained backbone and how it came about.

    Attributes:
        folder: The run folder: its configuration, metrics, checkpoints and figures.
        config: All options of the run.
        backbone: (N, C, H, W) -> (N, D) features, in evaluation mode.
        rows: One per epoch, those of `metrics.csv`; "loss", and "knn" where it was measured.
    """

    folder: Path
    config: RunConfig = field(repr=False)
    backbone: nn.Module = field(repr=False)
    rows: list[Row] = field(repr=False)


@dataclass(frozen=True)
class Opened:
    """A run that is ready to train."""

    run: Run
    data: ImageData
    notes: tuple[str, ...]  # What differs from the run that goes on.

    def draw_views(self) -> None:
        """Draw what the first steps see, in one of the processes."""
        if self.run.accelerator.is_main_process:
            save_figure(figure_views(*first_views(self.run)), self.run.out / "views.png")

    def draw_curves(self) -> None:
        """Draw the run's metrics, in one of the processes."""
        if self.run.accelerator.is_main_process:
            title = short_path(self.run.out.resolve())
            save_figure(figure_curves(self.run.rows, title=title), self.run.out / "curves.png")


@dataclass(frozen=True)
class _Plan:
    """The options of a run, and where it lies."""

    config: RunConfig
    folder: Path | None
    content: Options  # Of the `config.json` of the run that goes on.
    notes: tuple[str, ...] = ()


def pretrain(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str | None = None,
    monitor: Callable[[ImageData, int], Monitor | None] | None = None,
    progress: bool = True,
    **options: Any,
) -> Pretrained:
    """Train a backbone from Python or a notebook, as `mixmask pretrain` does.

    Args:
        config: A YAML or JSON file of options, such as another run's `config.json`.
        out: The run folder to create. Default: runs/DATA-METHOD-MIX.
        resume: A run folder to continue. Of the options, `epochs` and `data` may be given with
            it, and with `out` a copy of the run goes on.
        device: "cpu", "cuda:1", "mps". Default: a GPU where there is one.
        monitor: Builds what measures the backbone on labelled images, such as
            `mixmask.evaluation.monitor.accuracy_monitor`, from the images and the size of views.
        progress: Show a progress bar.
        **options: Those of the command line, with underscores: `data="photos"`, `epochs=20`.

    Raises:
        TypeError: If an option has another type.
        ValueError: If an option is unknown or out of its range, images are missing or others than
            those of the run, or `out` holds something.
        FloatingPointError: If the loss is no longer finite or the run has collapsed.
        OSError: If images cannot be read, a worker or another process has died, or there is no
            room for the checkpoint; the one before is kept.
        KeyboardInterrupt: If the run was interrupted, once it is saved.

    Example:
        >>> import tempfile
        >>> from mixmask.trainers import pretrain
        >>> run = pretrain(
        ...     data="clothing64", epochs=1, batch_size=512, image_size=16, device="cpu",
        ...     out=tempfile.mkdtemp(), progress=False,
        ... )
        >>> run.backbone(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 128])
        >>> [row["step"] for row in run.rows]
        [6]
    """
    with open_run(options, config=config, out=out, resume=resume, device=device) as opened:
        run = opened.run
        for note in opened.notes if run.accelerator.is_main_process else ():
            warnings.warn(note, stacklevel=2)
        opened.draw_views()
        measure = monitor(opened.data, run.config.image_size) if monitor else None
        train(run, monitor=measure, progress=progress)
        opened.draw_curves()
        backbone = run.model.backbone.eval()
    return Pretrained(run.out, run.config, backbone, run.rows)


@contextmanager
def open_run(
    options: Options,
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Opened]:
    """Open a run, in all processes alike; see `pretrain`.

    If what is done with it fails before the first checkpoint, its folder is removed again.
    """
    state = start_processes(device)
    source = None if resume is None else Path(resume)
    target = None if out is None else Path(out)

    def plan() -> _Plan:
        if source is None:
            return _plan_new(options, config, target, choose=state.is_main_process)
        given = [flag(name) for name in options if name not in CHANGEABLE]
        check_resume([*given, *(["--config"] if config else [])], allowed=_ALLOWED)
        return _plan_resumed(options, source, target, state.num_processes)

    # Every process plans for itself, so that all of them stop where one refuses.
    planned = together(plan)
    agree(
        {"version": __version__, "resume": resume}
        | {n: v for n, v in dataclasses.asdict(planned.config).items() if n not in _OWN}
    )
    folder = gather_objects(planned.folder)[0]  # One process chooses it for all.
    wanted = planned.config
    # Where a run goes on, these are compared with the images that it was started on.
    recorded = {**planned.content, "data": wanted.data, "holdout": wanted.holdout}
    data = together(
        lambda: load_images(
            recorded, planned.config.image_size, stream=planned.config.stream, where=str(source)
        )
    )
    fingerprint = fingerprint_of(data)
    agree({f"{name} of the data": value for name, value in fingerprint.items()})
    if (place := resolve_data(wanted.data, data)) != wanted.data:
        wanted = replace(wanted, data=place)
    if state.is_main_process:
        _warn_queue(wanted, len(data.train.images))
    with ExitStack() as held:
        together(lambda: held.enter_context(starting(folder)))
        run = Run.open(
            wanted, data.train.images, folder, resume=source, facts={"fingerprint": fingerprint}
        )
        notes = planned.notes
        if source is not None and planned.content.get("epochs") != wanted.epochs:
            notes = (*notes, _describe_length(build_config(planned.content), run))
        yield Opened(run, data, notes)
    state.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # The next run may have another device.


def _plan_new(
    options: Options, file: str | Path | None, out: Path | None, *, choose: bool
) -> _Plan:
    """Take options from a file and from the caller, who has the last word."""
    config = make_config(**((read_options_file(Path(file), options) if file else {}) | options))
    if config.init:  # A run may be continued from another working directory.
        config = replace(config, init=str(Path(config.init).resolve()))
    data = Path(config.data).resolve()
    folder = new_folder(out, f"{data.name}-{config.method}-{config.mix}") if choose else None
    if folder and data.is_dir() and folder.resolve().is_relative_to(data):
        raise ValueError(
            f"the run folder {folder} lies inside of the data, {config.data}, so that its pictures "
            "would become images; choose an --out elsewhere"
        )
    return _Plan(config, folder, {})


def _plan_resumed(options: Options, source: Path, out: Path | None, processes: int) -> _Plan:
    """Take the options of a run that goes on, with what may change."""
    config, content = load_config(source), read_config(source)
    notes: list[str] = []
    if (epochs := options.get("epochs", config.epochs)) < config.epochs:
        raise ValueError(
            f"--epochs must be at least the {config.epochs} of {source}, got {epochs}; leave it out"
        )
    if "data" in options:
        known = "fingerprint" in content
        same = "the same images" if known else "unchecked images (an older run does not say which)"
        notes.append(f"{same}, now in {options['data']}: all else stays exact")
    if out is not None and out != source:
        out = new_folder(out, out.name)
        notes.append(f"{source} stays as it is; {out} goes on from its last checkpoint, exactly")
    before = content.get("processes", processes)
    if before != processes:
        config = _spread(config, before, processes)
        notes.append(
            f"{plural(processes, 'process')} instead of {before}: each step takes the same images "
            f"({config.batch_size} per process) at the same learning rate; views, masks and the "
            "statistics of batch norm differ, so the weights are not those of an unchanged run"
        )
    return _Plan(replace(config, **options), out or source, content, tuple(notes))


def _spread(config: RunConfig, before: int, processes: int) -> RunConfig:
    """Keep a step's images when the number of processes changes, and the memory where possible."""
    total = config.batch_size * before
    parts = config.accumulate * before
    if total % processes:
        raise ValueError(
            f"the run takes {total} images per step, {config.batch_size} in each of "
            f"{plural(before, 'process')}, which {processes} cannot share evenly; start as many "
            "processes as before, or a number that divides them"
        )
    accumulate = parts // processes if parts % processes == 0 else 1
    return replace(config, batch_size=total // processes, accumulate=accumulate)


def _describe_length(before: RunConfig, run: Run) -> str:
    """Say what stays exact in a run that is made longer, and what cannot."""
    rates = [
        learning_rate(config, min(1.0, run.step / (run.steps * config.epochs)))
        for config in (run.config, before)
    ]
    return (
        f"{run.config.epochs} epochs instead of {before.epochs}: weights, images, views and masks "
        f"go on exactly; the schedules are those of the longer run from here on (learning rate "
        f"{rates[0]:.3g} instead of {rates[1]:.3g}), so the weights will not be those of a run "
        "that was as long from the start"
    )


def _warn_queue(config: RunConfig, count: int) -> None:
    """Warn of a queue in which each image has several keys, which would be its own negatives."""
    size = getattr(config, "queue_size", 0)
    if size > count:
        better = max(config.batch_size, 2 ** max(0, (count // 2).bit_length() - 1))
        warnings.warn(
            f"--queue-size {size} is more than the {plural(count, 'training image')}, so that an "
            f"image meets its own past keys as negatives; --queue-size {better} suits them",
            stacklevel=2,
        )


def read_options_file(path: Path, given: Options | None = None) -> Options:
    """Read options from a hand-written file, or from a run's `config.json`.

    Args:
        path: JSON, or YAML by its suffix `.yaml` or `.yml`, which needs pyyaml. Names may be
            written with hyphens.
        given: The options beside it, which a run's own may not suit; see `options_of_run`.

    Raises:
        ValueError: If the file is missing, holds no options, or another kind of run's.
    """
    try:
        content = _read_yaml(path) if path.suffix in (".yaml", ".yml") else read_options(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path} cannot be used ({reason})") from None
    options = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"--config {path} holds {name!r}, which names no option")  # noqa: TRY004
        name = name.replace("-", "_")
        if name not in FACTS:
            value = _number(value) if name in _FLOATS else value
            options[name] = tuple(value) if isinstance(value, list) else value
    return options_of_run(options, given or {}) if "format" in content else options


def _read_yaml(path: Path) -> Options:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise ValueError("YAML needs pyyaml: pip install pyyaml, or write JSON") from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error) or "it is nested too deeply") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"expected names and values, got {type(content).__name__}")  # noqa: TRY004
    return dict(content)


def _number(value: Any) -> Any:
    """Return 1e-3 as a number: YAML 1.1 reads it as text, because it has no point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
