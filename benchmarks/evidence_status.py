"""What a runner of the evidence is at, from its folders: done, running, missing, crashed."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from evidence_cells import Cell, Plan, is_done, missing, pace, read_results, resolve, resolve_within


def crashes(state: Path, name: str) -> int:
    """Return how often a cell has crashed."""
    path = state / "crashes" / f"{name}.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["times"]) if path.exists() else 0


def pause_flag(state: Path) -> Path:
    """Return the file whose presence pauses the jobs."""
    return state / "paused"


def is_working(state: Path) -> bool:
    """Tell whether a runner works in a state's folder."""
    path = state / "runner.lock"
    if not path.exists():
        return False
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_running(state: Path) -> dict[str, Any]:
    """Read what a runner has written about its jobs."""
    path = state / "running.json"
    if not path.exists():
        return {"paused": False, "cells": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def epochs_behind(state: Path, name: str) -> int:
    """Return the last whole epoch of a cell that was begun."""
    for path in state.glob(f"*/{name}/run/metrics.csv"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
    return 0


def status(plan: Plan, whole: Plan, folder: Path, state: Path) -> str:
    """Say what is done, running and missing, and how many core-hours are left per part."""
    results = read_results(folder)
    plan = resolve_within(plan, whole, results)
    speed = pace(resolve(whole, results), results)
    head = ["part", "done", "failed", "missing", "core-hours left"]
    lines = [f"{plan.name}: {plan.about}", "  ".join(head)]
    counted: set[str] = set()
    for part in plan.parts:
        names = {cell.name for cell in part.cells}
        done = [cell.name for cell in part.cells if is_done(cell, results)]
        failed = sum(results[name]["failed"] is not None for name in set(done))
        left = [cell for cell in missing(part, results) if cell.name not in counted]
        hours = sum(_left(cell, state) for cell in left) * speed / 3600
        counted |= {cell.name for cell in left}
        lines.append(
            f"{part.name:9} {len(set(done)):4} {failed:6} {len(names - set(done)):8} {hours:10.1f}"
        )
    lines.append("Cells of several parts are counted in each, their hours in the first.")
    return "\n".join([*lines, *_running_lines(plan, state), *_crash_lines(state)])


def _left(cell: Cell, state: Path) -> float:
    return cell.estimate() * (1 - epochs_behind(state, cell.name) / cell.epochs)


def _running_lines(plan: Plan, state: Path) -> list[str]:
    running, cells = read_running(state), plan.cells
    if not is_working(state):
        return ["No runner works."]
    word = "paused" if running["paused"] else "running"
    return [
        f"{word}: {name}, epoch {epochs_behind(state, name)}"
        + (f" of {cells[name].epochs}" if name in cells else "")
        for name in running["cells"]
    ]


def _crash_lines(state: Path) -> list[str]:
    found = []
    for path in sorted((state / "crashes").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found.append(f"crashed {record['times']} times: {path.stem}: {record['last']}")
    return found
