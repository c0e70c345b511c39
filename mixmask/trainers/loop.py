"""The loop that trains a method: views, terms, optimiser, checkpoints, metrics."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from mixmask._seeds import fold_seed, step_generator
from mixmask.data.resources import memory_gib
from mixmask.data.sets import Images
from mixmask.data.stream import Batches, Draw, read_batches
from mixmask.runs.folder import LAST, Row, write_config, write_rows
from mixmask.runs.schedules import cosine_decay, step_decay
from mixmask.trainers.config import RunConfig
from mixmask.trainers.meter import Meter
from mixmask.trainers.methods import Method
from mixmask.trainers.mixtures import Term, build_mixtures
from mixmask.trainers.run import Run, random_view

# Embeddings with less spread than this are one point, from which no loss recovers.
_COLLAPSED = 0.02

# Steps between two checks whether another process was asked to stop, which wait for the device.
_ASK_EVERY = 10

# Measures a backbone; the flag asks for all accuracies, as before and after a run.
Monitor = Callable[[nn.Module, bool], Row]


@dataclass
class FirstViews:
    """Views of a few images as the network sees them: (n, 3, S, S) normalised, on the CPU."""

    query: Tensor
    mixed: list[Tensor]
    key: Tensor


def pretrain(
    config: RunConfig,
    images: Images,
    out: Path,
    *,
    monitor: Monitor | None = None,
    on_start: Callable[[], None] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[Method, list[Row]]:
    """Train a method on images, leaving `config.json`, `metrics.csv` and `last.pt` in the folder.

    Every step's randomness follows from (seed, rank, step), so a run that was stopped and
    resumed ends in the same weights as one that was not. On SIGINT or SIGTERM the step is
    finished and saved first.

    Args:
        config: The run's options.
        images: (N, 3, H, W) uint8, N of at least the batch size; or a folder's, which workers
            read.
        out: The run folder, made if need be.
        monitor: Measures the backbone before, every `config.measure_every` epochs, and at the end.
        on_start: Called once the options are checked and the folder exists.
        resume: Go on from the newest whole checkpoint in `out`.
        progress: Show a progress bar.

    Returns:
        The trained method and the rows of `metrics.csv`.

    Raises:
        ValueError: If the images are fewer than a batch, or there is nothing to resume.
        FloatingPointError: If the loss is no longer finite or the run has collapsed; the last
            checkpoint is kept.
        OSError: If a folder's images can no longer be read or a worker has died, once the steps
            before are saved.
        KeyboardInterrupt: If the run was interrupted, once it is saved.
    """
    config = replace(config, channels=images.shape[1])
    run = Run.build(config, images, out)
    main = run.accelerator.is_main_process
    if resume:
        run.load()
    elif main:
        out.mkdir(parents=True, exist_ok=True)
        write_config(out, asdict(config))
    if on_start and main:
        on_start()
    if config.tracker != "none":
        options = {k: v for k, v in asdict(config).items() if not isinstance(v, tuple)}
        # Otherwise Weights & Biases writes where the command was started.
        where = {"wandb": {"dir": str(out)}}
        run.accelerator.init_trackers("mixmask", config=options, init_kwargs=where)
    if monitor and main and not resume:
        run.rows.append({"epoch": 0, "step": 0, **monitor(run.model.backbone, True)})
        write_rows(out, run.rows)

    total = run.steps * config.epochs
    bar = tqdm(total=total, initial=run.step, unit="step", disable=not (progress and main))
    reading = closing(_batches(run))
    with bar, reading as batches, _finish_steps(run.accelerator) as stop_requested:
        for epoch in range(run.step // run.steps + 1, config.epochs + 1):
            row = _train_epoch(run, epoch, batches, bar, stop_requested)
            _check_health(run, row)
            last = epoch == config.epochs
            due = last or (config.measure_every > 0 and epoch % config.measure_every == 0)
            if monitor and due and main:
                row.update(monitor(run.model.backbone, last))
            run.rows.append(row)
            run.accelerator.log(row, step=run.step)
            run.save()
            if stop_requested() and not last:
                raise KeyboardInterrupt
    for tracker in run.accelerator.trackers:  # end_training() would end the processes' group too.
        tracker.finish()
    return run.model, run.rows


def _check_health(run: Run, row: Row) -> None:
    """Stop a run that cannot recover, before its state replaces the last good checkpoint."""
    epoch, kept = int(row["epoch"]), f"{run.out / LAST} holds the epoch before"
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(
            f"the loss became {row['loss']} in epoch {epoch}; {kept}: lower --lr, or use "
            "--precision fp32"
        )
    if row.get("spread", 1.0) < _COLLAPSED:
        raise FloatingPointError(
            f"the run has collapsed: in epoch {epoch} all images had about the same embedding "
            f"(spread {row['spread']:.3g}, 1 is a whole sphere); {kept}: lower --lr, or raise "
            "--batch-size"
        )


def _train_epoch(
    run: Run, epoch: int, batches: Batches, bar: Any, stop_requested: Callable[[], bool]
) -> Row:
    """Train one epoch, or what a resumed run has left of it, and return its row."""
    config, model, accelerator = run.config, run.model, run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    meter = run.meter
    meter.start(config.batch_size * processes)
    lr = 0.0
    model.train()
    for i in range(run.step % run.steps, run.steps):
        batch = _next_batch(run, batches)  # (crops * N, 3, H, W) uint8
        # CUDA graphs may reuse the memory of the step before, but not of this one.
        torch.compiler.cudagraph_mark_step_begin()

        # The step's draws come from this generator; torch's global one is for networks with
        # draws of their own (dropout, stochastic depth).
        generator = step_generator(config.seed, rank, run.step)
        torch.manual_seed(fold_seed(config.seed, rank, run.step, "network"))
        views = run.view(batch, generator=generator).chunk(_crops(config, run.step))
        mix = _is_mixed(config, run.step)
        parts = config.accumulate
        # Each view: (N / parts, 3, S, S).
        for part, (x1, x2, *extra) in enumerate(zip(*(v.chunk(parts) for v in views), strict=True)):
            terms = model.terms(x1, x2, generator, extra=extra, mix=mix)
            for number, term in enumerate(_autocast(accelerator, terms)):
                accelerator.backward(term.loss / parts)
                meter.add(term, 1 / parts)
                if term.pair and part == number == 0:
                    meter.look(term.pair)
        _average_gradients(accelerator, model.parameters())
        lr = learning_rate(config, run.step / (run.steps * config.epochs))
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr if group["constant_lr"] else lr
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        model.after_step(run.step / (run.steps * config.epochs))

        meter.steps += 1
        bar.update()
        if meter.steps % 10 == 0 or i + 1 == run.steps:
            bar.set_postfix_str(meter.summary())
        ask = processes == 1 or run.step % _ASK_EVERY == 0
        if ask and stop_requested() and i + 1 < run.steps:
            run.save()
            raise KeyboardInterrupt
    run.meter = Meter()
    row = meter.row() | {"memory_gib": memory_gib(accelerator.device)}
    return {"epoch": epoch, "step": run.step, **_average(accelerator, row), "lr": lr}


def _batches(run: Run) -> Batches:
    """Read what each step that is left takes: this process's part of the epoch's order."""
    config, accelerator = run.config, run.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes

    def draws(first: int) -> Iterator[Draw]:
        order = torch.empty(0)
        for step in range(first, run.steps * config.epochs):
            epoch, i = divmod(step, run.steps)
            if i == 0 or step == first:
                order = _epoch_order(config.seed, epoch + 1, len(run.images))
                if isinstance(run.images, Tensor):  # Copied once per epoch, not per step.
                    order = order.to(run.images.device)
            start = (i * processes + rank) * config.batch_size
            seed = fold_seed(config.seed, rank, step, "crops")
            index = order[start : start + config.batch_size]
            yield Draw(index, _crops(config, step), seed)

    return read_batches(
        run.images,
        draws(run.step),
        size=config.image_size,
        min_scale=config.min_scale,
        workers=run.workers,
        device=accelerator.device,
    )


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
        run.save()  # Between two steps, where everything is consistent.
        raise OSError(f"{error}; all steps before are saved: --resume {run.out}") from error
    run.meter.waited += time.perf_counter() - began
    return batch


def first_views(config: RunConfig, images: Images, count: int = 8) -> FirstViews:
    """Draw what a step sees: views for queries, mixed views, and views for keys.

    Args:
        config: The run's options.
        images: (N, 3, H, W) uint8, or a folder's.
        count: How many images, if there are so many.
    """
    seed = fold_seed(config.seed, "picture")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    index = order[:count]
    if isinstance(images, Tensor):
        images, index = images[index].cpu(), torch.arange(len(index))
    reading = read_batches(
        images,
        [Draw(index, 2, seed)],
        size=config.image_size,
        min_scale=config.min_scale,
        workers=0,
        device=torch.device("cpu"),
    )
    with closing(reading):
        batch = next(reading)
    generator = torch.Generator().manual_seed(seed)
    x_q, x_k = random_view(config, images)(batch, generator=generator).chunk(2)
    mixed = [mix(x_q, generator).images for mix in build_mixtures(config)]
    return FirstViews(x_q, mixed, x_k)


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
        return config.lr * step_decay(done, (0.6, 0.8))
    done = (done - config.warmup) / (1 - config.warmup) if config.warmup < 1 else done
    return config.lr * cosine_decay(done)


def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=step_generator(seed, "order", epoch))


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


def _average(accelerator: Accelerator, row: Row) -> Row:
    """Average what the processes have measured, so that all of them judge a run alike."""
    if accelerator.num_processes == 1:
        return row
    values = torch.tensor(list(row.values()), device=accelerator.device)
    return dict(zip(row, accelerator.reduce(values, reduction="mean").tolist(), strict=True))


def _any_process(accelerator: Accelerator, asked: bool) -> bool:
    """Return whether any process was asked to stop: all must stop at the same step."""
    if accelerator.num_processes == 1:
        return asked
    flag = torch.tensor(float(asked), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


@contextmanager
def _finish_steps(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to stop; a second one acts as usual."""
    requested = False
    previous: dict[signal.Signals, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        del frame
        requested = True
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:  # Not in the main thread, where signals never arrive.
        previous.clear()
    try:
        yield lambda: _any_process(accelerator, requested)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
