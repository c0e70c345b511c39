"""What the parts of `soak.py` are made of: forked commands, counted trials, tiny runs."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from PIL import Image

import mixmask
from mixmask.cli import main as command_line
from mixmask.runs.files import LAST
from mixmask.trainers.start import Opened

TINY = [
    "--arch=narrow", "--epochs=3", "--batch-size=8", "--image-size=32", "--queue-size=64",
    "--dim=16", "--threads=1", "--measure-every=0", "--save-every=2",
]  # fmt: skip
# Seconds after which a command hangs, on a machine that may do much else.
TIMEOUT = 600
# What a command that reached its first step of training ends with, where that is enough.
TRAINED = 42
# What a command may allocate beyond its libraries, so that one of them does not fill the machine.
_MEMORY = 6 * 2**30
_LIBRARIES = (
    "accelerate", "einops._torch_specific", "matplotlib.backends.backend_agg", "pycocotools",
    "safetensors.torch", "timm.optim.lars", "torch._dynamo", "torchmetrics.detection",
    "torchvision",
)  # fmt: skip
# What Python reports of a file that is changed: flags of `open`; events, and how many paths.
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGING = {
    "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2,
}  # fmt: skip


@dataclass
class Ended:
    """How a command ended: its exit code (negative: the signal), what it printed, the time."""

    code: int
    text: str
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether it ran, was refused or was interrupted, without a traceback."""
        return self.code in (0, 2, 130, TRAINED) and "Traceback" not in self.text


@dataclass
class Part:
    """Trials of one kind, and what went wrong."""

    name: str
    random: random.Random
    folder: Path
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def trials(self) -> int:
        """How many there were, of all kinds."""
        return sum(self.kinds.values())

    def count(self, passed: bool, described: str, kind: str = "") -> None:
        """Add a trial."""
        self.kinds[kind] += 1
        if not passed:
            self.failures.append(described)
            print(f"{self.name}: {described}", flush=True)


def import_everything() -> None:
    """Import what commands import, so that a forked one starts at once."""
    shell = ("integrations", "examples", "__main__")
    for module in pkgutil.walk_packages(mixmask.__path__, "mixmask."):
        if not any(word in module.name for word in shell):
            importlib.import_module(module.name)
    for name in _LIBRARIES:
        importlib.import_module(name)
    Image.init()


def run(
    words: Sequence[str],
    *,
    kill_after: float | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> Ended:
    """Run the command line in a fork; kill it after some seconds if asked, hang or not."""
    (ended,) = run_together([words], kill_after=kill_after, prepare=prepare)
    return ended


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    kill: int = 0,
    kill_after: float | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> list[Ended]:
    """Run one command, or several as the ranks of a group; kill one of them if asked.

    Args:
        commands: Their words, by rank.
        kill: The rank to kill.
        kill_after: When, in seconds. Default: never, but for those that hang.
        prepare: Called in each process before its command.
    """
    ranks = _rank_environments(len(commands))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / str(rank)).open("w+") for rank in range(len(commands))]
        children = [
            _fork(words, file, environment, prepare)
            for words, file, environment in zip(commands, files, ranks, strict=True)
        ]
        ended: dict[int, Ended] = {}
        while len(ended) < len(children):
            seconds = time.perf_counter() - began
            for rank, (child, file) in enumerate(zip(children, files, strict=True)):
                if rank in ended:
                    continue
                due = kill_after is not None and rank == kill and seconds > kill_after
                if due or seconds > TIMEOUT:
                    _kill(child)
                done, status = os.waitpid(child, 0 if due or seconds > TIMEOUT else os.WNOHANG)
                if done:
                    file.seek(0)
                    code = os.waitstatus_to_exitcode(status)
                    ended[rank] = Ended(code, file.read(), seconds)
                    file.close()
            time.sleep(0.005)
    return [ended[rank] for rank in range(len(children))]


def _rank_environments(count: int) -> list[dict[str, str]]:
    """Return what a launcher sets for each process of a group; nothing for a single one."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "MIXMASK_TIMEOUT": "60",
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _fork(
    words: Sequence[str],
    output: IO[str],
    environment: Mapping[str, str],
    prepare: Callable[[], object],
) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        _reset_signals()
        _redirect(output)
        os.environ.update(environment)
        prepare()
        code = command_line(list(words))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _redirect(output: IO[str]) -> None:
    for number in (1, 2):
        os.dup2(output.fileno(), number)


def _kill(child: int) -> None:
    """Kill a process and what it has started."""
    for process in [*psutil.Process(child).children(recursive=True), psutil.Process(child)]:
        process.kill()


@dataclass(frozen=True)
class Command:
    """A command to run in one process with many others.

    Attributes:
        words: Of the command line.
        files: What to write before it.
        writable: Whether it may write into the guarded folder.
    """

    words: Sequence[str]
    files: Mapping[Path, bytes] = field(default_factory=dict)
    writable: bool = False


class _TrainedError(BaseException):
    """Training has begun, which is far enough."""


class _OutsideError(BaseException):
    """A command wrote where it had no business."""


def run_many(commands: Sequence[Command], guarded: Path) -> Iterator[Ended]:
    """Run commands one after the other in one fork, and in another one after a death or hang.

    They work in a folder that is emptied after each, and end at their first step of training.

    Args:
        commands: The commands.
        guarded: The folder with runs and images; writing there, or outside of all temporary
            folders, is an error.
    """
    done = 0
    while done < len(commands):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _serve(commands[done:], guarded, writer)
        os.close(writer)
        with os.fdopen(reader) as results:
            while done < len(commands):
                ready, _, _ = select.select([results], [], [], TIMEOUT)
                line = results.readline() if ready else ""
                if not line:
                    break
                done += 1
                yield Ended(**json.loads(line))
            else:
                os.waitpid(child, 0)
                return
            if not ready:
                _kill(child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done += 1
        yield Ended(code or 70, "it died" if ready else "it hangs", float(TIMEOUT))


def _serve(commands: Sequence[Command], guarded: Path, writer: int) -> None:
    """Run commands in this process, and write how each ended to a pipe, as a line of JSON."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def stop(*_: object) -> None:
        raise _TrainedError

    register_optimizer_step_post_hook(stop)
    draw_nothing()
    Figure.savefig = lambda _, path, **__: Path(path).touch()  # type: ignore[method-assign]
    torch._dynamo.config.disable = True  # Compiling takes longer than all else together.
    limit = psutil.Process().memory_info().vms + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    scratch = Path(tempfile.mkdtemp(dir=guarded.parent))
    os.chdir(scratch)
    writable = [True]
    _guard(guarded, writable)
    with tempfile.TemporaryFile("w+") as output, os.fdopen(writer, "w") as results:
        _redirect(output)
        for command in commands:
            writable[0] = True
            for path, content in command.files.items():
                path.write_bytes(content)
            writable[0] = command.writable
            code, seconds = _call(command.words)
            sys.stdout.flush()
            sys.stderr.flush()
            output.seek(0)
            ended = {"code": code, "text": output.read()[-2000:], "seconds": seconds}
            results.write(json.dumps(ended) + "\n")
            results.flush()
            output.seek(0)
            output.truncate()
            for path in scratch.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    os._exit(0)


def _reset_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(words: Sequence[str]) -> tuple[int, float]:
    began = time.perf_counter()
    try:
        code = command_line(list(words))
    except _TrainedError:
        code = TRAINED
    except BaseException:
        traceback.print_exc()
        code = 70
    _reset_signals()
    return code, time.perf_counter() - began


def _guard(folder: Path, writable: Sequence[bool]) -> None:
    """Stop this process from changing a folder's files, or any outside of temporary folders."""
    temporary = tempfile.gettempdir()

    def check(path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # A descriptor, of a file that was opened before.
        place = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100
        kept = place.is_relative_to(folder) and not writable[0]
        if kept or not place.is_relative_to(temporary):
            raise _OutsideError(str(place))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & _CHANGES
            if changes and arguments[0] != os.devnull:
                check(arguments[0])
        elif event in _CHANGING:
            for path in arguments[: _CHANGING[event]]:
                check(path)

    sys.addaudithook(hook)


def make_images(folder: Path, count: int = 48, *, labelled: bool = False) -> Path:
    """Write a small folder of noise, with classes and a test split if asked."""
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("test", 8 * labelled)):
        for number in range(images):
            place = folder / split / f"class{number % 2 * labelled}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def pretrain(data: Path, out: Path, *more: str) -> list[str]:
    """Return the command that trains on a folder of noise."""
    return ["pretrain", "--data", str(data), *TINY, "--out", str(out), *more]


def make_run(part: Part, count: int = 48, *, labelled: bool = False) -> Path:
    """Train on a folder of noise, and return the run folder."""
    out = part.folder / "run"
    data = make_images(part.folder / "data", count, labelled=labelled)
    ended = run(pretrain(data, out))
    if ended.code:
        raise RuntimeError(f"the first run of {part.name} failed: {ended.text}")
    return out


def draw_nothing() -> None:
    """Leave a run's figures out, which take as long as the rest of a tiny one."""
    for name in ("draw_views", "draw_curves"):
        setattr(Opened, name, lambda _: None)


def weights(run_folder: Path) -> dict[str, Any]:
    """Return the trained state of a run; nothing if it has none."""
    if not (run_folder / LAST).exists():
        return {}
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
