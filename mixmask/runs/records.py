"""The results of runs: read from their folders, grouped by options, averaged over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmask.runs.folder import Row, read_config, read_rows
from mixmask.runs.options import STORAGE, Options

# Options that change speed, memory or logging but no weights.
_SETTING = (
    *STORAGE, "measure_every", "tracker", "compile", "compile_mode", "checkpointing", "format",
    "version", "fingerprint",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A run, read from its folder."""

    folder: Path
    config: Options  # The content of `config.json`.
    rows: list[Row]  # Of `metrics.csv`, each without the columns that were not measured.


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed, by which they are ordered."""

    label: str  # What distinguishes them from the other groups.
    records: tuple[Record, ...]

    def points(self, column: str) -> dict[int, list[float]]:
        """Return epoch -> one value per run, for the epochs at which all runs have the column."""
        measured = [
            {int(row["epoch"]): row[column] for row in record.rows if column in row}
            for record in self.records
        ]
        shared = [epoch for epoch in measured[0] if all(epoch in one for one in measured)]
        return {epoch: [one[epoch] for one in measured] for epoch in shared}

    def last(self, column: str) -> tuple[int, list[float]] | None:
        """Return the last epoch of training at which all runs have the column, and its values."""
        trained = {epoch: values for epoch, values in self.points(column).items() if epoch > 0}
        return max(trained.items()) if trained else None


def read_record(path: Path) -> Record:
    """Read a run's options and metrics.

    Args:
        path: A run folder, or a checkpoint file in it.

    Raises:
        ValueError: If it is not a run, or has measured nothing yet.
    """
    folder = path.parent if path.is_file() else path
    try:
        config = read_config(folder)
        # A KeyError names what is missing.
        config["method"], config["mix"], config["data"], config["seed"]
        rows = read_rows(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a run ({type(error).__name__}: {error}); "
            "pass a folder that mixmask pretrain wrote"
        ) from error
    if not rows:
        raise ValueError(f"{path} has no epoch yet; continue it with pretrain --resume")
    return Record(folder, config, rows)


def group_seeds(records: Sequence[Record]) -> list[Group]:
    """Group runs that differ only in the seed, in the given order.

    Raises:
        ValueError: If a run is there twice, by its folder or by its options.
    """
    by_options: dict[str, dict[int, Record]] = {}
    for record in records:
        # As text: lists and dictionaries cannot be keys.
        key = json.dumps(_without_seed(record.config), sort_keys=True)
        seeds, seed = by_options.setdefault(key, {}), record.config["seed"]
        if seed in seeds:
            raise ValueError(
                f"{seeds[seed].folder} and {record.folder} have the same options and the same "
                f"seed, {seed}, so they are one run; leave one out"
            )
        seeds[seed] = record
    groups = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in by_options.values()]
    configs = [_without_seed(group[0].config) for group in groups]
    names = _distinguish(configs) or ["method", "mix"]
    labels = [
        ", ".join(describe_option(name, config[name]) for name in names) for config in configs
    ]
    if len(set(labels)) < len(labels):  # Options that only one version of the package knows.
        labels = [f"{label} ({g[0].folder.name})" for label, g in zip(labels, groups, strict=True)]
    return [Group(label, group) for label, group in zip(labels, groups, strict=True)]


def _without_seed(config: Options) -> Options:
    """Return the options that distinguish runs; where and how they ran does not."""
    return {name: value for name, value in config.items() if name not in ("seed", *_SETTING)}


def _distinguish(configs: Sequence[Options]) -> list[str]:
    """Choose a few options that distinguish the configurations, method and mixture first."""
    # Greedily: an option joins if it parts settings that those before it leave together.
    chosen: list[str] = []
    distinct = 1
    for name in dict.fromkeys(("method", "mix", *configs[0])):
        if all(name in config for config in configs):
            values = {json.dumps([config[n] for n in (*chosen, name)]) for config in configs}
            if len(values) > distinct:
                chosen, distinct = [*chosen, name], len(values)
    return chosen


def common_options(groups: Sequence[Group]) -> Options:
    """Return the options that all groups share."""
    first, *others = (_without_seed(group.records[0].config) for group in groups)
    return {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }


def unlabelled_differences(groups: Sequence[Group]) -> dict[str, list[object]]:
    """Return the options that differ and that no label names: option -> one value per group."""
    configs = [_without_seed(group.records[0].config) for group in groups]
    known = {*_distinguish(configs), *common_options(groups)}
    names = dict.fromkeys(name for config in configs for name in config if name not in known)
    return {name: [config.get(name) for config in configs] for name in names}


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and, for two values or more, the sample standard deviation.

    Example:
        >>> mean_sd([1.0, 2.0, 3.0])
        (2.0, 1.0)
        >>> mean_sd([1.0])
        (1.0, None)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def percent(values: Sequence[float]) -> str:
    """Write accuracies, 0 ... 1, as their mean in percent, with ± sd for two or more.

    Example:
        >>> percent([0.5]), percent([0.4, 0.5, 0.6]), percent([])
        ('50.0', '50.0 ± 10.0', '–')
    """
    if not values:
        return "–"
    mean, sd = mean_sd(values)
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def describe_option(name: str, value: object) -> str:
    """Write an option and its value for a label.

    Example:
        >>> describe_option("grid_size", 4), describe_option("mix", "none")
        ('grid size 4', 'no mixing')
    """
    if name in ("method", "mix"):
        return "no mixing" if value == "none" else str(value)
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {describe_value(value)}"


def describe_value(value: object) -> str:
    """Write an option's value.

    Example:
        >>> describe_value((0.25, 0.75)), describe_value(True), describe_value(None)
        ('0.25–0.75', 'on', 'none')
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return "–".join(f"{bound:g}" for bound in value)
    return "none" if value is None else str(value)


def plural(count: int, noun: str) -> str:
    """Write a count with its noun.

    Example:
        >>> plural(1, "epoch"), plural(3409, "image"), plural(2, "class")
        ('1 epoch', '3,409 images', '2 classes')
    """
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
