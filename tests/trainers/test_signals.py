"""Signals that end a run: in a step and outside of steps, alike for all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from commands import TINY

from mixmask import cli
from mixmask._signals import at_first_signal, interruptible

ENDINGS = ["SIGTERM", *(["SIGHUP"] if hasattr(signal, "SIGHUP") else [])]
every_ending = pytest.mark.parametrize("name", ENDINGS)

# What a run does when a signal arrives, outside of steps and in one.
IMAGES = ("mixmask.trainers.start", "load_images")
VIEWS = ("mixmask.trainers.start:Opened", "draw_views")
KNN = ("mixmask.evaluation.monitor", "knn_accuracy")
STEP = ("mixmask.trainers.methods.moco:MoCo", "after_step")
CURVES = ("mixmask.trainers.start:Opened", "draw_curves")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Check that every handler is put back."""
    numbers = [getattr(signal, name) for name in ("SIGINT", *ENDINGS)]
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def send_at(place: tuple[str, str], name: str, patch: pytest.MonkeyPatch, count: int = 1) -> None:
    """Send this process a signal at the first calls of a function or method."""
    owner = resolve_name(place[0])
    call, left = getattr(owner, place[1]), [count]

    def sending(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            signal.raise_signal(getattr(signal, name))
        return call(*arguments, **options)

    patch.setattr(owner, place[1], sending)


def train(two_classes: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(two_classes), "--grid-size", "2", "--epochs", "2"]
    return ["pretrain", *data, *TINY, "--measure-every", "0", "--out", str(out), *more]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


@every_ending
@pytest.mark.parametrize("place", [IMAGES, VIEWS, KNN, STEP, CURVES])
def test_a_signal_ends_a_run_in_one_line_wherever_it_is(
    name: str,
    place: tuple[str, str],
    two_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_at(place, name, patch)
        assert cli.main(train(two_classes, out)) == 130
    if place == IMAGES:  # There is nothing to continue yet.
        assert last_line(capsys) == "mixmask: interrupted"
        assert not out.exists()
        return
    advice = f"mixmask: interrupted; continue with mixmask pretrain --resume {out}"
    assert last_line(capsys) == advice
    assert (out / "last.pt").exists() == (place in (STEP, CURVES))
    if place == STEP:  # On the way to the images of a run that goes on, its folder is named too.
        with monkeypatch.context() as patch:
            send_at(IMAGES, name, patch)
            assert cli.main(["pretrain", "--resume", str(out)]) == 130
        assert last_line(capsys) == advice


@every_ending
@pytest.mark.parametrize("place", [("importlib", "import_module"), ("os", "replace")])
def test_a_signal_ends_other_commands_and_leaves_no_file(
    name: str,
    place: tuple[str, str],
    two_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While a command's modules are imported, and before the file that it wrote is in place."""
    images = [str(path) for path in sorted(two_classes.rglob("*.png"))[:2]]
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        send_at(place, name, patch)
        assert cli.main(["show", *images, "--out", str(tmp_path / "out" / "masks.png")]) == 130
    assert last_line(capsys) == "mixmask: interrupted"
    assert not any((tmp_path / "out").iterdir())


@every_ending
def test_a_second_signal_in_a_step_ends_it_at_once(
    name: str,
    two_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    for place in (STEP, ("mixmask.trainers.loop", "_measure_epoch")):  # The first, then the second.
        send_at(place, name, monkeypatch)
    assert cli.main(train(two_classes, out)) == 130
    assert last_line(capsys).endswith(f"continue with mixmask pretrain --resume {out}")
    assert not (out / "last.pt").exists()


@every_ending
def test_a_study_ends_alike(
    name: str,
    two_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "ablate", "--data", str(two_classes), *TINY, "--epochs", "1", "--seeds", "1",
        "--grid-size", "2", "--grid-sizes", "2", "--ratio", "0.5", "--out", str(tmp_path / "study"),
    ]  # fmt: skip
    for place in (("mixmask.cli.ablate", "load_data"), STEP):
        with monkeypatch.context() as patch:
            send_at(place, name, patch)
            assert cli.main(words) == 130
        assert last_line(capsys) == "mixmask: interrupted; the same command continues the study"
    config = next((tmp_path / "study").glob("*/seed-0/config.json"))
    content = json.loads(config.read_text())
    assert content["data"] == str(two_classes.resolve())
    assert content["fingerprint"]["train"] == 20


@pytest.mark.parametrize("name", ["SIGINT", *ENDINGS])
def test_a_signal_that_the_process_ignores_ends_nothing(
    name: str, two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGHUP under nohup, and SIGINT in a job that a script's shell has put in background."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        for place in (IMAGES, STEP):
            send_at(place, name, monkeypatch)
        assert cli.main(train(two_classes, tmp_path / "run", "--epochs", "1")) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_handlers_of_a_surrounding_program_prevail() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with interruptible():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_outside_of_the_main_thread_no_handler_is_set() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with interruptible(), at_first_signal(lambda *_: None):
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no terminals")
def test_a_run_whose_terminal_is_closed_saves_its_step(two_classes: Path, tmp_path: Path) -> None:
    import pty

    out = tmp_path / "run"
    command = train(two_classes, out, "--stream", "always", "--workers", "1", "--epochs", "4000")
    terminal, inner = pty.openpty()
    # The process leads a session on this terminal: it and its workers get the signal.
    script = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "from mixmask.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command],
        stdin=inner, stdout=inner, stderr=inner, start_new_session=True, env=os.environ,
    )  # fmt: skip
    os.close(inner)
    os.set_blocking(terminal, False)
    while not (out / "last.pt").exists():
        assert process.poll() is None
        try:
            os.read(terminal, 1 << 16)  # Otherwise it fills up, and whoever writes to it waits.
        except BlockingIOError:
            time.sleep(0.1)
    os.close(terminal)
    assert process.wait(timeout=60) == 130
    assert len((out / "metrics.csv").read_text().splitlines()) < 4000
