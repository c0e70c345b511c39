"""`mixmask compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mixmask.cli._console import say
from mixmask.cli.options import add_shared
from mixmask.figures.runs import BANDS, figure_comparison
from mixmask.figures.style import check_figure, save_figure, short_path
from mixmask.runs import records
from mixmask.runs.options import Options
from mixmask.runs.records import Group, Record, describe_option, describe_value, percent

_COLUMNS = ("loss_clean", "loss_mixed", "knn", "linear")
_TITLE = ("method", "mix", "data", "arch", "image_size", "epochs")


def compare(runs: list[Path], out: Path, band: str, force: bool = False) -> None:
    """Draw the curves of several runs in one figure, and print their last accuracies."""
    if len(runs) == 1:
        raise ValueError(f"compare needs two runs or more, got {runs[0]} alone; name another")
    check_figure(out, force=force)
    read = [records.read_record(run) for run in runs]
    _check_data(read)
    groups = records.group_seeds(read)
    common = records.common_options(groups)
    title = ", ".join(
        short_path(common[name])
        if name in ("data", "arch")
        else describe_option(name, common[name])
        for name in _TITLE
        if name in common
    )
    # Setting -> column -> epoch -> one value per seed.
    curves = {group.label: {name: group.points(name) for name in _COLUMNS} for group in groups}
    save_figure(figure_comparison(curves, title=title, kind=band), out)
    say("\n".join([title, "", *_table(groups), *_notes(groups, band), "", f"drew {out}"]))


def _check_data(read: Sequence[Record]) -> None:
    """Check that all runs used the same images."""
    groups: list[list[Record]] = []
    for record in read:
        same = (group for group in groups if _same_data(group[0].config, record.config))
        if (group := next(same, None)) is None:
            groups.append(group := [])
        group.append(record)
    if len(groups) > 1:
        places = [group[0].config["data"] for group in groups]
        each = "; ".join(
            f"{', '.join(str(record.folder) for record in group)} used "
            f"{'other images of ' if place in places[:number] else ''}{place}"
            for number, (group, place) in enumerate(zip(groups, places, strict=True))
        )
        raise ValueError(
            f"accuracies on different data do not compare: {each}; name the runs of one of these"
        )


def _same_data(one: Options, other: Options) -> bool:
    """Tell whether two runs used the same images."""
    known = [config.get("fingerprint") for config in (one, other)]
    if known[0] and known[0] == known[1]:
        return True
    # The sum may be of images at the run's own size.
    alike = [fingerprint and {**fingerprint, "sum": ""} for fingerprint in known]
    return alike[0] == alike[1] and Path(one["data"]) == Path(other["data"])


def _table(groups: Sequence[Group]) -> list[str]:
    """Format the last accuracies: mean ± standard deviation over seeds."""
    cells = [["run", "seeds", "epoch", "kNN, %", "linear, %"]]
    for group in groups:
        knn, linear = group.last("knn"), group.last("linear")
        epoch = str(knn[0]) if knn else "–"
        texts = [percent(last[1]) if last else "–" for last in (knn, linear)]
        cells.append([group.label, str(len(group.records)), epoch, *texts])
    # Widths: the names are aligned on the left, the numbers on the right.
    label, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        "  ".join([row[0].ljust(label), *map(str.rjust, row[1:], others)]).rstrip() for row in cells
    ]


def _notes(groups: Sequence[Group], band: str) -> list[str]:
    """List what a reader of the table must know: ±, what else differs, what is missing."""
    notes = []
    if any(len(group.records) > 1 for group in groups):
        notes.append(f"± is the standard deviation over seeds; bands in the figure: {BANDS[band]}")
    if any(group.last(name) is None for group in groups for name in ("knn", "linear")):
        notes.append("–: not measured (no labels, or too early in a run)")
    for name, values in records.unlabelled_differences(groups).items():
        each = "; ".join(
            f"{group.label}: {describe_value(value)}"
            for group, value in zip(groups, values, strict=True)
        )
        notes.append(f"they differ in {name.replace('_', '-')} too ({each})")
    return ["", *notes] if notes else []


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.description = (
        "Draw the losses and accuracies of several runs in one figure and print their last "
        "accuracies. Runs that differ only in the seed share a line, their mean, with a band."
    )
    parser.set_defaults(command=compare)
    add_shared(parser, "runs", help="run folders, or checkpoint files in them")
    add_shared(parser, "--out", default=Path("compare.png"), help="PNG file to write [compare.png]")
    explained = "; ".join(f"{name}: {text}" for name, text in BANDS.items())
    parser.add_argument(
        "--band", choices=tuple(BANDS), default="sd", help=f"meaning of the band ({explained}) [sd]"
    )
    add_shared(parser, "--force")
