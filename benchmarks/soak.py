"""Damage on purpose: kills, flipped bits, torn files, full disks, dead processes, odd input.

Each part counts how many trials ended as they should, and lists those that did not. The command
line runs in processes forked from one that has imported everything:

- `kills`: runs are killed at random moments and resumed, again and again; they must end in the
  weights of the run that nobody killed, to the bit.
- `flips`, `torn`: one bit of a checkpoint is flipped, or the file is cut; the damage must be
  reported, and the whole checkpoint beside it used.
- `disk`: a small file system fills up, or files may grow to a random size only; the command must
  say so in one line, leave no temporary file, and go on to the same weights when there is room.
- `ranks`: one of two processes is killed; the other must end by itself in one line, and both,
  started again, must end in the same weights.
- `commands`, `configurations`: random command lines and edited `config.json`; they run, or are
  refused in one line, and write nothing outside their own folder.
- `drift`: one long run; growth of memory, file handles, threads and time per step.

Parts may be run alone (`--part`) and with several seeds, all into one record; the same seed again
replaces its figures. Ctrl-C ends a part early, with the trials that are done.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import ROOT, arguments, circumstances, slug, write_json
from safetensors.torch import load_file
from soak_trials import (
    Command,
    Part,
    draw_nothing,
    import_everything,
    make_images,
    make_run,
    pretrain,
    run,
    run_many,
    run_together,
    same,
    weights,
)

from mixmask.cli import _COMMANDS, _parser
from mixmask.cli import main as command_line
from mixmask.runs.files import LAST, PREVIOUS
from mixmask.runs.folder import CONFIG

# Trials of each part, and with `--small`.
_COUNTS = {
    "kills": (100, 4), "flips": (200, 6), "torn": (40, 4), "disk": (20, 2), "ranks": (10, 1),
    "commands": (9_000, 40), "configurations": (1_000, 20), "drift": (10_000, 30),
}  # fmt: skip


def kills(part: Part, count: int) -> None:
    """Kill runs at random moments until the kills are used up; each must end as the first."""
    whole = make_run(part)
    expected, data = weights(whole), part.folder / "data"
    alone = run(pretrain(data, part.folder / "again"), prepare=draw_nothing)
    part.count(same(weights(part.folder / "again"), expected), "two runs differ", "without a kill")
    left, number = count, 0
    while left:
        number += 1
        out = part.folder / f"run-{number}"
        words, killed = pretrain(data, out), 0
        while True:
            after = part.random.uniform(0.02, 1.1) * alone.seconds if left else None
            ended = run(words, kill_after=after, prepare=draw_nothing)
            if ended.code != -signal.SIGKILL:
                break
            killed, left = killed + 1, left - 1
            words = ["pretrain", "--resume", str(out)] if (out / CONFIG).exists() else words
        right = ended.code == 0 and same(weights(out), expected)
        said = f"{out.name}, killed {killed} times: {ended.code} {ended.text[-300:]}"
        for _ in range(killed):
            part.count(right, said, "killed")


def flips(part: Part, count: int) -> None:
    """Flip one bit at every kind of place."""
    _damage(part, count, _flip)


def torn(part: Part, count: int) -> None:
    """Cut the file, or fill its end with zeros."""
    _damage(part, count, _tear)


def _flip(content: bytearray, chance: random.Random, trial: int) -> str:
    size = len(content)
    places = {"anywhere": (0, size), "first 4 KiB": (0, 4096), "last 4 KiB": (size - 4096, size)}
    place = list(places)[trial % 3]
    low, high = places[place]
    content[chance.randrange(low, high)] ^= 1 << chance.randrange(8)
    return place


def _tear(content: bytearray, chance: random.Random, trial: int) -> str:
    keep, size = chance.randrange(len(content)), len(content)
    del content[keep:]
    if trial % 2:
        content.extend(bytes(size - keep))
    return "end zeroed" if trial % 2 else "end missing"


def _damage(part: Part, count: int, spoil: Callable[[bytearray, random.Random, int], str]) -> None:
    out, export = make_run(part), part.folder / "export.safetensors"
    words = ["export", "--to", "safetensors", "--out", str(export)]
    if run([*words, str(out / PREVIOUS)]).code:
        raise RuntimeError(f"{PREVIOUS} cannot be exported")
    expected, good = load_file(export), (out / LAST).read_bytes()
    for trial in range(count):
        content = bytearray(good)
        kind = spoil(content, part.random, trial)
        (out / LAST).write_bytes(content)
        export.unlink(missing_ok=True)
        ended = run([*words, str(out)])
        right = ended.code == 0 and ended.clean and LAST in ended.text and PREVIOUS in ended.text
        right = right and same(load_file(export), expected)
        part.count(right, f"trial {trial}, {kind}: {ended.text[-200:]!r}", kind)


def disk(part: Part, count: int) -> None:
    """Let a disk be full at a random size, then let the run go on when there is room."""
    whole = make_run(part)
    data, expected, size = part.folder / "data", weights(whole), (whole / LAST).stat().st_size
    for trial in range(count):
        kind = ("limit on files", "full tmpfs")[trial % 2]
        place = part.folder / str(trial)
        place.mkdir()
        # Up to two checkpoints and the one that is written lie on the disk.
        room = part.random.randrange(4_000, size if trial % 2 == 0 else 3 * size)
        with _small_disk(place, room) if trial % 2 else nullcontext() as grow:
            limit = sys.maxsize if trial % 2 else room
            ended = run(pretrain(data, place / "run"), prepare=partial(_limit_files, limit))
            left = list(place.rglob("*.tmp"))
            if grow:
                grow()
            begun = (place / "run" / CONFIG).exists()
            words = ["pretrain", "--resume", str(place / "run")]
            again = run(words if begun else pretrain(data, place / "run"))
            right = ended.code == 2 and ended.clean and not left and again.code == 0
            right = right and same(weights(place / "run"), expected)
        said = f"{room} bytes: {ended.code} {ended.text[-200:]!r} {left} {again.text[-200:]!r}"
        part.count(right, f"{kind}, {said}", kind)


def _limit_files(most: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@contextmanager
def _small_disk(place: Path, room: int) -> Iterator[Callable[[], object]]:
    """Mount a file system with little room, which needs root; yields what makes room."""
    call = partial(subprocess.run, check=True)
    call(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(place)])
    try:
        yield lambda: call(["mount", "-o", "remount,size=64m", str(place)])
    finally:
        call(["umount", str(place)])


def ranks(part: Part, count: int) -> None:
    """Kill one of two processes in turn; the other must end by itself, and the run go on."""
    data = make_images(part.folder / "data")
    both = run_together([pretrain(data, part.folder / "whole")] * 2, prepare=draw_nothing)
    if any(ended.code for ended in both):
        raise RuntimeError(f"two processes failed: {both}")
    expected, seconds = weights(part.folder / "whole"), both[0].seconds
    for trial in range(count):
        out, rank = part.folder / f"run-{trial}", trial % 2
        words, killed = pretrain(data, out), False
        while not killed:
            moment = part.random.uniform(0.1, 0.9) * seconds
            both = run_together([words] * 2, kill=rank, kill_after=moment, prepare=draw_nothing)
            killed = both[rank].code == -signal.SIGKILL
            if not killed:  # The run was over before.
                words = pretrain(data, out := part.folder / f"{out.name}-again")
        other = both[1 - rank]
        ended = other.code == 2 and other.clean and other.text.count("another process died") == 1
        begun = (out / CONFIG).exists()
        again = run_together([["pretrain", "--resume", str(out)] if begun else words] * 2)
        right = ended and not any(one.code for one in again) and same(weights(out), expected)
        said = f"{other.code} {other.text[-300:]!r} {[one.text[-200:] for one in again]}"
        part.count(right, f"rank {rank} after {moment:.2f} s: {said}", f"rank {rank}")


_OUTCOMES = {0: "ran", 2: "refused"}
# What a value may be in place of a sensible one.
_ODD = (
    "", "0", "-1", "1e999", "nan", "inf", "999999999999", "0.5", "x", "../..", "/dev/null", "None",
    "true", "[]", "{}", "é", "a" * 300, "--", "1,2", "--epochs", "%s", "\n",
)  # fmt: skip


def commands(part: Part, count: int) -> None:
    """Run random options of every command with sensible and odd values."""
    kept = part.folder = part.folder / "kept"
    out = make_run(part, 16, labelled=True)
    subjects = [
        str(place) for place in (out, out / LAST, out / CONFIG, kept / "data", "/no", "clothing64")
    ]
    known = {name: _options_of(name) for name in _COMMANDS}
    listed = [Command(_random_command(part.random, known, subjects)) for _ in range(count)]
    for command, ended in zip(listed, run_many(listed, kept), strict=True):
        said = f"{list(command.words)}: {ended.code} {ended.text[-600:]!r}"
        part.count(ended.clean, said, _OUTCOMES.get(ended.code, "trained"))


def _options_of(name: str) -> list[argparse.Action]:
    actions = _parser([name])._actions  # A parser knows the options of one command.
    groups = next(a for a in actions if isinstance(a, argparse._SubParsersAction))
    options: list[argparse.Action] = groups.choices[name]._actions
    return [action for action in options if not isinstance(action, argparse._HelpAction)]


def _random_command(
    chance: random.Random, known: dict[str, list[argparse.Action]], subjects: Sequence[str]
) -> list[str]:
    name = chance.choice(sorted(known))
    words = [name]
    if name == "pretrain" and chance.random() < 0.4:  # Most others are refused for their size.
        words = pretrain(Path(subjects[3]), Path("new"))
    elif name in ("pretrain", "ablate"):  # The embedded data take long.
        words += ["--data", subjects[3], "--epochs=1"]
    options = [action for action in known[name] if action.option_strings]
    # What is required is mostly there.
    chosen = [action for action in known[name] if action.required and chance.random() < 0.9]
    for action in chosen + chance.sample(options, k=min(len(options), chance.randrange(5))):
        words += action.option_strings[:1]
        if action.nargs != 0:
            odd = chance.random() < 0.2
            words.append(chance.choice(_ODD if odd else _sensible(action, subjects)))
    if name in ("embed", "map", "neighbours") and "--out" not in words:
        words += ["--out", "new"]  # In place of RUN, which is guarded.
    return words


def _sensible(action: argparse.Action, subjects: Sequence[str]) -> list[str]:
    if action.choices:
        return list(map(str, action.choices))
    if action.type in (int, float):
        return ["1", "2", "4", "16" if action.type is int else "0.1"]
    return ["new", "new.png"] if action.dest == "out" else list(subjects)


def configurations(part: Part, count: int) -> None:
    """Edit, cut or fill `config.json` at random; resume and measure."""
    kept = part.folder = part.folder / "kept"
    out = make_run(part, 16, labelled=True)
    good = (out / CONFIG).read_bytes()
    listed = []
    for trial in range(count):
        words = (["pretrain", "--resume", str(out)], ["evaluate", "knn", str(out)])[trial % 2]
        spoilt = _spoil_configuration(good, part.random)
        listed.append(Command(words, {out / CONFIG: spoilt}, writable=True))
    for command, ended in zip(listed, run_many(listed, kept), strict=True):
        said = f"{list(command.words)} {command.files[out / CONFIG][:3000]!r}"
        part.count(
            ended.clean,
            f"{said}: {ended.code} {ended.text[-600:]!r}",
            _OUTCOMES.get(ended.code, "trained"),
        )


def _spoil_configuration(good: bytes, chance: random.Random) -> bytes:
    config = json.loads(good)
    key = chance.choice(sorted(config))
    values: tuple[Any, ...] = (
        None, True, -1, 0, 1e308, "x", [], {}, [0.1, 0.9], 2**70, "../..", float("nan"),
    )  # fmt: skip
    kind = chance.choice(["missing", "other", "unknown", "cut", "bytes", "nested"])
    if kind == "nested":
        return b"[" * 100_000
    if kind == "missing":
        del config[key]
    elif kind == "other":
        config[key] = chance.choice(values)
    elif kind == "unknown":
        config[f"{key}_2"] = 1
    text = bytearray(json.dumps(config).encode())
    if kind == "cut":
        del text[chance.randrange(len(text)) :]
    elif kind == "bytes":
        text[chance.randrange(len(text))] = chance.randrange(256)
    return bytes(text)


def drift(part: Part, steps: int) -> dict[str, float]:
    """Train a long run in this process; compare its second half with its first."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    data = make_images(part.folder / "data", 80)
    process = psutil.Process()
    samples: list[tuple[float, int, int, int]] = []

    def sample(optimizer: object, *_: object) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            return  # The linear probe's.
        used = samples[-1][1:] if samples else (0, 0, 0)
        if len(samples) % 10 == 0:
            used = process.memory_info().rss, process.num_fds(), process.num_threads()
        samples.append((time.perf_counter(), *used))

    hook = register_optimizer_step_post_hook(sample)
    # Epochs of ten steps; noise would collapse at the usual rate.
    long = ("--save-every=0", "--lr=1e-4", f"--epochs={max(2, steps // 10)}")
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = command_line(pretrain(data, part.folder / "long", *long))
    hook.remove()
    described = f"it ended with {code}: {said.getvalue()[-300:]!r}"
    part.count(code in (0, 130), described, f"{len(samples):,} steps")
    table = np.array(samples)[len(samples) // 10 :]  # The start fills caches.
    first, second = np.array_split(table, 2)
    times = [np.median(np.diff(half[:, 0])) for half in (first, second)]
    growth = {
        name: float(np.median(second[:, column]) - np.median(first[:, column]))
        for column, name in enumerate(("bytes of memory", "file handles", "threads"), start=1)
    }
    return {**growth, "time per step, second half by first": float(times[1] / times[0])}


PARTS: dict[str, Callable[[Part, int], dict[str, float] | None]] = {
    "kills": kills, "flips": flips, "torn": torn, "disk": disk, "ranks": ranks,
    "commands": commands, "configurations": configurations, "drift": drift,
}  # fmt: skip


def main() -> None:
    """Run the parts that were asked for and write what they counted."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--part", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--count", type=int, help="trials of each part, in place of its own number")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices [0]")
    options = parser.parse_args()
    out = options.out or ROOT / "results" / f"soak-{slug(options.device)}.json"
    for number in (signal.SIGINT, signal.SIGTERM):  # In the background, too.
        signal.signal(number, signal.default_int_handler)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    import_everything()
    failed = False
    for name in options.part or PARTS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            part = Part(name, random.Random(f"{options.seed}-{name}"), Path(folder))
            growth: dict[str, float] | None = None
            try:
                growth = PARTS[name](part, options.count or _COUNTS[name][options.small])
            except KeyboardInterrupt:
                print(f"{name} was interrupted; what it has counted is kept")
        failed |= bool(part.failures)
        print(f"{name}: {part.trials} trials, {len(part.failures)} failures", flush=True)
        if options.out or not options.small:
            around = circumstances(options.device)
            counted = {
                "kinds": dict(part.kinds), "failures": part.failures, "growth": growth,
                "seconds": time.perf_counter() - began,
                "commit": around["commit"], "date": around["date"],
            }  # fmt: skip
            _record(out, name, str(options.seed), counted, {"small": options.small, **around})
    sys.exit(failed)


def _record(out: Path, name: str, seed: str, counted: Any, around: dict[str, Any]) -> None:
    """Put what a part has counted with a seed into the record, beside what others write there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        known = json.loads(out.read_text(encoding="utf-8"))["soak"] if out.exists() else {}
        known.setdefault(name, {})[seed] = counted
        write_json(out, {"script": "soak", **around, "soak": known})
    finally:
        os.close(folder)


if __name__ == "__main__":
    main()
