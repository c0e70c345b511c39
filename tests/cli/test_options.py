"""Options that commands share: fields as flags, ranges, devices, and what --resume excludes."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import refused

from mixmask import cli
from mixmask._checks import Ratio
from mixmask.cli.options import (
    RatioAction,
    add_fields,
    add_shared,
)
from mixmask.runs.options import check_options, check_resume, option


@dataclass(frozen=True)
class Config:
    epochs: int = option(3, "passes over 100 % of the data", low=1)
    lr: float = option(0.5, "learning rate", low=0, high=1)
    beta: float = option(1.0, "shape of the distribution", positive=True)
    kind: str = option("a", "which kind", ("a", "b"))
    name: str = option("", "its name")
    deep: bool = option(False, "use more layers")
    ratio: Ratio = option(0.5, "share of own pixels", ratio=True)  # noqa: RUF009


def parse(*words: str, **options: Any) -> dict[str, Any]:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_fields(parser, dataclasses.fields(Config), **options)
    return vars(parser.parse_args(words))


def test_fields_become_flags_that_return_what_was_given() -> None:
    assert parse() == {}
    words = ["--epochs", "7", "--lr", "1e-1", "--kind", "b", "--name", "x", "--no-deep"]
    given: dict[str, Any] = {"epochs": 7, "lr": 0.1, "kind": "b", "name": "x", "deep": False}
    assert parse(*words) == given
    assert Config(**given).epochs == 7


@pytest.mark.parametrize(
    "words, expected", [(["0.5"], 0.5), (["0.25", "0.75"], (0.25, 0.75)), (["0", "1"], (0.0, 1.0))]
)
def test_a_range_is_two_numbers(words: list[str], expected: Any) -> None:
    assert parse("--ratio", *words) == {"ratio": expected}


def test_a_repeated_range_gives_a_list() -> None:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--ratio", dest="ratios", type=float, nargs="+", action=RatioAction, const=True
    )
    words = ["--ratio", "0.5", "--ratio", "0.25", "0.75"]
    for _ in range(2):  # The list is a new one each time.
        assert vars(parser.parse_args(words)) == {"ratios": [0.5, (0.25, 0.75)]}


def test_help_shows_defaults_and_owners(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help", defaults={"epochs": 28}, owners={"lr": ("toy", "other")})
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "passes over 100 % of the data [28]", "learning rate [0.5] (toy, other)",
        "which kind [a]", "use more layers [off]", "share of own pixels [0.5]",
    ):  # fmt: skip
        assert line in text
    assert "its name [" not in text


@pytest.mark.parametrize(
    "given, message",
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": 2.0}, r"--lr must be within 0 \.\.\. 1, got 2\.0"),
        ({"lr": float("nan")}, r"--lr must be within 0 \.\.\. 1, got nan"),
        ({"beta": 0.0}, r"--beta must be positive, got 0\.0"),
        ({"kind": "c"}, "--kind must be one of 'a', 'b', got 'c'"),
    ],
)
def test_limits_are_checked_by_one_function(given: dict[str, Any], message: str) -> None:
    check_options(Config())
    with pytest.raises(ValueError, match=message):
        check_options(Config(**given))


def test_resume_excludes_other_options(tmp_path: Path) -> None:
    check_resume(tmp_path, [])
    with pytest.raises(ValueError, match=r"uses the run.s own options; remove --lr, --out"):
        check_resume(tmp_path, ["--lr", "--out"])


def test_shared_options_are_declared_once_and_changed_by_a_command() -> None:
    parser = argparse.ArgumentParser()
    add_shared(parser, "run", "--seed", "--threads", "--small-stem")
    add_shared(parser, "--out", required=True)
    options = parser.parse_args(["folder", "--no-small-stem", "--out", "x.png"])
    assert (options.run.name, options.seed, options.threads) == ("folder", 0, None)
    assert (options.small_stem, options.out.name) == (False, "x.png")


def test_resume_of_what_is_not_there(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, found in (
        (tmp_path / "nowhere", "nothing is there"),
        (next(photographs.rglob("*.png")), "it is a file"),
    ):
        for command in ("pretrain", "detect"):
            line = refused([command, "--resume", str(folder)], capsys)
            assert line == (
                f"mixmask: --resume must be a run folder, got {folder}: {found}; pass a folder "
                "that --out named"
            )


@pytest.mark.parametrize(
    "words, names", [([], ["pretrain", "ablate"]), (["evaluate"], ["knn", "linear", "finetune"])]
)
def test_what_needs_another_word_prints_its_help(
    words: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: {' '.join(['mixmask', *words])} [-h]")
    assert all(f"\n    {name}  " in printed.out for name in names)
    assert printed.err == ""
