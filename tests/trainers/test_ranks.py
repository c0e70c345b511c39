"""Two processes of the command line: told apart at the start, and what is said when one dies."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch_processes
from started import write_noise

from mixmask import cli
from mixmask.trainers.methods.moco import MoCo

pytestmark = pytest.mark.slow

TINY = [
    "--arch=narrow", "--image-size=16", "--batch-size=4", "--queue-size=16", "--measure-every=0",
    "--dim=8", "--threads=1",
]  # fmt: skip
Said = dict[str, tuple[int, list[str]]]


def _call(*words: str) -> tuple[int, list[str]]:
    """Return a command's exit code and the lines of its errors."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["pretrain", *words])
    return code, [line for line in errors.getvalue().splitlines() if line.startswith("mixmask")]


def _work(rank: int, folder: Path) -> Said:
    """Give the same commands in both processes, some of which differ or end badly."""
    os.environ["MIXMASK_TIMEOUT"] = "60"
    warnings.simplefilter("ignore")
    plain = ["--data", str(folder / "data"), *TINY]
    method = ("moco-v2", "moco-v1")[rank]
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "thesis.txt").touch()
    # Unlike commands first: the group stays joined until a run is over.
    said: dict[str, Any] = {
        "seed": _call(*plain, "--seed", str(rank), "--out", str(folder / "seed")),
        "method": _call(*plain, "--method", method, "--out", str(folder / "method")),
        "taken": _call(*plain, "--out", str(folder / "taken")),
        "data": _call(
            *["--data", str(folder / ("data", "others")[rank]), *TINY],
            *["--out", str(folder / "data-differs")],
        ),
    }
    after_step, steps = MoCo.after_step, [0]

    def dying(self: MoCo, done: float) -> None:
        after_step(self, done)
        steps[0] += 1
        if rank == 1 and steps[0] == 5:
            torch.save(said, folder / "1.pt")
            os._exit(9)

    MoCo.after_step = dying  # type: ignore[method-assign]
    said["dead"] = _call(*plain, "--epochs=4", "--out", str(folder / "dead"))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    write_noise(made / "data")
    write_noise(made / "others", seed=1)
    return made


@pytest.fixture(scope="module")
def said(folder: Path) -> list[Said]:
    return launch_processes(_work, folder, seconds=240, codes=(0, 9))


@pytest.mark.parametrize(
    "case, message",
    [
        ("seed", "processes 0 and 1 differ in seed (0 and 1); start all of them with the same"),
        ("method", "processes 0 and 1 differ in "),
        ("taken", "taken exists and is not empty"),
        ("data", "processes 0 and 1 differ in sum of the data ("),
    ],
)
def test_processes_that_differ_are_told_in_one_line_each(
    case: str, message: str, said: list[Said], folder: Path
) -> None:
    for one in said:
        code, lines = one[case]
        assert (code, len(lines)) == (2, 1), lines
        assert message in lines[0]
    assert not any((folder / name).exists() for name in ("seed", "method", "data-differs"))


def test_a_process_that_dies_ends_the_other_and_its_checkpoint_is_kept(
    said: list[Said], folder: Path
) -> None:
    code, lines = said[0]["dead"]
    kept = folder / "dead" / "last.pt"
    assert (code, len(lines)) == (2, 1), lines
    assert "mixmask: another process died or is not responding (" in lines[0]
    assert lines[0].endswith(
        f"{kept} is kept: start all processes again with --resume {folder}/dead"
    )
    assert torch.load(kept, weights_only=True)["step"] == 3


def test_what_two_processes_began_one_may_end(said: list[Said], folder: Path) -> None:
    del said
    out = folder / "dead"
    assert _call("--resume", str(out), "--device=cpu")[0] == 0
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 12
