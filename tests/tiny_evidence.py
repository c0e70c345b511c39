"""Plans of a few photographs, and results that nobody trained for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = {"batch_size": 16, "queue_size": 32, "image_size": 16}


def write_plan(path: Path, *parts: dict[str, Any], **arms: Any) -> Path:
    """Write a plan on 48 photographs, each part of which is one group."""
    content = {
        "about": "Tiny.",
        "images": {"clothing64": 48},
        "settings": {"clothing64/moco-v2": TINY},
        "arms": {"none": {"mix": "none"}, "mixmask": {"mix": "mixmask"}, **arms},
        "parts": [
            {
                "name": group.pop("name"),
                "about": "Question.",
                "plots": group.pop("plots", []),
                "groups": [{"data": "clothing64", **group}],
            }
            for group in (dict(part) for part in parts)
        ],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


RATES = {
    "name": "rates", "split": "validation", "epochs": [1], "seeds": [0], "lr": [0.01, 0.02],
    "arms": ["none", "mixmask"], "plots": ["rates"],
}  # fmt: skip
BUDGETS = {
    "name": "budgets", "epochs": [1, 2], "seeds": [0, 1, 2], "arms": ["none", "mixmask"],
    "plots": ["budgets", "curves", "differences"],
}  # fmt: skip


def record_of(cells: Any, cell: Any, knn: float | None, passes: float = 4 / 3) -> dict[str, Any]:
    """Make up a result of a cell; None stands for a run that failed."""
    accuracies = {"knn": knn, "knn_error": 0.01, "linear": knn and knn + 0.1, "linear_error": 0.02}
    return {
        "name": cell.name,
        "recipe_version": cells.RECIPE_VERSION,
        "cell": dataclasses.asdict(cell),
        "hardware": {"cpu": "a processor"},
        "commit": "abc",
        "command": f"python benchmarks/evidence.py --cell {cell.name}",
        "untrained": {"knn": 0.05, "linear": 0.06},
        "curve": [{"epoch": epoch, "knn": knn} for epoch in range(1, cell.epochs + 1)],
        "final": None if knn is None else accuracies,
        "failed": None if knn is not None else "the run has collapsed",
        "passes_per_image": passes,
        "busy_seconds": 60.0,
    }
