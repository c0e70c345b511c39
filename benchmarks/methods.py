"""Every method with every mixture on the embedded photographs, for a few epochs.

Not a race between methods: a method has one setting for all mixtures, that of its preset, and so
few epochs say whether a representation forms, not which is best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import ROOT, circumstances, write_json
from torch import nn

from mixmask.data.sets import load_data
from mixmask.evaluation import extract_features, knn_accuracy, linear_accuracy
from mixmask.trainers.config import RunConfig
from mixmask.trainers.loop import train_method
from mixmask.trainers.methods import METHODS, make_config

MIXES = ("none", "mixmask", "unmix", "both", "erase")
_OUT = ROOT / "results" / "methods-cpu.json"


def main() -> None:
    """Run what is missing, writing the results after each run, so that nothing is lost."""
    options = _options()
    torch.set_num_threads(options.threads)
    out: Path = options.out
    results = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    done = {_key(run) for run in results}
    for cell in _cells(options):
        if _key(cell) in done:
            continue
        where = circumstances("cpu")
        trained = train(make_config(**cell, measure_every=0), options.images)
        made = {"commit": where["commit"], "cpu": where["hardware"]["cpu"]}
        results.append(cell | trained | made)
        where["hardware"]["cpu"] = " and ".join(dict.fromkeys(run["cpu"] for run in results))
        record = {"script": "methods", "small": False, **where, "runs": results}
        print(line(results[-1]), flush=True)
        write_json(out, record)
    print(table(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--images", type=int, help="photographs to train on; default: all")
    parser.add_argument("--out", type=Path, default=_OUT)
    return parser.parse_args()


def _cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Name the runs, one seed after the other, so that an early stop leaves whole rows."""
    for seed in range(options.seeds):
        for method in options.methods:
            for mix in options.mixes:
                yield {"method": method, "mix": mix, "seed": seed, "epochs": options.epochs}


def _key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["method"], run["mix"], run["seed"], run["epochs"]


def train(config: RunConfig, count: int | None) -> dict[str, Any]:
    """Train on so many photographs; return losses by epoch, and accuracies before and after."""
    data = load_data(config.data, config.image_size)
    assert data.train.labels is not None
    assert data.test is not None
    assert data.test.labels is not None
    step = len(data.train.images) // (count or len(data.train.images))
    images, labels = data.train.images[::step], data.train.labels[::step]
    test = data.test.images, data.test.labels

    def measure(backbone: nn.Module, thorough: bool) -> dict[str, float]:
        del thorough
        # Of photographs as they are stored, at 64 px: as for all results that are there already.
        x, x_test = (extract_features(backbone, split) for split in (images, test[0]))
        return {
            "knn": knn_accuracy(x, labels, x_test, test[1]),
            "linear": linear_accuracy(x, labels, x_test, test[1]),
        }

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, rows = train_method(config, images, Path(folder), monitor=measure, progress=False)
    before, after = rows[0], rows[-1]
    return {
        "losses": [round(row["loss"], 4) for row in rows[1:]],
        "untrained": {name: before[name] for name in ("knn", "linear")},
        "trained": {name: after[name] for name in ("knn", "linear")},
        "spread": after.get("spread"),
        "lam": after["lam"],
        "seconds": sum(row["seconds"] for row in rows[1:]),
    }


def line(run: Mapping[str, Any]) -> str:
    """Return one line about a run."""
    gains = ", ".join(
        f"{name} {run['untrained'][name]:.1%} -> {run['trained'][name]:.1%}"
        for name in ("knn", "linear")
    )
    losses = run["losses"]
    return (
        f"{run['method']} + {run['mix']}, seed {run['seed']}: loss {losses[0]:.3f} -> "
        f"{losses[-1]:.3f}, {gains}, {run['seconds']:.0f} s"
    )


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the runs as a table in Markdown: kNN / linear in %, means over the seeds.

    A cell is marked where the loss did not fall, or an accuracy is not above the untrained one.
    """
    mixes = list(dict.fromkeys(run["mix"] for run in runs))
    head = ["method", "epochs", "seeds", "untrained", *mixes]
    rows = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        epochs = ", ".join(str(n) for n in sorted({run["epochs"] for run in own}))
        seeds = len({run["seed"] for run in own})
        cells = [epochs, str(seeds), _pair([run["untrained"] for run in own])]
        for mix in mixes:
            found = [run for run in own if run["mix"] == mix]
            cells.append(_cell(found) if found else "–")
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _pair(accuracies: Sequence[Mapping[str, float]]) -> str:
    return " / ".join(
        f"{100 * mean(a[name] for a in accuracies):.1f}" for name in ("knn", "linear")
    )


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    text = _pair([run["trained"] for run in runs])
    # MoCo's first epoch also fills the queue, which makes its task harder.
    fell = all(run["losses"][-1] < max(run["losses"][:2]) for run in runs)
    above = all(
        mean(run["trained"][name] for run in runs) > mean(run["untrained"][name] for run in runs)
        for name in ("knn", "linear")
    )
    return text + ("" if fell else " (loss did not fall)") + ("" if above else " (not above)")


if __name__ == "__main__":
    main()
