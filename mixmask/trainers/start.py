"""How a run is started or continued: options, images and processes that fit together."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from mixmask._signals import interruptible
from mixmask._version import __version__
from mixmask.data.named import NAMED
from mixmask.data.sets import DataListing, ImageData, list_data
from mixmask.figures.masks import figure_views
from mixmask.figures.runs import figure_curves
from mixmask.figures.style import save_figure, short_path
from mixmask.runs.claim import claim_folder, new_folder
from mixmask.runs.folder import Row
from mixmask.runs.images import check_code, load_images
from mixmask.runs.options import Options, check_resume, flag, set_threads
from mixmask.runs.records import plural
from mixmask.trainers.config import PRESETS, RunConfig
from mixmask.trainers.files import read_options_file, read_run
from mixmask.trainers.loop import Monitor, first_views, learning_rate, train
from mixmask.trainers.methods import make_config
from mixmask.trainers.processes import (
    agree,
    call_together,
    gather_objects,
    start_processes,
)
from mixmask.trainers.recipes import suit_images, suit_queue
from mixmask.trainers.run import Run

# What may change when a run goes on.
CHANGEABLE = ("epochs", "data")
_ALLOWED = ("--epochs", "--data", "--out", "--device", "--threads")
# What may differ between processes on several machines.
_OWN = ("data", "workers")

# Runs in threads of one process would draw from the same generator.
_ONE_RUN = threading.Lock()

# Builds what measures a backbone on labelled images, from the images and the size of views.
MonitorBuilder = Callable[[ImageData, int], Monitor | None]


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

    def train(self, monitor: MonitorBuilder | None = None, *, progress: bool = True) -> None:
        """Draw the first views, train to the last epoch, and draw the metrics; see `pretrain`."""
        self.draw_views()
        measure = monitor(self.data, self.run.config.image_size) if monitor else None
        train(self.run, monitor=measure, progress=progress)
        self.draw_curves()

    def draw_views(self) -> None:
        """Draw what the first steps see, in one of the processes."""
        if self.run.accelerator.is_main_process:
            save_figure(figure_views(*first_views(self.run)), self.run.out / "views.png")

    def draw_curves(self) -> None:
        """Draw the run's metrics, in one of the processes."""
        run, title = self.run, short_path(self.run.out.resolve())
        if run.accelerator.is_main_process:
            figure = figure_curves(run.rows, title=title, queue_steps=_count_queue_steps(run))
            save_figure(figure, run.out / "curves.png")


@dataclass(frozen=True)
class _Plan:
    """What a run is to be, before its images are loaded."""

    config: RunConfig  # Checked; its run completes it.
    folder: Path | None  # Of the process that chooses it.
    content: Options = field(default_factory=dict)  # Of the `config.json` of the run that goes on.
    notes: tuple[str, ...] = ()
    listing: DataListing | None = None  # Of the images of a new run, where they chose its options.


def pretrain(
    *,
    config: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    monitor: MonitorBuilder | None = None,
    progress: bool = True,
    **options: object,
) -> Pretrained:
    """Train a backbone from Python or a notebook, as `mixmask pretrain` does.

    Args:
        config: A YAML or JSON file of options, such as another run's `config.json`.
        out: The run folder to create. Default: runs/DATA-METHOD-MIX.
        resume: A run folder to continue. Of the options, `epochs` and `data` may be given with
            it, and with `out` a copy of the run goes on.
        device: "cpu", "cuda:1", "mps". Default: a GPU where there is one.
        threads: CPU threads of the run; the caller's number is set again after it. Default: that.
        monitor: Builds what measures the backbone on labelled images, such as
            `mixmask.evaluation.monitor.accuracy_monitor`, from the images and the size of views.
        progress: Show a progress bar.
        **options: Those of the command line, with underscores: `data="photos"`, `epochs=20`.
            Paths may be `Path` objects. `data` may be a map-style data set, or what a function
            behind `--data package.module:function` returns; it is given again to resume.

    Raises:
        TypeError: If an option has another type.
        ValueError: If an option is unknown or out of its range, images are missing or others than
            those of the run, or `out` holds something.
        RuntimeError: If another run is open in this process.
        FloatingPointError: If the loss is no longer finite or the run has collapsed.
        OSError: If images cannot be read, a worker or another process has died, or there is no
            room for the checkpoint; the one before is kept.
        KeyboardInterrupt: If the run was interrupted by SIGINT, SIGTERM or SIGHUP, once its step
            is saved.

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
    options = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in options.items()
    }
    data = options.get("data")
    if not isinstance(data, str | None):
        options["data"] = f"<{type(data).__name__}>"
    opening = open_run(
        options, config=config, out=out, resume=resume, device=device,
        data=None if isinstance(data, str) else data,
    )  # fmt: skip
    with ExitStack() as held:
        held.callback(torch.set_num_threads, torch.get_num_threads())
        set_threads(threads)
        opened = held.enter_context(opening)
        run = opened.run
        for note in opened.notes if run.accelerator.is_main_process else ():
            warnings.warn(note, stacklevel=2)
        opened.train(monitor, progress=progress)
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
    data: object = None,
) -> Iterator[Opened]:
    """Open a run, in all processes alike; see `pretrain`.

    `data` is a data set that has no name by which it could be loaded.

    If what is done with it fails before the first checkpoint, its folder is removed again.
    """
    source = None if resume is None else Path(resume)
    target = None if out is None else Path(out)
    with interruptible(), ExitStack() as held:
        if not _ONE_RUN.acquire(blocking=False):
            raise RuntimeError(
                "another run is open in this process, whose random numbers they would share; "
                "wait for its end, or start a process for each"
            )
        held.callback(_ONE_RUN.release)
        state = start_processes(device)

        def plan() -> _Plan:
            if source is None:
                return _plan_new(options, config, target, data, choose=state.is_main_process)
            forbidden = [flag(name) for name in options if name not in CHANGEABLE]
            forbidden += ["--config"] if config else []
            check_resume(source, forbidden, allowed=_ALLOWED)
            return _plan_resumed(options, source, target, state.num_processes)

        # Every process plans for itself, so that all of them stop where one refuses.
        planned = call_together(plan)
        agree(
            {"version": __version__, "resume": resume}
            | {n: v for n, v in dataclasses.asdict(planned.config).items() if n not in _OWN}
        )
        folder = gather_objects(planned.folder)[0]  # One process chooses it for all.
        where = str(source or folder)
        images = call_together(lambda: _load_images(planned, planned.listing or data, where))
        fingerprint = images.fingerprint()
        agree({f"{name} of the data": value for name, value in fingerprint.items()})
        if state.is_main_process:
            _warn_queue(planned.config, len(images.train.images))
        call_together(lambda: held.enter_context(claim_folder(folder)))
        run = Run.open(
            planned.config, images.train, folder, resume=source, facts={"fingerprint": fingerprint}
        )
        notes = planned.notes
        if (before := planned.content.get("epochs", run.config.epochs)) != run.config.epochs:
            notes = (*notes, _describe_length(run, before))
        yield Opened(run, images, notes)
    state.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # The next run may have another device.


# Any: `list_data` checks what users give.
def _plan_new(
    options: Options, file: str | Path | None, out: Path | None, data_set: Any, *, choose: bool
) -> _Plan:
    """Take options from a file and from the caller, who has the last word."""
    given = (read_options_file(Path(file), options) if file else {}) | options
    name, listing = given.get("data"), None
    if name and isinstance(name, str) and "recipe" not in given and name not in (*PRESETS, *NAMED):
        listing = list_data(name if data_set is None else data_set)
        given = suit_images(given, listing)
    config = make_config(**given)
    data = Path(config.data).resolve()
    folder = (
        new_folder(out, f"{data.name.strip('<>')}-{config.method}-{config.mix}") if choose else None
    )
    if folder:
        _check_outside(folder, config.data)
    return _Plan(config, folder, listing=listing)


def _check_outside(folder: Path, data: str) -> None:
    """Check that a run folder does not lie inside of its data."""
    root = Path(data).resolve()
    if root.is_dir() and folder.resolve().is_relative_to(root):
        raise ValueError(
            f"the run folder {folder} lies inside of the data, {data}, so that its pictures would "
            "become images; choose an --out elsewhere"
        )


def _plan_resumed(options: Options, source: Path, out: Path | None, processes: int) -> _Plan:
    """Take the options of a run that goes on, with what may change."""
    recorded, content = read_run(source)
    if "data" not in options:
        check_code(recorded.data, source)
    config, notes = replace(recorded, **options), []
    if config.epochs < recorded.epochs:
        raise ValueError(
            f"--epochs must be at least the {recorded.epochs} of {source}, got {config.epochs}; "
            "leave it out"
        )
    if config.data != recorded.data:
        notes.append(f"the images are read from {config.data} now: all else stays exact")
    if out is not None and out != source:
        out = new_folder(out, out.name)
        _check_outside(out, config.data)
        notes.append(f"{source} stays as it is; {out} goes on from its last checkpoint, exactly")
    before = content.get("processes", processes)
    if before != processes:
        config = _spread(config, before, processes)
        notes.append(
            f"{plural(processes, 'process')} instead of {before}: each step takes the same images "
            f"({config.batch_size} per process) at the same learning rate; views, masks and the "
            "statistics of batch norm differ, so the weights are not those of an unchanged run"
        )
    return _Plan(config, out or source, content, tuple(notes))


def _load_images(planned: _Plan, data: object, where: str) -> ImageData:
    """Load a run's images; where a run goes on, they must be those that it was started on."""
    config = planned.config
    recorded = {**planned.content, "data": config.data, "holdout": config.holdout}
    return load_images(recorded, config.image_size, data=data, stream=config.stream, where=where)


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


def _describe_length(run: Run, before: int) -> str:
    """Say what stays exact in a run that is longer than before, and what cannot."""
    now = run.config.epochs
    rates = [
        learning_rate(run.config, min(1.0, run.step / (run.steps * epochs)))
        for epochs in (now, before)
    ]
    return (
        f"{now} epochs instead of {before}: weights, images, views and masks go on exactly; the "
        f"schedules are those of the longer run from here on (learning rate {rates[0]:.3g} instead "
        f"of {rates[1]:.3g}), so the weights will not be those of a run that was as long from the "
        "start"
    )


def _count_queue_steps(run: Run) -> int:
    """Count the steps until keys have replaced all of a queue's random ones; 0 without a queue."""
    views = 1 + bool(getattr(run.config, "symmetric", False))  # That are keys.
    keys: int = run.config.batch_size * run.accelerator.num_processes * views
    return math.ceil(int(getattr(run.config, "queue_size", 0)) / keys)


def _warn_queue(config: RunConfig, count: int) -> None:
    """Warn of a queue in which each image has several keys, which would be its own negatives."""
    size = getattr(config, "queue_size", 0)
    if size > count >= config.batch_size:  # A batch above them all is refused.
        better = suit_queue(count, config.batch_size)
        warnings.warn(
            f"--queue-size {size} is more than the {plural(count, 'training image')}, so that an "
            f"image meets its own past keys as negatives; --queue-size {better} suits them",
            stacklevel=2,
        )
