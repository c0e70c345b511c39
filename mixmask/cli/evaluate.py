"""`mixmask evaluate knn | linear | finetune`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmask.cli._console import say
from mixmask.cli.options import add_fields, add_shared, choose_device
from mixmask.runs.options import flag

if TYPE_CHECKING:
    from collections.abc import Callable

    from mixmask.evaluation import FineTuning, Protocol, Result, Task
    from mixmask.evaluation.metrics import Interval

_SOURCE = ("data", "image_size", "arch", "small_stem")


def evaluate(
    choose: Callable[..., Protocol],
    run: Path,
    out: Path | None = None,
    device: str | None = None,
    force: bool = False,
    **given: Any,
) -> None:
    """Measure a run's backbone by one protocol, and leave its results as JSON and PNG."""
    from mixmask.evaluation import FineTuning, evaluate, load_task, results_file

    if not run.exists():
        raise ValueError(f"RUN must be a run folder or a checkpoint file, got {run}: not found")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got {out}, which is a file; name another")
    source = {name: given.pop(name) for name in _SOURCE if name in given}
    protocol = choose(**given)
    task = load_task(run, device=choose_device(device), **source)
    folder = out or (run if run.is_dir() else run.parent)
    results_file(protocol, task.sources[0], folder, force=force)
    say(
        f"{task.sources[0].arch} of {task.sources[0].title} on {task.sources[0].data}: "
        f"{len(task.train.images):,} images to train, {len(task.test.images):,} to test, "
        f"{len(task.classes)} classes, {task.device}"
    )
    if isinstance(protocol, FineTuning):
        _say_subset(protocol, task)
    result = evaluate(task, protocol, progress=True)
    written = result.write(folder, force=force)
    _say_result(result)
    say(f"see {written} and {written.with_suffix('.png').name}")


def _say_subset(protocol: FineTuning, task: Task) -> None:
    index, subset = protocol.subset(task)
    count = len(index)
    say(
        f"fine-tuning on {count:,} images ({subset}, seed {protocol.seed}), batches of "
        f"{min(protocol.batch_of(count), count)}"
    )


def _say_result(result: Result) -> None:
    from mixmask.evaluation.metrics import INTERVAL

    accuracy, details = result.accuracy, result.details
    ends = accuracy.intervals()
    say(f"{'share of test images':<22}{'right':>7}  interval ({INTERVAL})")
    if "frozen_top1" in details:
        _say_row("frozen, linear probe", details["frozen_top1"], details["frozen_interval"])
    _say_row("top-1", accuracy.top1, ends["top1"])
    if accuracy.top5 is not None:
        _say_row("top-5", accuracy.top5, ends["top5"])
    shares = zip(accuracy.per_class.tolist(), result.classes, strict=True)
    share, name = min(each for each in shares if not math.isnan(each[0]))
    worst = f"; worst: {name}, {share:.1%}"
    _say_row("mean over classes", accuracy.mean_class, ends["mean_class"], worst)


def _say_row(what: str, share: float, interval: Interval, more: str = "") -> None:
    say(f"{what:<22}{share:>7.1%}  {interval[0]:.1%} ... {interval[1]:.1%}{more}")


def _choose_linear(protocol: str = "lbfgs", **given: Any) -> Protocol:
    from mixmask.evaluation import Linear, LinearSGD

    if protocol == "sgd":
        return LinearSGD(**given)
    for name in given:
        if name != "seed":
            raise ValueError(
                f"{flag(name)} belongs to --protocol sgd; add that, or leave {flag(name)} out"
            )
    return Linear(**given)


def add_evaluate(commands: Any) -> None:
    """Add `evaluate` with its three protocols."""
    from mixmask.evaluation import KNN, FineTuning, LinearSGD

    parser = commands.add_parser(
        "evaluate",
        help="measure a backbone",
        description="Measure a trained backbone on labelled images, by nearest neighbours, a "
        "linear probe, or fine-tuning. Results go to evaluate-*.json and .png in the run's folder, "
        "named by protocol, options and data.",
    )
    protocols = parser.add_subparsers(required=True, metavar="PROTOCOL")
    knn = _add_protocol(protocols, "knn", KNN, "weighted nearest neighbours on frozen features")
    add_fields(knn, dataclasses.fields(KNN))
    linear = _add_protocol(
        protocols, "linear", _choose_linear, "a linear probe on the frozen backbone"
    )
    linear.add_argument(
        "--protocol",
        choices=("lbfgs", "sgd"),
        help="lbfgs: logistic regression on features of whole images, its penalty chosen on a "
        "fifth of the training images; sgd: random crops, which is MoCo's protocol [lbfgs]",
    )
    sgd_only = dict.fromkeys(("epochs", "batch_size", "lr"), ("sgd",))
    add_fields(linear, dataclasses.fields(LinearSGD), owners=sgd_only)
    text = "train backbone and head on labels; with --percent, SimCLR's semi-supervised protocol"
    tune = _add_protocol(protocols, "finetune", FineTuning, text)
    add_fields(tune, dataclasses.fields(FineTuning))


def _add_protocol(
    protocols: Any, name: str, choose: Callable[..., Protocol], text: str
) -> argparse.ArgumentParser:
    """Add a protocol with the options that all have."""
    parser: argparse.ArgumentParser = protocols.add_parser(
        name, help=text, description=text, argument_default=argparse.SUPPRESS
    )
    parser.set_defaults(command=evaluate, choose=choose)
    add_shared(parser, "run", *map(flag, _SOURCE), "--device", "--threads")
    add_shared(parser, "--out", metavar="DIR", help="folder for the results [beside the run]")
    parser.add_argument("--force", action="store_true", help="replace other results of that name")
    return parser
