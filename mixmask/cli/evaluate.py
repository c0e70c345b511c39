"""`mixmask evaluate knn | linear | finetune`."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixmask import __version__
from mixmask.cli._console import labelled_splits, say

if TYPE_CHECKING:
    from mixmask.checkpoints.load import Loaded
    from mixmask.data.sets import Images
    from mixmask.evaluation import Accuracy

# A matrix of more classes would fill the JSON; the picture shows it all the same.
_MATRIX_CLASSES = 100
# Where a subset is small, a batch is a tenth of it, so that there are steps enough.
_BATCH, _LEAST_BATCH, _STEPS = 256, 16, 10


@dataclass(frozen=True)
class _Job:
    """A backbone on its device, and the labelled images to measure it with."""

    loaded: Loaded
    data: str
    image_size: int
    classes: tuple[str, ...]
    train: Images
    train_labels: Tensor
    files: tuple[str, ...]
    test: Images
    test_labels: Tensor
    device: torch.device


# Scores of the test images, and what the results say about how they came about.
_Outcome = tuple[Tensor, dict[str, Any]]


def evaluate(
    measure: Callable[..., _Outcome],
    run: Path,
    data: str | None,
    image_size: int | None,
    arch: str | None,
    small_stem: bool | None,
    out: Path | None,
    device: str | None,
    **options: Any,
) -> None:
    """Measure a run's backbone by one protocol, and leave its results as JSON and PNG."""
    from mixmask.evaluation import measure_accuracy

    _check_place(run, out)
    job = _prepare(run, data, image_size, arch, small_stem, device)
    say(
        f"{job.loaded.arch} of {run} on {job.data}: {len(job.train):,} images to train, "
        f"{len(job.test):,} to test, {len(job.classes)} classes, {job.device}"
    )
    began = time.perf_counter()
    scores, told = measure(job, **options)
    measured = measure_accuracy(scores, job.test_labels)
    name = told.pop("name")
    results = {
        "protocol": name,
        "checkpoint": str(run),
        "layout": job.loaded.layout,
        "arch": job.loaded.arch,
        "small_stem": job.loaded.small_stem,
        "data": job.data,
        "image_size": job.image_size,
        "n_test": len(job.test),
        **told,
        "seconds": round(time.perf_counter() - began, 2),
        **_circumstances(job.device),
        **_as_json(measured, job.classes),
    }
    folder = out or (run if run.is_dir() else run.parent)
    written = _write(results, measured, job.classes, folder / f"evaluate-{name}.json")
    _say_results(measured, job.classes, told)
    say(f"see {written} and {written.with_suffix('.png').name}")


def _knn(job: _Job, k: int, temperature: float) -> _Outcome:
    from mixmask.evaluation import extract_features, knn_scores

    _at_least("k", k, 1)
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature must be positive, got {temperature}; use for instance 0.1")
    x, x_test = (extract_features(job.loaded.backbone, i) for i in (job.train, job.test))
    scores = knn_scores(
        x, job.train_labels, x_test, k=k, temperature=temperature, classes=len(job.classes)
    )
    used = {"k": min(k, len(x)), "temperature": temperature}
    return scores, {"name": "knn", "n_train": len(x), "dim": x.shape[1], **used}


def _linear(
    job: _Job,
    protocol: str,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int,
) -> _Outcome:
    from mixmask.evaluation import (
        Training,
        extract_features,
        linear_scores,
        linear_sgd_scores,
    )

    _at_least("seed", seed, 0)
    classes = len(job.classes)
    if protocol == "sgd":
        training = Training(
            epochs=100 if epochs is None else epochs,
            batch_size=_BATCH if batch_size is None else batch_size,
            image_size=job.image_size,
            seed=seed,
            progress=True,
        )
        lr = 30.0 if lr is None else lr
        scores = linear_sgd_scores(
            job.loaded.backbone, job.train, job.train_labels, job.test, training,
            lr=lr, classes=classes,
        )  # fmt: skip
        return scores, {
            "name": "linear-sgd",
            "n_train": len(job.train),
            "epochs": training.epochs,
            "batch_size": training.batch_size,
            "lr": lr,
            "schedule": "a tenth after 60 % and 80 % of the epochs",
            "seed": seed,
        }
    for flag, value in (("--epochs", epochs), ("--batch-size", batch_size), ("--lr", lr)):
        if value is not None:
            raise ValueError(f"{flag} belongs to --protocol sgd; name it, or leave {flag} out")
    x, x_test = (extract_features(job.loaded.backbone, i) for i in (job.train, job.test))
    scores, penalty = linear_scores(x, job.train_labels, x_test, classes=classes, seed=seed)
    told = {"n_train": len(x), "dim": x.shape[1], "penalty": penalty, "seed": seed}
    return scores, {"name": "linear", **told}


def _finetune(
    job: _Job,
    percent: float | None,
    subset_list: Path | None,
    epochs: int,
    batch_size: int | None,
    lr: float,
    head_lr: float,
    seed: int,
) -> _Outcome:
    from mixmask.evaluation import (
        Training,
        extract_features,
        finetune_scores,
        linear_scores,
        measure_accuracy,
    )

    index, subset = _subset(job, percent, subset_list, seed)
    images = job.train[index] if isinstance(job.train, Tensor) else job.train.subset(index)
    labels, classes = job.train_labels[index], len(job.classes)
    usual = min(_BATCH, max(_LEAST_BATCH, len(index) // _STEPS))
    training = Training(
        epochs=epochs,
        batch_size=usual if batch_size is None else batch_size,
        image_size=job.image_size,
        nesterov=True,
        seed=seed,
        progress=True,
    )
    say(
        f"fine-tuning on {len(index):,} images ({subset}, seed {seed}), batches of "
        f"{min(training.batch_size, len(index))}"
    )
    scores = finetune_scores(
        job.loaded.backbone, images, labels, job.test, training,
        lr=lr, head_lr=head_lr, classes=classes,
    )  # fmt: skip
    x, x_test = (extract_features(job.loaded.backbone, i) for i in (images, job.test))
    frozen, _ = linear_scores(x, labels, x_test, classes=classes, seed=seed)
    return scores, {
        "name": f"finetune-{'list' if subset_list else f'{percent or 100:g}'}",
        "subset": subset,
        "n_train": len(index),
        "frozen_top1": measure_accuracy(frozen, job.test_labels).top1,
        "epochs": epochs,
        "batch_size": training.batch_size,
        "lr": lr,
        "head_lr": head_lr,
        "seed": seed,
    }


def _subset(
    job: _Job, percent: float | None, subset_list: Path | None, seed: int
) -> tuple[Tensor, str]:
    """Return the indices of the images to fine-tune on, and how they were chosen."""
    from mixmask.evaluation import balanced_subset, listed_subset

    _at_least("seed", seed, 0)
    if subset_list is None:
        percent = 100.0 if percent is None else percent
        index = balanced_subset(job.train_labels, percent, seed=seed, classes=job.classes)
        return index, f"{percent:g} %"
    if percent is not None:
        raise ValueError("--percent and --subset-list exclude each other; name one")
    if len(job.files) != len(job.train):
        raise ValueError(
            f"--subset-list needs a folder of images, got {job.data}, whose images have no file "
            "names; use --percent"
        )
    lines = (line.strip() for line in subset_list.read_text(encoding="utf-8").splitlines())
    return listed_subset(job.files, [line for line in lines if line]), f"listed in {subset_list}"


def _check_place(run: Path, out: Path | None) -> None:
    """Refuse what cannot work before anything is loaded."""
    if not run.exists():
        raise ValueError(f"RUN must be a run folder or a checkpoint file, got {run}: not found")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got {out}, which is a file; name another")


def _prepare(
    run: Path,
    data: str | None,
    image_size: int | None,
    arch: str | None,
    small_stem: bool | None,
    device: str | None,
) -> _Job:
    """Load the backbone and the labelled data, which are the run's own by default."""
    from mixmask.checkpoints.load import load_backbone
    from mixmask.data.sets import load_data

    where = _device(device)
    loaded = load_backbone(run, arch=arch, small_stem=small_stem)
    data = loaded.config.get("data") if data is None else data
    if data is None:
        raise ValueError(f"{run} does not say on which data it was trained; name --data")
    if image_size is None:
        image_size = int(loaded.config.get("image_size", 224))
    _at_least("image-size", image_size, 1)
    images = load_data(data, image_size)
    fix = "pass a folder with train and test (or val), each with one folder a class"
    if images.test is None:
        raise ValueError(f"--data {data} has no test split; {fix}")
    if not images.labelled:
        raise ValueError(f"--data {data} has no labels; {fix}")
    (train, train_labels), (test, test_labels) = labelled_splits(images)
    loaded.backbone.to(where).to(memory_format=torch.channels_last)
    return _Job(
        loaded,
        data,
        image_size,
        images.classes,
        train,
        train_labels,
        images.train.files,
        test,
        test_labels,
        where,
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name} is not there; use cpu, or leave it out") from None
    return device


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name} must be at least {least}, got {value}")


def _circumstances(device: torch.device) -> dict[str, Any]:
    import timm

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "mixmask": __version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _as_json(measured: Accuracy, classes: tuple[str, ...]) -> dict[str, Any]:
    shares = [None if math.isnan(share) else share for share in measured.per_class.tolist()]
    results: dict[str, Any] = {"top1": measured.top1}
    if measured.top5 is not None:
        results["top5"] = measured.top5
    results["mean_class"] = measured.mean_class
    results["per_class"] = dict(zip(classes, shares, strict=True))
    if len(classes) <= _MATRIX_CLASSES:
        results["confusion"] = measured.confusion.tolist()
    return results


def _write(
    results: dict[str, Any], measured: Accuracy, classes: tuple[str, ...], path: Path
) -> Path:
    """Write results and picture to temporary names, and rename them when both are whole."""
    from mixmask.figures.features import figure_confusion
    from mixmask.figures.style import save_figure

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix(".png")
    text, drawn = path.with_name(f"{path.stem}.tmp.json"), path.with_name(f"{path.stem}.tmp.png")
    text.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_figure(figure_confusion(measured.confusion, classes), drawn)
    drawn.replace(picture)
    text.replace(path)
    return path


def _say_results(measured: Accuracy, classes: tuple[str, ...], told: dict[str, Any]) -> None:
    if "frozen_top1" in told:
        say(f"{'frozen, linear probe':<22}{told['frozen_top1']:>7.1%}  of the test images right")
    say(f"{'top-1':<22}{measured.top1:>7.1%}  of the test images right")
    if measured.top5 is not None:
        say(f"{'top-5':<22}{measured.top5:>7.1%}")
    worst = min(
        (share, name)
        for share, name in zip(measured.per_class.tolist(), classes, strict=True)
        if not math.isnan(share)
    )
    say(f"{'mean over classes':<22}{measured.mean_class:>7.1%}  worst: {worst[1]}, {worst[0]:.1%}")


def add_evaluate(commands: Any) -> None:
    """Add `evaluate` with its three protocols."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a backbone",
        description="Measure a trained backbone on labelled images, by nearest neighbours, a "
        "linear probe, or fine-tuning. Results go to evaluate-PROTOCOL.json and .png in the run's "
        "folder.",
    )
    protocols = parser.add_subparsers(required=True, metavar="PROTOCOL")
    knn = _add_protocol(protocols, "knn", _knn, "weighted nearest neighbours on frozen features")
    knn.add_argument("--k", type=int, default=20, metavar="N", help="neighbours [20]")
    knn.add_argument(
        "--temperature", type=float, default=0.1, metavar="T", help="of the votes [0.1]"
    )
    linear = _add_protocol(protocols, "linear", _linear, "a linear probe on the frozen backbone")
    linear.add_argument(
        "--protocol",
        choices=("lbfgs", "sgd"),
        default="lbfgs",
        help="lbfgs: logistic regression on features of whole images, its penalty chosen on a "
        "fifth of the training images; sgd: random crops, as in MoCo's paper [lbfgs]",
    )
    linear.add_argument("--epochs", type=int, metavar="N", help="sgd: passes over the data [100]")
    linear.add_argument("--batch-size", type=int, metavar="N", help="sgd: images a step [256]")
    linear.add_argument(
        "--lr", type=float, metavar="LR", help="sgd: learning rate, a tenth after 60 and 80 %% [30]"
    )
    tune = _add_protocol(protocols, "finetune", _finetune, "train backbone and head on labels")
    tune.add_argument(
        "--percent",
        type=float,
        metavar="P",
        help="share of the labels, equally many of each class; 100 for all [100]",
    )
    tune.add_argument(
        "--subset-list", type=Path, metavar="FILE", help="names of the images to use, one a line"
    )
    tune.add_argument("--epochs", type=int, default=20, metavar="N", help="passes [20]")
    tune.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images a step [256, or a tenth of the images where they are few, at least 16]",
    )
    tune.add_argument(
        "--lr", type=float, default=0.01, metavar="LR", help="rate of the backbone [0.01]"
    )
    tune.add_argument(
        "--head-lr", type=float, default=0.2, metavar="LR", help="rate of the head [0.2]"
    )
    for each in (linear, tune):
        each.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws [0]")


def _add_protocol(
    protocols: Any, name: str, measure: Callable[..., _Outcome], text: str
) -> argparse.ArgumentParser:
    """Add a protocol with the options that all have."""
    parser: argparse.ArgumentParser = protocols.add_parser(name, help=text, description=text)
    parser.set_defaults(command=evaluate, measure=measure)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint file")
    parser.add_argument(
        "--data", metavar="DATA", help="as of pretrain, with labels; default: the run's own"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="of the views, in pixels; default: the run's"
    )
    parser.add_argument("--arch", metavar="ARCH", help="backbone; default: the run's own")
    parser.add_argument(
        "--small-stem",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="its stem is the one for small images; default: as the run's",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go; default: beside the run"
    )
    parser.add_argument("--device", metavar="DEV", help="cpu or cuda; default: a GPU if any")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to use")
    return parser
