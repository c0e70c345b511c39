"""Side-by-side timing, peak memory, and records that carry their circumstances."""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mixmask
from mixmask.runs import files

Side = Callable[[], object]

ROOT = Path(__file__).resolve().parent
# A sample of one side lasts at least this long, so that the clock and one launch do not count.
_SAMPLE_SECONDS = 0.02
_UNITS = {"time": "s", "peak memory": "bytes", "synchronisations": "per step"}


@dataclass(frozen=True)
class Spread:
    """What a list of samples looks like."""

    median: float
    q1: float
    q3: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise at least one sample."""
        q1, median, q3 = (
            statistics.quantiles(samples, n=4, method="inclusive")
            if len(samples) > 1
            else (samples[0],) * 3
        )
        return cls(median, q1, q3, min(samples), max(samples))


@dataclass(frozen=True)
class Case:
    """One figure: ours against a counterpart.

    Attributes:
        name: What was measured.
        against: The counterpart.
        quantity: "time", "peak memory" or "synchronisations".
        unit: Of `ours` and `theirs`.
        sizes: Everything that the figure depends on.
        n: Samples per side.
        calls: Calls within one sample; times are for one call.
        ours: Samples of this package.
        theirs: Samples of the counterpart.
        ratio: Ours by theirs, sample by sample; None where the counterpart's is zero.
        bound: What the ratio (or, for synchronisations, the difference) must not exceed.
        reached: Whether the median keeps the bound; None where there is no bound.
        images: Images in one call, for a rate in images per second; None where there are none.
    """

    name: str
    against: str
    quantity: str
    unit: str
    sizes: dict[str, Any]
    n: int
    calls: int
    ours: Spread
    theirs: Spread
    ratio: Spread | None
    bound: float | None
    reached: bool | None
    images: int | None = None


@dataclass(frozen=True)
class Figure:
    """A number that has no counterpart beside it.

    Attributes:
        name: What was measured.
        value: The number.
        unit: "s", "share", "FLOP/s", "B/s" or a word.
        bound: What it must not exceed; None where there is no bound.
        reached: Whether it keeps the bound; None where there is no bound.
        spread: The samples whose median it is; None where it is one number.
    """

    name: str
    value: float
    unit: str
    bound: float | None = None
    reached: bool | None = None
    spread: Spread | None = None

    @classmethod
    def bounded(cls, name: str, value: float, unit: str, bound: float | None) -> Figure:
        """Judge a number by its bound, if it has one."""
        return cls(name, value, unit, bound, None if bound is None else value <= bound)

    @classmethod
    def median(
        cls, name: str, samples: Sequence[float], unit: str, bound: float | None = None
    ) -> Figure:
        """Judge the median of samples by a bound, if there is one."""
        spread = Spread.of(samples)
        return replace(cls.bounded(name, spread.median, unit, bound), spread=spread)


def arguments(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--repeats", type=int, default=repeats, help="samples per side")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", type=Path, help="JSON to write; default: under results/")
    return parser


def synchronise(device: str) -> None:
    """Wait for the device, if it is one."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    sides: Mapping[str, Side], *, repeats: int, device: str, warmup: int = 2
) -> tuple[dict[str, list[float]], int]:
    """Time the sides in turn, A B A B, so that what disturbs one disturbs the other.

    Returns:
        Seconds per call of each side, in the order of the rounds, and the calls per sample.
    """
    first = min(_seconds(side, warmup, device) for side in sides.values())
    calls = math.ceil(_SAMPLE_SECONDS / max(first, 1e-9)) if first < _SAMPLE_SECONDS else 1
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            samples[name].append(_seconds(side, calls, device))
    return samples, calls


def _seconds(side: Side, calls: int, device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        side()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def peak_bytes(side: Side, device: str) -> int:
    """Return the most bytes alive at once during one call, above those alive at its start.

    On a CPU these are the tensors that torch allocates, as its profiler records them;
    scratch memory inside its libraries is not seen.
    """
    side()  # What is kept from call to call, as an optimiser's state, is there from now on.
    if torch.device(device).type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        side()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - start
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # It writes to stderr otherwise.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        side()  # The profiler knows the size of what is freed only if it saw it come.
        with torch.autograd.profiler.record_function("measured"):
            side()
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    start_ns = next(event.start_ns() for event in events if event.name() == "measured")
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]" and event.start_ns() >= start_ns:
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def synchronisations(side: Side, device: str) -> int:
    """Count how often one call makes the host wait for a CUDA device."""
    side()
    synchronise(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            side()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def compare(
    name: str,
    against: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    sizes: dict[str, Any],
    quantity: str = "time",
    calls: int = 1,
    bound: float | None = None,
    images: int | None = None,
) -> Case:
    """Summarise samples of two sides, taken in pairs, as one figure."""
    ratio = None
    if all(theirs):
        ratio = Spread.of([own / other for own, other in zip(ours, theirs, strict=True)])
    our_spread, their_spread = Spread.of(ours), Spread.of(theirs)
    reached = None
    if bound is not None and quantity == "synchronisations":
        reached = our_spread.median - their_spread.median <= bound
    elif bound is not None:
        reached = ratio is not None and ratio.median <= bound
    return Case(
        name,
        against,
        quantity,
        _UNITS[quantity],
        sizes,
        len(ours),
        calls,
        our_spread,
        their_spread,
        ratio,
        bound,
        reached,
        images,
    )


def report(
    script: str,
    cases: Sequence[Case],
    options: argparse.Namespace,
    figures: Sequence[Figure] = (),
    *,
    variant: str = "",
) -> None:
    """Print a table of the figures and write them with their circumstances.

    A trial with `--small` is written only where `--out` says so. A variant, as "bf16", becomes
    part of the file's name.
    """
    record = {
        "script": script,
        "small": options.small,
        **circumstances(options.device),
        "cases": [asdict(case) for case in cases],
        "figures": [asdict(figure) for figure in figures],
    }
    print(f"{record['hardware']}, torch {torch.__version__}, commit {record['commit']}")
    for case in cases:
        print(line(asdict(case)))
    for figure in figures:
        print(figure_line(asdict(figure)))
    if options.out is None and options.small:
        return
    name = "-".join(filter(None, (script, variant, slug(options.device))))
    write_json(options.out or ROOT / "results" / f"{name}.json", record)


def write_json(out: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(out, dict(record))


def line(case: dict[str, Any]) -> str:
    """Return one line about a figure, as it is in the JSON."""
    ratio = case["ratio"]
    text = f"{case['name']} | {case['against']} | {case['quantity']}: "
    text += f"{amount(case['ours']['median'], case['unit'])} against "
    text += amount(case["theirs"]["median"], case["unit"])
    if case.get("images") and case["unit"] == "s":
        rates = (throughput(case, side) for side in ("ours", "theirs"))
        text += " ({} against {})".format(*rates)
    if ratio is not None:
        text += f", ratio {ratio['median']:.3f}"
        text += f" ({ratio['q1']:.3f} ... {ratio['q3']:.3f}, n {case['n']})"
    if case["bound"] is not None:
        text += f", bound {case['bound']:.3g} {'reached' if case['reached'] else 'MISSED'}"
    return text


def figure_line(figure: Mapping[str, Any]) -> str:
    """Return one line about a number without a counterpart, as it is in the JSON."""
    text = f"{figure['name']}: {amount(figure['value'], figure['unit'])}"
    if figure["bound"] is not None:
        bound = amount(figure["bound"], figure["unit"])
        text += f", bound {bound} {'reached' if figure['reached'] else 'MISSED'}"
    if figure.get("spread"):
        low, high = (amount(figure["spread"][name], figure["unit"]) for name in ("q1", "q3"))
        text += f" ({low} ... {high})"
    return text


def throughput(case: Mapping[str, Any], side: str) -> str:
    """Return the images per second of a side, "ours" or "theirs", at its median time."""
    return f"{case['images'] / case[side]['median']:,.4g} images/s"


def amount(value: float, unit: str) -> str:
    """Write a number with a unit that suits its size."""
    if unit == "bytes":
        return f"{value / 2**20:.4g} MiB"
    if unit == "share":
        return f"{value:.1%}"
    if unit in ("FLOP/s", "B/s"):
        return f"{value / 1e9:.4g} G{unit}"
    if unit != "s":
        return f"{value:g} {unit}"
    for size, name in ((1, "s"), (1e-3, "ms")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value / 1e-6:.3g} µs"


def circumstances(device: str) -> dict[str, Any]:
    """Return what a number needs beside it: hardware, versions, commit and date."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "hardware": {
            "cpu": _cpu_name(),
            "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mixmask": mixmask.__version__,
        },
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(device: str) -> str:
    """Return "cpu", or the GPU's name in the letters of a file name."""
    if torch.device(device).type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit, marked where the package itself has been changed since."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--", "mixmask") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
