"""`mixmask evaluate knn | linear | finetune`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixmask import evaluation
from mixmask.cli._console import say
from mixmask.cli.options import SOURCE, add_fields, add_shared, results_folder
from mixmask.evaluation import KNN, FineTuning, Linear, LinearSGD, Protocol, Result
from mixmask.evaluation.metrics import INTERVAL, Interval
from mixmask.runs.files import check_files, make_folder
from mixmask.runs.options import flag
from mixmask.runs.records import plural

# What chooses the task, not the protocol.
_LOADED = ("data", "image_size", "arch", "small_stem", "mean", "std", "device")


def evaluate(
    choose: Callable[..., Protocol],
    run: Path,
    out: Path | None = None,
    force: bool = False,
    **given: Any,
) -> None:
    """Measure a run's backbone by one protocol, and leave its results as JSON and PNG."""
    folder = out or results_folder(run)
    source = {name: given.pop(name) for name in _LOADED if name in given}
    protocol = choose(**given)
    task = evaluation.load_task(run, **source)
    # Results that may not be replaced or written are refused before hours of work, not after.
    path = evaluation.results_file(protocol, task.sources[0], folder, force=force)
    make_folder(folder)
    check_files(path, path.with_suffix(".png"), force=True)
    say(
        f"{task.sources[0].arch} of {task.sources[0].title} on {task.sources[0].data}: "
        f"{plural(len(task.train.images), 'image')} to train, {len(task.test.images):,} to test, "
        f"{plural(len(task.classes), 'class')}, {task.device}"
    )
    if isinstance(protocol, FineTuning):
        index, subset = protocol.subset(task)
        batch = min(protocol.batch_of(len(index)), len(index))
        images = plural(len(index), "image")
        say(f"fine-tuning on {images} ({subset}, seed {protocol.seed}), batches of {batch}")
    result = evaluation.evaluate(task, protocol, progress=True)
    written = result.write(folder, force=force)
    _say_result(result)
    say(f"see {written} and .png")


def _say_result(result: Result) -> None:
    accuracy, details = result.accuracy, result.details
    ends = accuracy.intervals()
    say(f"{'share of test images':<22}{'right':>7}  interval ({INTERVAL})")
    if "frozen_top1" in details:
        _say_row("frozen, linear probe", details["frozen_top1"], details["frozen_interval"])
    _say_row("top-1", accuracy.top1, ends["top1"])
    if accuracy.top5 is not None:
        _say_row("top-5", accuracy.top5, ends["top5"])
    shares = zip(accuracy.per_class.tolist(), result.classes, strict=True)
    # NaN: a class without test images has no accuracy.
    measured = sorted(each for each in shares if not math.isnan(each[0]))
    share, name = measured[0]
    # Where all classes are alike, none is the worst.
    worst = f"; worst: {name}, {share:.1%}" if share < measured[-1][0] else ""
    _say_row("mean over classes", accuracy.mean_class, ends["mean_class"], worst)


def _say_row(what: str, share: float, interval: Interval, more: str = "") -> None:
    say(f"{what:<22}{share:>7.1%}  {interval[0]:.1%} ... {interval[1]:.1%}{more}")


def _choose_linear(protocol: str = "lbfgs", **given: Any) -> Protocol:
    if protocol == "sgd":
        return LinearSGD(**given)
    for name in given:
        if name != "seed":
            raise ValueError(
                f"{flag(name)} belongs to --protocol sgd; add that, or leave {flag(name)} out"
            )
    return Linear(**given)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the three protocols of `evaluate`."""
    parser.description = (
        "Measure a trained backbone on labelled images, by nearest neighbours, a linear probe, or "
        "fine-tuning. Results go to evaluate-*.json and .png in the run's folder, "
        "named by protocol, options and data."
    )
    protocols = parser.add_subparsers(required=True, metavar="PROTOCOL")

    def add(name: str, choose: Callable[..., Protocol], text: str) -> argparse.ArgumentParser:
        protocol = protocols.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        protocol.set_defaults(command=evaluate, choose=choose)
        add_shared(protocol, "run", *SOURCE)
        add_shared(protocol, "--out", metavar="DIR", help="folder for the results [beside the run]")
        add_shared(protocol, "--force", help="overwrite existing results")
        return protocol

    knn = add("knn", KNN, "weighted nearest neighbours on frozen features")
    add_fields(knn, dataclasses.fields(KNN))
    linear = add("linear", _choose_linear, "a linear probe on the frozen backbone")
    linear.add_argument(
        "--protocol",
        choices=("lbfgs", "sgd"),
        help="lbfgs: logistic regression on features of whole images, its penalty chosen on a "
        "fifth of the training images; sgd: random crops, which is MoCo's protocol [lbfgs]",
    )
    sgd_only = dict.fromkeys(("epochs", "batch_size", "lr"), ("sgd",))
    add_fields(linear, dataclasses.fields(LinearSGD), owners=sgd_only)
    text = "train backbone and head on labels; with --percent, SimCLR's semi-supervised protocol"
    tune = add("finetune", FineTuning, text)
    add_fields(tune, dataclasses.fields(FineTuning))
