"""How long a command takes to start: `--help`, and from the command to the end of the first step.

Each is a process of its own. Beside it run one that imports torch, and one that also builds an
optimiser, for which torch imports its compiler: who trains avoids neither. The figures judged are
differences from importing torch, pair by pair.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, Figure, arguments, report

_TORCH = ("-c", "import torch")
_OPTIMIZER = ("-c", "import torch; torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)")
_HELP = ("-m", "mixmask", "--help")
# The first step ends the process: what follows would be measured otherwise.
_FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from mixmask.cli import main
register_optimizer_step_post_hook(lambda *_: os._exit(42))
sys.exit(main(sys.argv[1:]))
"""
_HELP_SECONDS, _STEP_SECONDS = 0.5, 4.0


def seconds(words: Sequence[str], expected: int = 0) -> float:
    """Return how long Python takes to run these arguments.

    Raises:
        RuntimeError: If it ends otherwise than expected.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    elapsed = time.perf_counter() - start
    if done.returncode != expected:
        raise RuntimeError(f"{words[:2]} ended with {done.returncode}: {done.stderr[-500:]}")
    return elapsed


def measure(repeats: int) -> list[Figure]:
    """Return the median of each process, and of its difference from importing torch."""
    samples: dict[str, list[float]] = {"torch": [], "optimiser": [], "help": [], "step": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            out = str(Path(folder) / f"run-{number}")
            pretrain = ("-c", _FIRST_STEP, "pretrain", "--out", out)
            times = (*map(seconds, (_TORCH, _OPTIMIZER, _HELP)), seconds(pretrain, 42))
            if number:  # The first round fills the caches of the disk.
                for name, value in zip(samples, times, strict=True):
                    samples[name].append(value)
    torch, optimiser, command_help, step = samples.values()

    def beyond(whole: list[float]) -> list[float]:
        return [own - alone for own, alone in zip(whole, torch, strict=True)]

    first = "mixmask pretrain, to the end of its first step"
    return [
        Figure.median("python -c 'import torch'", torch, "s"),
        Figure.median("importing torch and building an optimiser", optimiser, "s"),
        Figure.median("mixmask --help", command_help, "s"),
        Figure.median(
            "mixmask --help beyond importing torch", beyond(command_help), "s", _HELP_SECONDS
        ),
        Figure.median(first, step, "s"),
        Figure.median(f"{first}, beyond importing torch", beyond(step), "s", _STEP_SECONDS),
    ]


def main() -> None:
    """Measure both commands."""
    options = arguments(__doc__, repeats=7).parse_args()
    report("start", [], options, measure(options.repeats))


if __name__ == "__main__":
    main()
