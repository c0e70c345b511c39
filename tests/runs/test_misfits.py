"""Checkpoints that are whole and of the run, but cannot be gone on from: an older one is used."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, refused, write_photographs

from mixmask import cli
from mixmask.runs.folder import save_checkpoint
from mixmask.runs.misfits import describe_optimizer_misfit, describe_progress

Edit = Callable[[dict[str, Any]], object]

EDITS: dict[str, Edit] = {
    "optimizer is missing": lambda c: c.pop("optimizer"),
    "optimizer is NoneType": lambda c: c.update(optimizer=None),
    "the optimiser must have 1 groups": lambda c: c["optimizer"].update(param_groups=[]),
    "the optimiser's lr is 'x'": lambda c: c["optimizer"]["param_groups"][0].update(lr="x"),
    "the optimiser's momentum is nan": lambda c: c["optimizer"]["param_groups"][0].update(
        momentum=float("nan")
    ),
    "the optimiser's momentum_buffer 0 is of another shape": lambda c: c["optimizer"]["state"][
        0
    ].update(momentum_buffer=torch.zeros(1)),
    "the optimiser has no parameter 99": lambda c: c["optimizer"]["state"].update({99: {}}),
    "step is -1": lambda c: c.update(step=-1),
    "step is str": lambda c: c.update(step="x"),
    "step 1000 lies beyond": lambda c: c.update(step=1000),
    "rows is NoneType": lambda c: c.update(rows=None),
    "rows are no measurements of epochs": lambda c: c.update(rows=[{"a": 1}]),
    "meter is NoneType": lambda c: c.update(meter=None),
    "its means are no numbers": lambda c: c.update(meter={"clean": "x"}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("misfits")
    data, out = write_photographs(folder / "data"), folder / "run"
    words = ["pretrain", "--data", str(data), *TINY, "--grid-size", "2", "--epochs", "2"]
    assert cli.main([*words, "--measure-every", "0", "--keep", "2", "--out", str(out)]) == 0
    return out


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.mark.slow
@pytest.mark.parametrize("problem", EDITS)
def test_the_one_before_is_used_and_both_are_named(
    problem: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before, content = load(out / "previous.pt"), load(out / "last.pt")
    EDITS[problem](content)
    save_checkpoint(out, content)
    shutil.copyfile(run / "previous.pt", out / "previous.pt")
    assert before["step"] < load(run / "last.pt")["step"]
    assert cli.main(["pretrain", "--resume", str(out), "--measure-every", "0"]) == 2
    assert cli.main(["pretrain", "--resume", str(out)]) == 0
    errors = capsys.readouterr().err
    assert f"{out / 'last.pt'} cannot be used ({problem}" in errors
    assert f"{out / 'previous.pt'} is used instead" in errors
    assert load(out / "last.pt")["step"] == load(run / "last.pt")["step"]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_kept_epochs_are_used_where_the_others_are_damaged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "metrics.csv"):
        shutil.copyfile(run / name, out / name)
    shutil.copyfile(run / "epoch-0001.pt", out / "epoch-0001.pt")
    (out / "epoch-mine.pt").write_bytes(b"of the user")
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"damaged")
    (out / "metrics.csv").unlink()
    with monkeypatch.context() as patch:  # The damaged one never takes its place.
        patch.setattr("mixmask.trainers.start.train", interrupt)
        assert cli.main(["pretrain", "--resume", str(out)]) == 130
    assert (out / "epoch-0001.pt").read_bytes() == (run / "epoch-0001.pt").read_bytes()
    capsys.readouterr()
    assert cli.main(["pretrain", "--resume", str(out)]) == 0
    assert f"{out / 'epoch-0001.pt'} is used instead" in capsys.readouterr().err
    names = sorted(path.name for path in out.glob("epoch-*.pt"))
    assert names == ["epoch-0001.pt", "epoch-0002.pt", "epoch-mine.pt"]
    for name, tensor in load(run / "last.pt")["model"].items():
        torch.testing.assert_close(load(out / "last.pt")["model"][name], tensor, rtol=0, atol=0)
    for name in (*names[:2], "last.pt", "previous.pt"):  # It never starts again over results.
        (out / name).write_bytes(b"damaged")
    line = refused(["pretrain", "--resume", out], capsys)
    assert "holds no whole checkpoint" in line
    assert "epoch-0002.pt" in line


def test_other_numbers_of_elements_do_not_fit() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD(weights, momentum=0.9, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    assert describe_optimizer_misfit(optimizer, state) == ""
    for wrong in (
        torch.zeros(()), torch.zeros(3, 2), torch.zeros(2, 3).double(), torch.zeros(1).expand(2, 3),
    ):  # fmt: skip
        edited = copy.deepcopy(state)
        edited["state"][0]["momentum_buffer"] = wrong
        assert "momentum_buffer 0 is of another shape" in describe_optimizer_misfit(
            optimizer, edited
        )


def test_types_of_parts() -> None:
    assert describe_progress({"step": 3, "rows": [{"epoch": 1}]}, {"step": int, "rows": list}) == ""
    assert describe_progress({"step": True}, {"step": int}) == "step is bool"
    assert describe_progress({"rows": [5]}, {"rows": list}).startswith("rows are no")
