"""Cheaper mixed views: what they cost per step, and what they reach for equal compute.

The cost is that of two steps of MoCo v2 with a ResNet-50 at 224 px, of which one may go without
mixed views. Accuracies are those of the default run's data and network, where each option gets
as many epochs as the floating-point operations of 14 with MixMask allow.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    Case,
    Figure,
    Side,
    arguments,
    circumstances,
    compare,
    figure_line,
    interleave,
    line,
    slug,
    write_json,
)
from methods import train
from peers import Setting, TrainerStep
from roofline import work
from torch import Tensor

from mixmask.trainers.config import RunConfig
from mixmask.trainers.methods import make_config

_PLAIN, _WHOLE = "without mixed views", "MixMask"
_EPOCHS = 14


def arms(size: int) -> dict[str, dict[str, Any]]:
    """Return the options that are compared, for views of so many pixels."""
    smaller = 160 if size == 224 else size * 3 // 4
    return {
        _WHOLE: {},
        f"mixed views at {smaller} of {size} px": {"mixed_size": smaller},
        "mixed views in every second step": {"mix_every": 2},
        "mixed views in place of clean queries": {"replace_clean": True},
        _PLAIN: {"mix": "none"},
    }


def two_steps(step: TrainerStep, config: RunConfig, x1: Tensor, x2: Tensor) -> None:
    """Take two steps, of which the second may have no mixed views."""
    step(x1, x2)
    step(x1, x2, mix=config.mix_every == 1)


def sides(given: dict[str, Any], setting: Setting) -> dict[str, Side]:
    """Build a pair of steps for each option."""
    found: dict[str, Side] = {}
    for name, options in arms(given["image_size"]).items():
        config = make_config(**given, **options)
        n, size = config.batch_size, config.image_size
        x1, x2 = (setting.view(x) for x in torch.randn(2, n, 3, size, size, device=setting.device))
        found[name] = partial(two_steps, TrainerStep(config, setting), config, x1, x2)
    return found


def costs(given: dict[str, Any], setting: Setting, repeats: int) -> list[Case]:
    """Time two steps with each option beside two without mixed views."""
    samples, calls = interleave(
        sides(given, setting), repeats=repeats, device=setting.device, warmup=1
    )
    n, size = given["batch_size"], given["image_size"]
    sizes = {"arch": given["arch"], "images": [n, 3, size, size], "dtype": setting.label}
    return [
        compare(
            f"two steps, {name}",
            f"two steps {_PLAIN}",
            samples[name],
            samples[_PLAIN],
            sizes=sizes,
            calls=calls,
            images=2 * n,
        )
        for name in samples
        if name != _PLAIN
    ]


def epochs_for_equal_compute(epochs: int) -> dict[str, int]:
    """Return the epochs of each option on the photographs that cost what so many cost whole."""
    given = {"data": "clothing64", "arch": "narrow", "image_size": 32, "batch_size": 64}
    flops = {name: work(side)[0] for name, side in sides(given, Setting()).items()}
    return {name: max(1, round(epochs * flops[_WHOLE] / own)) for name, own in flops.items()}


def figures(trials: Sequence[dict[str, Any]]) -> list[Figure]:
    """Return the mean accuracies of each option over its seeds."""
    found = []
    for name in dict.fromkeys(trial["arm"] for trial in trials):
        own = [trial for trial in trials if trial["arm"] == name]
        label = f"{name}, {own[0]['epochs']} epochs, {len(own)} seeds"
        for accuracy, title in (("knn", "nearest neighbours"), ("linear", "linear probe")):
            value = statistics.mean(trial["trained"][accuracy] for trial in own)
            found.append(Figure(f"{label}: {title}", value, "share"))
    return found


def main() -> None:
    """Measure costs, then train what is missing, writing after each run."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 256 elsewhere")
    parser.add_argument("--seeds", type=int, default=2, help="runs an option; 0 for costs alone")
    options = parser.parse_args()
    setting = Setting(options.device, channels_last=True)
    out: Path = options.out or ROOT / "results" / f"cheaper-{slug(options.device)}.json"
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    trials: list[dict[str, Any]] = earlier.get("trials", [])
    given = {"data": "imagenet", "arch": "resnet50", "image_size": 224}
    if options.small:
        given = {"data": "clothing64", "arch": "narrow", "image_size": 32}
    given["batch_size"] = options.batch_size or (8 if options.device == "cpu" else 256)
    epochs = epochs_for_equal_compute(1 if options.small else _EPOCHS)
    wanted = [(seed, name) for seed in range(options.seeds) for name in epochs]
    done = {(trial["seed"], trial["arm"]) for trial in trials}
    record = {"script": "cheaper", "small": options.small, **circumstances(options.device)}
    cases = [asdict(case) for case in costs(given, setting, options.repeats)]

    def write() -> None:
        means = [asdict(figure) for figure in figures(trials)]
        write_json(out, record | {"cases": cases, "figures": means, "trials": trials})

    for case in cases:
        print(line(case), flush=True)
    write()
    for seed, name in wanted:
        if (seed, name) in done:
            continue
        cell = {"epochs": epochs[name], "seed": seed, **arms(32)[name]}
        trained = train(make_config(**cell, measure_every=0), 128 if options.small else None)
        trials.append({"arm": name, **cell, **trained, "commit": record["commit"]})
        write()
    for figure in figures(trials):
        print(figure_line(asdict(figure)))


if __name__ == "__main__":
    main()
