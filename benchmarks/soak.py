"""Damage on purpose: kills, flipped bits, torn files, a full disk, dead processes, odd input.

Each part counts how many trials ended as they should, and lists those that did not. A trial runs
the command line in a process of its own, forked from one that has imported everything:

- `kills`: runs are killed at random moments and resumed, again and again; they must end in the
  weights of the run that nobody killed, to the bit.
- `flips`, `torn`: one bit of a checkpoint is flipped, or the file is cut; the damage must be
  reported, and the whole checkpoint beside it used.
- `disk`: files may grow to a random size only, as on a disk that fills up; the command must say so
  in one line, leave no temporary file, and go on when there is room.
- `ranks`: one of two processes is killed; the other must end, and the run must go on.
- `commands`, `configurations`: random command lines and edited `config.json`; they run, or are
  refused in one line, and write nothing outside the run folder.
- `drift`: one long run; slopes of memory, file handles, threads and time per step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import ROOT, Figure, arguments, report
from PIL import Image

from mixmask.cli import main as command_line
from mixmask.runs.folder import CONFIG, LAST, PREVIOUS

_TINY = [
    "--epochs=3",
    "--batch-size=8",
    "--image-size=32",
    "--queue-size=64",
    "--dim=16",
    "--threads=1",
    "--measure-every=0",
]
_TIMEOUT = 120
# Two processes on a CPU, a thread each.
_ALONE = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
# The long form's trials per part; `--small` takes a few.
_COUNTS = {
    "kills": 100,
    "flips": 200,
    "torn": 40,
    "disk": 20,
    "ranks": 10,
    "commands": 9_000,
    "configurations": 1_000,
    "drift": 10_000,
}
_FEW = {
    "kills": 3,
    "flips": 12,
    "torn": 6,
    "disk": 2,
    "ranks": 1,
    "commands": 40,
    "configurations": 20,
    "drift": 30,
}


@dataclass
class Ended:
    """How a command ended: its exit code (negative: the signal), what it printed, the time."""

    code: int
    text: str
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether it ran, was refused or was interrupted, without a traceback."""
        return self.code in (0, 2, 130) and "Traceback" not in self.text


@dataclass
class Part:
    """Trials of one kind, and what went wrong."""

    name: str
    random: random.Random
    folder: Path
    trials: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, passed: bool, described: str) -> None:
        """Add a trial."""
        self.trials += 1
        if not passed:
            self.failures.append(described)
            print(f"{self.name}: {described}", flush=True)


def run(
    words: Sequence[str],
    *,
    kill_after: float | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Ended:
    """Run the command line in a fork; kill it after some seconds if asked, hang or not."""
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                prepare()
                code = command_line(list(words))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = _wait(child, kill_after)
        output.seek(0)
        return Ended(code, output.read(), time.perf_counter() - began)


def _wait(child: int, kill_after: float | None) -> int:
    deadline = time.perf_counter() + (_TIMEOUT if kill_after is None else kill_after)
    while time.perf_counter() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for process in [*psutil.Process(child).children(recursive=True), psutil.Process(child)]:
        process.kill()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_images(folder: Path, count: int = 48) -> Path:
    """Write a small labelled folder of noise with a test split."""
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("test", 8)):
        for number in range(images):
            place = folder / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def pretrain(data: Path, out: Path, *more: str) -> list[str]:
    """Return the command that trains on a folder of noise."""
    return ["pretrain", "--data", str(data), "--arch=narrow", *_TINY, "--out", str(out), *more]


def weights(run_folder: Path) -> dict[str, Any]:
    """Return the trained state of a run."""
    content: dict[str, Any] = torch.load(run_folder / LAST, weights_only=True)
    return {key: content[key] for key in ("model", "optimizer", "step")}


def same(one: Any, other: Any) -> bool:
    """Compare nested states to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def kills(part: Part, count: int) -> None:
    """Kill runs at random moments until the kills are used up; each must end as the first."""
    data = make_images(part.folder / "data")
    whole = run(pretrain(data, part.folder / "whole"))
    if whole.code:
        raise RuntimeError(f"the run that nobody kills failed: {whole.text}")
    expected, left, number = weights(part.folder / "whole"), count, 0
    while left:
        number += 1
        out = part.folder / f"run-{number}"
        words, killed = pretrain(data, out), 0
        while True:
            moment = part.random.uniform(0.02, 1.1) * whole.seconds
            ended = run(words, kill_after=moment if left else None)
            if ended.code != -signal.SIGKILL:
                break
            killed, left = killed + 1, left - 1
            words = ["pretrain", "--resume", str(out)] if (out / CONFIG).exists() else words
        right = ended.code == 0 and same(weights(out), expected)
        for _ in range(killed):
            part.count(
                right, f"{out.name}, killed {killed} times: {ended.code} {ended.text[-300:]}"
            )


def flips(part: Part, count: int) -> None:
    """Flip one bit at every kind of place."""
    _damage(part, count, _flip)


def torn(part: Part, count: int) -> None:
    """Cut the file, or fill its end with zeros."""
    _damage(part, count, _tear)


def _flip(content: bytearray, chance: random.Random, trial: int) -> str:
    # Every third at the start (pickle) and at the end (directory), the rest anywhere (weights).
    size = len(content)
    low, high = ((0, size), (0, min(4096, size)), (max(0, size - 4096), size))[trial % 3]
    place, bit = chance.randrange(low, high), chance.randrange(8)
    content[place] ^= 1 << bit
    return f"bit {bit} of byte {place} of {size}"


def _tear(content: bytearray, chance: random.Random, trial: int) -> str:
    keep = chance.randrange(len(content))
    size = len(content)
    del content[keep:]
    if trial % 2:
        content.extend(bytes(size - keep))
    return f"{'zeros' if trial % 2 else 'end'} after byte {keep} of {size}"


def _damage(part: Part, count: int, spoil: Callable[[bytearray, random.Random, int], str]) -> None:
    data = make_images(part.folder / "data")
    out = part.folder / "run"
    if run(pretrain(data, out)).code:
        raise RuntimeError("the run to be damaged failed")
    good = (out / LAST).read_bytes()
    export = part.folder / "export.safetensors"
    words = ["export", str(out), "--to", "safetensors", "--out", str(export)]
    for trial in range(count):
        content = bytearray(good)
        described = spoil(content, part.random, trial)
        (out / LAST).write_bytes(content)
        export.unlink(missing_ok=True)
        ended = run(words)
        # Either the archive still holds every byte that counts, or it is told and the older used.
        told = LAST in ended.text and PREVIOUS in ended.text
        part.count(ended.code == 0 and ended.clean and told, f"{described}: {ended.text[-200:]!r}")
    (out / LAST).write_bytes(good)


def disk(part: Part, count: int) -> None:
    """Stop files from growing at a random size; then let the run go on."""
    data = make_images(part.folder / "data")
    whole = part.folder / "whole"
    run(pretrain(data, whole))
    expected, size = weights(whole), (whole / LAST).stat().st_size
    for trial in range(count):
        out = part.folder / f"run-{trial}"
        limit = part.random.randrange(2_000, size)

        def starve(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        ended = run(pretrain(data, out), prepare=starve)
        left = list(out.rglob("*.tmp")) if out.exists() else []
        words = ["pretrain", "--resume", str(out)] if (out / CONFIG).exists() else []
        again = run(words or pretrain(data, out))
        right = ended.code == 2 and ended.clean and not left and again.code == 0
        right = right and same(weights(out), expected)
        part.count(
            right, f"limit {limit}: {ended.code} {ended.text[-200:]!r} {again.text[-200:]!r}"
        )


def ranks(part: Part, count: int) -> None:
    """Kill one of two processes in turn; the other must end by itself, and the run go on."""
    data = make_images(part.folder / "data")
    whole = part.folder / "whole"
    done = _torchrun(pretrain(data, whole))
    if done.returncode:
        raise RuntimeError(f"two processes failed: {done.stderr[-500:]}")
    expected = weights(whole)
    for trial in range(count):
        out = part.folder / f"run-{trial}"
        killed = _torchrun(pretrain(data, out, "--epochs=200"), kill_rank=trial % 2, chance=part)
        ended = killed.returncode not in (0, None)
        again = _torchrun(["pretrain", "--resume", str(out)], seconds=5)
        goes_on = "Traceback" not in again.stderr or "is not a run folder" not in again.stderr
        part.count(ended and goes_on, f"rank {trial % 2}: {killed.stderr[-300:]!r}")
    part.count(same(weights(whole), expected), "the whole run changed")


def _torchrun(
    words: Sequence[str],
    *,
    kill_rank: int | None = None,
    chance: Part | None = None,
    seconds: float = _TIMEOUT,
) -> subprocess.CompletedProcess[str]:
    """Run two processes; kill one of them at a random moment, or both after some seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "mixmask"]
    launched = subprocess.Popen(
        [*command, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), **_ALONE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if kill_rank is not None and chance is not None:
        time.sleep(chance.random.uniform(12, 25))
        for child in psutil.Process(launched.pid).children(recursive=True):
            if child.environ().get("RANK") == str(kill_rank):
                child.kill()
    try:
        out, err = launched.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(launched.pid).children(recursive=True):
            child.terminate()
        launched.terminate()
        out, err = launched.communicate()
    return subprocess.CompletedProcess(command, launched.returncode, out, err)


# What a value may be in place of a sensible one.
_ODD = (
    "", "0", "-1", "1e999", "nan", "inf", "999999999999", "0.5", "x", "../..", "/dev/null", "None",
    "true", "[]", "{}", "é", "a" * 300, "--", "1,2", "--epochs", "%s", "\n",
)  # fmt: skip


def commands(part: Part, count: int) -> None:
    """Run random options of every command with sensible and odd values."""
    data = make_images(part.folder / "data", 16)
    out = part.folder / "run"
    run(pretrain(data, out))
    known = _options_of_commands()
    subjects = [str(out), str(out / LAST), str(data), "/nowhere", str(out / CONFIG), "clothing64"]
    for trial in range(count):
        words = _random_command(part.random, known, subjects, part.folder / f"new-{trial}")
        with _watched(part.folder, out) as outside:
            ended = run(words, prepare=_stop_at_first_step)
        fine = ended.clean or ended.code == 42
        part.count(fine and not outside, f"{words} {outside}: {ended.code} {ended.text[-300:]!r}")


def _options_of_commands() -> dict[str, list[argparse.Action]]:
    from mixmask.cli import _COMMANDS, _parser

    known = {}
    for name in _COMMANDS:  # A parser knows the options of one command.
        actions = _parser([name])._actions
        groups = next(a for a in actions if isinstance(a, argparse._SubParsersAction))
        known[name] = groups.choices[name]._actions
    return known


def _random_command(
    chance: random.Random,
    known: dict[str, list[argparse.Action]],
    subjects: Sequence[str],
    new: Path,
) -> list[str]:
    name = chance.choice(sorted(known))
    words = [name]
    for action in chance.sample(known[name], k=min(len(known[name]), chance.randrange(1, 6))):
        if isinstance(action, argparse._HelpAction):
            continue
        if not action.option_strings:
            words.append(chance.choice(subjects))
            continue
        words.append(action.option_strings[0])
        if action.nargs == 0:
            continue
        choices = list(action.choices or ())
        sensible = [str(action.default), str(new), *map(str, choices), *subjects, "1", "2", "0.1"]
        words.append(chance.choice(sensible if chance.random() < 0.6 else _ODD))
    if name == "pretrain":
        words += ["--threads=1", "--out", str(new)]
    return words


def _stop_at_first_step() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: os._exit(42))
    os.chdir(tempfile.mkdtemp())


@contextmanager
def _watched(allowed: Path, original: Path) -> Iterator[list[str]]:
    """List what a command changed in a run folder that it was to read only."""
    before = {path: path.stat().st_mtime_ns for path in (original / LAST, original / CONFIG)}
    changed: list[str] = []
    yield changed
    del allowed
    changed += [
        str(path)
        for path, stamp in before.items()
        if not path.exists() or path.stat().st_mtime_ns != stamp
    ]


def configurations(part: Part, count: int) -> None:
    """Edit, cut or fill `config.json` at random; resume and measure."""
    data = make_images(part.folder / "data", 16)
    out = part.folder / "run"
    run(pretrain(data, out))
    path = out / CONFIG
    good = path.read_text(encoding="utf-8")
    for trial in range(count):
        text, described = _spoil_configuration(good, part.random)
        path.write_bytes(text)
        command = (["pretrain", "--resume", str(out)], ["evaluate", "knn", str(out)])[trial % 2]
        ended = run(command, prepare=_stop_at_first_step)
        part.count(ended.clean or ended.code == 42, f"{described}: {ended.text[-300:]!r}")
        path.write_text(good, encoding="utf-8")


def _spoil_configuration(good: str, chance: random.Random) -> tuple[bytes, str]:
    config = json.loads(good)
    key = chance.choice(sorted(config))
    values: tuple[Any, ...] = (
        None,
        True,
        -1,
        0,
        1e308,
        "x",
        [],
        {},
        [0.1, 0.9],
        2**70,
        "../..",
        float("nan"),
    )
    kind = chance.choice(["missing", "other", "unknown", "cut", "bytes", "nested"])
    if kind == "missing":
        del config[key]
    elif kind == "other":
        config[key] = chance.choice(values)
    elif kind == "unknown":
        config[f"{key}_2"] = 1
    elif kind == "nested":
        return ("[" * 100_000).encode(), "deep nesting"
    text = json.dumps(config).encode()
    if kind == "cut":
        text = text[: chance.randrange(len(text))]
    if kind == "bytes":
        spoilt = bytearray(text)
        spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
        text = bytes(spoilt)
    return text, f"{kind} {key} {config.get(key)!r}"


def drift(part: Part, steps: int) -> list[Figure]:
    """Train a long run in this process; compare its second half with its first."""
    data = make_images(part.folder / "data", 80)
    process = psutil.Process()
    samples: list[tuple[float, int, int, int]] = []

    def sample(*_: object) -> None:
        if len(samples) % 10 == 0 or len(samples) < 2:
            used = process.memory_info().rss, process.num_fds(), process.num_threads()
            samples.append((time.perf_counter(), *used))
        else:
            samples.append((time.perf_counter(), *samples[-1][1:]))

    from torch.optim.optimizer import register_optimizer_step_post_hook

    hook = register_optimizer_step_post_hook(sample)
    epochs = max(2, steps // 10)
    code = command_line(pretrain(data, part.folder / "long", f"--epochs={epochs}"))
    hook.remove()
    part.count(code == 0, f"the long run ended with {code}")
    table = np.array(samples)
    table = table[len(table) // 10 :]  # The start fills caches.
    first, second = np.array_split(table, 2)
    times = [np.median(np.diff(half[:, 0])) for half in (first, second)]
    memory, handles, threads = (
        float(np.median(second[:, column]) - np.median(first[:, column])) for column in (1, 2, 3)
    )
    return [
        Figure("drift: steps", len(samples), "steps"),
        Figure("drift: resident memory, second half beyond the first", memory, "bytes"),
        Figure("drift: file handles, second half beyond the first", handles, "handles"),
        Figure("drift: threads, second half beyond the first", threads, "threads"),
        Figure("drift: time per step, second half by the first", float(times[1] / times[0]), ""),
    ]


PARTS: dict[str, Callable[[Part, int], list[Figure] | None]] = {
    "kills": kills,
    "flips": flips,
    "torn": torn,
    "disk": disk,
    "ranks": ranks,
    "commands": commands,
    "configurations": configurations,
    "drift": drift,
}


def main() -> None:
    """Run the parts that were asked for and write what they counted."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--part", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--count", type=int, help="trials of each part, in place of its own number")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices [0]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: list[Figure] = []
    failed = False
    for name in options.part or PARTS:
        count = options.count or (_FEW if options.small else _COUNTS)[name]
        with tempfile.TemporaryDirectory() as folder:
            part = Part(name, random.Random(f"{options.seed}-{name}"), Path(folder))
            figures += PARTS[name](part, count) or ()
            figures.append(
                Figure.bounded(
                    f"{name}: failures of {part.trials}", len(part.failures), "trials", 0
                )
            )
            failed |= bool(part.failures)
    report("soak", [], options, figures, variant="-".join(options.part or ()))
    sys.exit(failed)


if __name__ == "__main__":
    main()
