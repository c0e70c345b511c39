"""Does mixing help, where, and at what price? The runs that answer it, over many hours.

A plan (plans/*.json) lists cells: runs that differ in one thing. This script trains what is
missing of it, the most important part first, at low priority and with one thread per job. It can
be stopped at any time and goes on where it was; a finished cell is one JSON, and stays.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from common import ROOT, write_json
from evidence_cells import (
    Cell,
    Plan,
    load_plan,
    next_cells,
    read_results,
    resolve,
    resolve_within,
)
from evidence_lightly import train_lightly
from evidence_status import crashes, is_working, pause_flag, read_running, status
from evidence_train import Trainer, run_cell, train

# How often the runner looks at its jobs, and how long they may take to save.
_LOOK_SECONDS, _GRACE_SECONDS = 0.5, 180.0
# Nothing is started so shortly before the end.
_LAST_START_SECONDS = 60.0
# A cell that has crashed so often is left alone.
_CRASHES = 2
_INTERRUPTED = 130
_TRAINERS: dict[str, Trainer] = {"mixmask": train, "lightly": train_lightly}


@dataclass
class Job:
    """A cell that is being trained by a process of its own."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]


@dataclass
class Runner:
    """Works through what is missing of a plan, several cells at a time.

    Attributes:
        plan: The plan, or one part of it.
        whole: The whole plan, whose results choose the learning rates.
        options: The command line's options.
        until: When to stop, on the monotonic clock.
    """

    plan: Plan
    whole: Plan
    options: argparse.Namespace
    until: float
    jobs: list[Job] = field(default_factory=list)
    left_alone: set[str] = field(default_factory=set)
    paused: bool = False
    stopped: bool = False

    @property
    def state(self) -> Path:
        """The folder of unfinished runs."""
        state: Path = self.options.state
        return state

    def work(self) -> None:
        """Train until nothing is left, time is up, or the process is asked to stop."""
        for sent in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sent, self._stop)
        try:
            while not self.stopped and time.monotonic() < self.until:
                self._reap()
                self._follow_pause()
                if not self._fill() and not self.jobs:
                    break
                time.sleep(_LOOK_SECONDS)
        finally:
            self._end()

    def _stop(self, number: int, frame: object) -> None:
        del number, frame
        self.stopped = True

    def _fill(self) -> bool:
        """Start cells on idle places; tell whether there was any to start."""
        if self.until - time.monotonic() < _LAST_START_SECONDS and self.jobs:
            return False
        if self.paused or len(self.jobs) >= self.options.jobs:
            return True
        results = read_results(self.options.results)
        plan = resolve_within(self.plan, self.whole, results)
        begun = [path.parent.name for path in self.state.glob("*/*/run")]
        busy = [job.cell.name for job in self.jobs]
        for cell in next_cells(plan, results, begun, [*busy, *self.left_alone]):
            if crashes(self.state, cell.name) >= _CRASHES:
                self.left_alone.add(cell.name)
                continue
            self._start(cell)
            return True
        return False

    def _start(self, cell: Cell) -> None:
        folder = self.state / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / f"{cell.name}.txt").open("ab")
        words = [sys.executable, str(ROOT / "evidence.py"), "--cell", cell.name]
        words += ["--plan", self.options.plan, "--state", str(self.state)]
        words += ["--results", str(self.options.results)]
        if self.options.data_root is not None:
            words += ["--data-root", str(self.options.data_root)]
        # Detached from the terminal, so that Ctrl-C reaches the runner alone, which then asks once.
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.jobs.append(Job(cell, process, log))
        say(f"started {cell.name}")
        self._note()

    def _reap(self) -> None:
        """Report jobs that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            job.log.close()
            code = job.process.returncode
            if code == 0:
                say(f"finished {job.cell.name}")
            elif code in (_INTERRUPTED, -signal.SIGTERM):
                say(f"saved {job.cell.name}")
            else:
                self._report_crash(job, code)
            self._note()

    def _report_crash(self, job: Job, code: int) -> None:
        """Name a crash, and leave the cell alone for the rest of this window."""
        name = job.cell.name
        lines = Path(job.log.name).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        write_json(
            self.state / "crashes" / f"{name}.json",
            {"times": crashes(self.state, name) + 1, "last": last},
        )
        self.left_alone.add(name)
        say(f"CRASHED {name}, exit code {code}: {last}")

    def _follow_pause(self) -> None:
        """Stop or continue the jobs' processes as the flag in the state's folder says."""
        wanted = pause_flag(self.state).exists()
        if wanted == self.paused:
            return
        self._send(signal.SIGSTOP if wanted else signal.SIGCONT)
        self.paused = wanted
        say("paused" if wanted else "resumed")
        self._note()

    def _send(self, number: signal.Signals) -> None:
        for job in self.jobs:
            if job.process.poll() is None:
                job.process.send_signal(number)

    def _note(self) -> None:
        """Write down what is running, for `--status`."""
        write_json(
            self.state / "running.json",
            {"paused": self.paused, "cells": [job.cell.name for job in self.jobs]},
        )

    def _end(self) -> None:
        """Ask all jobs to save, wait for them, and kill one that does not end."""
        self._send(signal.SIGTERM)
        self._send(signal.SIGCONT)
        deadline = time.monotonic() + _GRACE_SECONDS
        while self.jobs and time.monotonic() < deadline:
            self._reap()
            time.sleep(_LOOK_SECONDS / 5)
        self._send(signal.SIGKILL)
        for job in self.jobs:
            job.process.wait()
            say(f"killed {job.cell.name}, which goes on from its last epoch")
        self.jobs.clear()
        self._note()


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def work_through(plan: Plan, whole: Plan, options: argparse.Namespace) -> None:
    """Be the only runner in the state's folder, for so many minutes."""
    options.state.mkdir(parents=True, exist_ok=True)
    with (options.state / "runner.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another runner works in {options.state}; stop it, or give another --state"
            ) from None
        until = time.monotonic() + 60 * options.minutes
        Runner(plan, whole, options, until).work()
    print(status(plan, whole, options.results, options.state))


def set_pause(state: Path, paused: bool) -> None:
    """Pause or continue the jobs, and wait until the runner has done it."""
    flag = pause_flag(state)
    if paused:
        state.mkdir(parents=True, exist_ok=True)
        flag.touch()
    else:
        flag.unlink(missing_ok=True)
    deadline = time.monotonic() + 20 * _LOOK_SECONDS
    while is_working(state) and time.monotonic() < deadline:
        if read_running(state)["paused"] == paused:
            break
        time.sleep(_LOOK_SECONDS / 5)
    word = "paused" if paused else "resumed"
    print(word if is_working(state) else f"{word}; no runner works in {state}")


def rerun(whole: Plan, options: argparse.Namespace) -> None:
    """Train one cell in this process."""
    torch.set_num_threads(1)
    os.nice(19)
    # Linux shares the CPUs between sessions first, and only within each by `nice`.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19", encoding="utf-8")
    cell = resolve(whole, read_results(options.results)).find(options.cell)
    if not cell.resolved:
        raise ValueError(f"{cell.name} waits for the cells that choose its learning rate")
    command = f"python benchmarks/evidence.py --plan {whole.name} --data-root DIR --cell "
    record = run_cell(
        cell,
        _TRAINERS[cell.code],
        options.data_root,
        options.state,
        options.results,
        command + cell.name,
    )
    (options.state / "crashes" / f"{cell.name}.json").unlink(missing_ok=True)
    final = record["final"]
    if final is None:
        print(f"{cell.name}: {record['failed']}")
    else:
        print(f"{cell.name}: kNN {final['knn']:.2%}, linear {final['linear']:.2%}")


def main() -> None:
    """Do what the options ask for."""
    options = _options()
    whole = load_plan(options.plan)
    plan = whole.select(options.part)
    if options.status:
        print(status(plan, whole, options.results, options.state))
    elif options.pause or options.resume:
        set_pause(options.state, options.pause)
    elif options.cell:
        rerun(whole, options)
    else:
        work_through(plan, whole, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="cpu", help="name of a file in plans/, or its path")
    parser.add_argument("--part", help="work on one part of it, by number or name")
    parser.add_argument("--data-root", type=Path, help="folder of the data sets")
    parser.add_argument("--minutes", type=float, default=150.0, help="stop after so long")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path.home() / ".cache" / "mixmask" / "evidence",
        help="folder of unfinished runs",
    )
    parser.add_argument(
        "--results", type=Path, help="folder of the JSONs; default: results/evidence/PLAN"
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--status", action="store_true", help="say what is done and what is left")
    asked.add_argument("--pause", action="store_true", help="halt the jobs of a runner")
    asked.add_argument("--resume", action="store_true", help="let them go on")
    asked.add_argument("--cell", metavar="NAME", help="run one cell alone, again")
    options = parser.parse_args()
    if options.results is None:
        options.results = ROOT / "results" / "evidence" / Path(options.plan).stem
    return options


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"evidence.py: {error}")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
