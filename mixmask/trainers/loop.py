"""The loop that trains a method: views, terms, optimiser, checkpoints, metrics."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixmask._seeds import fold_seed, step_generator
from mixmask._signals import at_first_signal
from mixmask.data.resources import memory_gib
from mixmask.data.sets import Images, Split
from mixmask.data.stream import Batches, Draw, read_batches
from mixmask.mixing import MixedBatch
from mixmask.runs.claim import claim_folder
from mixmask.runs.files import LAST
from mixmask.runs.folder import Row, has_checkpoint, write_rows
from mixmask.runs.schedules import cosine_decay, step_decay
from mixmask.trainers.config import RunConfig
from mixmask.trainers.meter import Meter
from mixmask.trainers.mixtures import Method, Term, resize_views
from mixmask.trainers.processes import report_lost_processes
from mixmask.trainers.run import Run

# Embeddings with less spread than this are one point, from which no loss recovers.
_COLLAPSED = 0.02

# Steps between two checks whether another process was asked to stop or has to save, which wait for
# the device.
_ASK_EVERY = 10

# Measures a backbone; the flag asks for all accuracies, as before and after a run.
Monitor = Callable[[nn.Module, bool], Row]


class _Requests(NamedTuple):
    """What all processes are to do after a step."""

    stop: bool = False
    save: bool = False


class FirstViews(NamedTuple):
    """A few images, and their views (n, 3, S, S) as the network sees them, on the CPU."""

    images: Tensor  # (n, 3, H, W) uint8.
    query: Tensor
    mixed: list[list[MixedBatch]]  # Per mixture, n draws, since a step's batch may share one mask.
    key: Tensor


def train_method(
    config: RunConfig,
    images: Images,
    out: Path,
    *,
    monitor: Monitor | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[Method, list[Row]]:
    """Train a method on images in memory or on disk; `mixmask.trainers.pretrain` loads them too.

    Every step's randomness follows from (seed, rank, step), so a run that was stopped and
    resumed ends in the same weights as one that was not. On SIGINT, SIGTERM or SIGHUP the step is
    finished and saved first.

    Args:
        config: The run's options.
        images: (N, C, H, W) uint8, N of at least the batch size; or stored ones.
        out: The run folder, made if need be.
        monitor: Measures the backbone before, every `config.measure_every` epochs, and at the end.
        resume: Go on from the newest whole checkpoint in `out`.
        progress: Show a progress bar.

    Returns:
        The trained method and the rows of `metrics.csv`.

    Raises:
        ValueError: If the images are fewer than a batch, or there is nothing to resume.
        FloatingPointError, OSError, KeyboardInterrupt: See `mixmask.trainers.pretrain`.
    """
    with claim_folder(out):
        run = Run.open(config, Split(images), out, resume=out if resume else None)
        train(run, monitor=monitor, progress=progress)
    return run.model, run.rows


def train(run: Run, *, monitor: Monitor | None = None, progress: bool = True) -> None:
    """Train a run from where it stands to its last epoch; see `train_method`."""
    with report_lost_processes(run.out):
        _train(run, monitor=monitor, progress=progress)


def _train(run: Run, *, monitor: Monitor | None, progress: bool) -> None:
    config, main = run.config, run.accelerator.is_main_process
    if monitor and main and run.step == 0:  # What the trained backbone is compared with.
        run.rows = [{"epoch": 0, "step": 0, **_measure(monitor, run, True)}]
        write_rows(run.out, run.rows)
    total = run.steps * config.epochs
    shown = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"
    bar = tqdm(
        total=total, initial=run.step, unit="step", bar_format=shown,
        disable=not (progress and main),
    )  # fmt: skip
    reading = closing(_batches(run))
    # However the loop ends, the reader is closed: its workers do not end by themselves.
    with bar, reading as batches, _finish_steps(run) as ask:
        for epoch in range(run.step // run.steps + 1, config.epochs + 1):
            row = _train_epoch(run, epoch, batches, bar, ask)
            last = epoch == config.epochs
            due = last or (config.measure_every > 0 and epoch % config.measure_every == 0)
            # One process measures, and the others wait for it in `save`.
            if monitor and due and main:
                row.update(_measure(monitor, run, last))
            run.rows.append(row)
            run.accelerator.log(row, step=run.step)
            run.save(epoch_ends=True)
            if ask().stop and not last:
                raise KeyboardInterrupt
    for tracker in run.accelerator.trackers:  # end_training() would end the processes' group too.
        tracker.finish()


def _measure(monitor: Monitor, run: Run, thorough: bool) -> Row:
    """Return what a monitor measures, as plain numbers, which checkpoints can hold."""
    measured = monitor(run.model.backbone, thorough)
    try:
        row = {name: float(value) for name, value in measured.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"monitor must return numbers by their names, got {measured!r}") from error
    own = {"epoch", "step", "lr", "memory_gib", *Meter(looks=1, seconds=1.0).row()}
    if taken := sorted(own & set(row)):
        raise ValueError(
            f"monitor must not return {', '.join(taken)}, which the run measures itself; use "
            "another name"
        )
    if odd := [name for name, value in row.items() if not math.isfinite(value)]:
        # Not an error: the epoch that has been trained would be lost.
        warnings.warn(f"monitor returned {row}; {', '.join(odd)} is left out", stacklevel=2)
    return {name: value for name, value in row.items() if name not in odd}


def _measure_epoch(run: Run, epoch: int) -> Row:
    """Return the row of an epoch so far, and stop a run that cannot recover.

    Its state does not replace the last good checkpoint.
    """
    # Means over the processes, so that all of them decide alike below.
    row = run.meter.row() | {"memory_gib": memory_gib(run.accelerator.device)}
    means = zip(row, _reduce(run.accelerator, row.values(), "mean"), strict=True)
    row = {"epoch": epoch, "step": run.step, **dict(means)}
    config = run.config
    kept = f"{run.out / LAST} holds the last good step: " if has_checkpoint(run.out) else ""
    if not math.isfinite(row["loss"]):
        fix = "" if config.precision == "fp32" else ", or use --precision fp32"
        raise FloatingPointError(
            f"the loss became {row['loss']} in epoch {epoch}; {kept}lower --lr{fix}"
        )
    if row.get("spread", 1.0) < _COLLAPSED:
        raise FloatingPointError(
            f"the run has collapsed: in epoch {epoch} all images had about the same embedding "
            f"(spread {row['spread']:.3g}, 1 is a whole sphere); {kept}lower --lr, or raise "
            "--batch-size"
        )
    return row


def _train_epoch(
    run: Run, epoch: int, batches: Batches, bar: tqdm[NoReturn], ask: Callable[[], _Requests]
) -> Row:
    """Train one epoch, or what a resumed run has left of it, and return its row."""
    accelerator, meter = run.accelerator, run.meter
    processes = accelerator.num_processes
    meter.start(run.config.batch_size * processes)
    lr = 0.0
    run.model.train()
    for i in range(run.step % run.steps, run.steps):  # A resumed run may begin in the middle.
        batch = _next_batch(run, batches)  # (crops * N, 3, H, W) uint8
        lr = _train_step(run, batch)
        bar.update()
        if meter.steps % 10 == 0 or i + 1 == run.steps:
            bar.set_postfix_str(meter.summary())
        # All processes ask, and save, at the same steps.
        asked = ask() if processes == 1 or run.step % _ASK_EVERY == 0 else _Requests()
        due = run.config.save_every > 0 and run.step % run.config.save_every == 0
        if (due or any(asked)) and i + 1 < run.steps:
            _measure_epoch(run, epoch)
            run.save()
            if asked.stop:
                raise KeyboardInterrupt
    row = _measure_epoch(run, epoch)
    run.meter = Meter()
    return row | {"lr": lr}


def _train_step(run: Run, batch: Tensor) -> float:
    """Draw views of a batch, train on each term of the loss, and return the learning rate."""
    config, model, accelerator = run.config, run.model, run.accelerator
    rank, total = accelerator.process_index, run.steps * config.epochs
    # CUDA graphs may reuse the memory of the step before, but not of this one. Saying so imports
    # torch's compiler, which takes seconds.
    if config.compile:
        torch.compiler.cudagraph_mark_step_begin()

    # The step's draws come from this generator; torch's global one is for networks with draws of
    # their own (dropout, stochastic depth).
    generator = step_generator(config.seed, rank, run.step)
    torch.manual_seed(fold_seed(config.seed, rank, run.step, "network"))
    # (crops * N, 3, S, S) -> (N, 3, S, S) each
    views = run.view(batch, generator=generator).chunk(_crops(config, run.step))
    mix = _is_mixed(config, run.step)
    parts = config.accumulate
    # Each view: (N / parts, 3, S, S).
    for part, (x1, x2, *extra) in enumerate(zip(*(v.chunk(parts) for v in views), strict=True)):
        terms = model.terms(x1, x2, generator, extra=extra, mix=mix)
        for number, term in enumerate(_autocast(accelerator, terms)):
            # This frees the term's graph, before the next one is computed.
            accelerator.backward(term.loss / parts)
            run.meter.add(term, 1 / parts)
            if term.pair and part == number == 0:
                run.meter.look(term.pair)
    # Not by DDP's hooks, which would reduce in each term's backward pass.
    _average_gradients(accelerator, model.parameters())
    lr = learning_rate(config, run.step / total)
    for group in run.optimizer.param_groups:
        group["lr"] = config.lr if group["constant_lr"] else lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    run.meter.steps += 1
    model.after_step(run.step / total)
    return lr


def _batches(run: Run) -> Batches:
    """Read what each step that is left takes: this process's part of the epoch's order."""
    config, accelerator = run.config, run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes

    def draws(first: int) -> Iterator[Draw]:
        order = torch.empty(0)
        for step in range(first, run.steps * config.epochs):
            epoch, i = divmod(step, run.steps)
            if i == 0 or step == first:
                shuffle = step_generator(config.seed, "order", epoch + 1)
                order = torch.randperm(len(run.images), generator=shuffle)
                order = _beside(run.images, order)  # Copied once per epoch, not per step.
            # Processes take neighbouring parts of one order, so that an epoch repeats no image.
            start = (i * processes + rank) * config.batch_size
            seed = fold_seed(config.seed, rank, step, "crops")
            yield Draw(order[start : start + config.batch_size], _crops(config, step), seed)

    return read_batches(
        run.images,
        draws(run.step),
        size=config.image_size,
        min_scale=config.min_scale,
        workers=run.workers,
        device=accelerator.device,
    )


def _beside(images: Images, index: Tensor) -> Tensor:
    return index.to(images.device) if isinstance(images, Tensor) else index


def _is_mixed(config: RunConfig, step: int) -> bool:
    return step % config.mix_every == 0


def _crops(config: RunConfig, step: int) -> int:
    """Return the number of views per image in a step."""
    return 2 + (config.extra_crops if _is_mixed(config, step) else 0)


def _next_batch(run: Run, batches: Batches) -> Tensor:
    """Wait for a batch, and measure for how long."""
    began = time.perf_counter()
    try:
        batch = next(batches)
    except OSError as error:
        saved = "the steps since the last checkpoint are lost"
        if run.accelerator.num_processes == 1:  # Others cannot know that they are to save, too.
            run.save()  # Between two steps, where everything is consistent.
            saved = "all steps before are saved"
        raise OSError(f"{error}; {saved}: --resume {run.out}") from error
    run.meter.waited += time.perf_counter() - began
    return batch


def first_views(run: Run, count: int = 8) -> FirstViews:
    """Draw what a step sees of a few images, if there are so many."""
    config, seed = run.config, fold_seed(run.config.seed, "picture")
    order = torch.randperm(len(run.images), generator=torch.Generator().manual_seed(seed))
    index = _beside(run.images, order[:count])
    reading = read_batches(
        run.images,
        [Draw(index, 2, seed)],
        size=config.image_size,
        min_scale=config.min_scale,
        workers=0,
        device=run.accelerator.device,
    )
    with closing(reading):
        batch = next(reading)  # (2 * count, 3, H, W) uint8
    generator = torch.Generator().manual_seed(seed)
    x_q, x_k = run.view(batch, generator=generator).chunk(2)  # (count, 3, S, S) each
    x_m = resize_views(x_q, config.mixed_size)  # (count, 3, s, s)
    mixed = [[mix(x_m, generator).to("cpu") for _ in index] for mix in run.model.mixtures]
    return FirstViews(run.images[index].cpu(), x_q.cpu(), mixed, x_k.cpu())


def learning_rate(config: RunConfig, done: float) -> float:
    """Return the learning rate after a share `done`, 0 ... 1, of the run.

    Example:
        >>> from mixmask.trainers.config import RunConfig
        >>> round(learning_rate(RunConfig(lr=0.1), 0.5), 3)
        0.05
    """
    if done < config.warmup:
        return config.lr * done / config.warmup
    if config.schedule == "step":
        return config.lr * step_decay(done)
    done = (done - config.warmup) / (1 - config.warmup) if config.warmup < 1 else done
    return config.lr * cosine_decay(done)


def _autocast(accelerator: Accelerator, terms: Iterator[Term]) -> Iterator[Term]:
    """Compute each term in the run's precision, and yield it outside of autocast."""
    while True:
        with accelerator.autocast():
            term = next(terms, None)
        if term is None:
            return
        yield term


def _average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Average the summed gradients over processes, once per step, however many terms it has."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")


def _reduce(accelerator: Accelerator, values: Iterable[float], how: str) -> list[float]:
    """Reduce numbers over the processes, so that all of them go on alike."""
    if accelerator.num_processes == 1:
        return list(values)
    numbers = torch.tensor([*map(float, values)], device=accelerator.device)
    reduced: list[float] = accelerator.reduce(numbers, reduction=how).tolist()
    return reduced


@contextmanager
def _finish_steps(run: Run) -> Iterator[Callable[[], _Requests]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request to stop; see `at_first_signal`.

    Yields:
        A function that returns the requests of all processes; process 0 requests saves.
    """
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True

    def ask() -> _Requests:
        # The first process' clock decides for all whether `--save-minutes` have passed.
        late = 0 < 60 * run.config.save_minutes <= time.monotonic() - run.saved
        late = late and run.accelerator.is_main_process
        return _Requests(*map(bool, _reduce(run.accelerator, [requested, late], "sum")))

    with at_first_signal(request):
        yield ask
