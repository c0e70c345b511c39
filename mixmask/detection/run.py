"""A detection run: all that it is made of, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import platform
import warnings
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import nn

from mixmask._seeds import fold_seed
from mixmask.detection.config import DetectionConfig
from mixmask.detection.data import DetectionData
from mixmask.detection.model import build_detector
from mixmask.runs.folder import write_text

Row = dict[str, Any]

_LIBRARIES = ("torch", "torchvision", "timm", "torchmetrics", "pycocotools", "mixmask")


@dataclass
class Run:
    """All that a run is made of, where it stands, and its files."""

    config: DetectionConfig
    data: DetectionData
    detector: nn.Module
    optimizer: torch.optim.SGD
    device: torch.device
    steps: int
    out: Path
    source: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    step: int = 0
    # Sums over the part of an epoch that a checkpoint took down, and its seconds.
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def build(
        cls,
        config: DetectionConfig,
        data: DetectionData,
        backbone: nn.Module,
        out: Path,
        source: dict[str, Any],
    ) -> Run:
        """Build a run at its first step; the seed alone decides the new layers' weights."""
        if config.model == "mask-rcnn":
            data = dataclasses.replace(
                data, train=data.train.with_masks(), test=data.test.with_masks()
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(fold_seed(config.seed, "weights"))
        detector = build_detector(
            backbone,
            len(data.classes),
            model=config.model,
            neck=config.neck,
            batch_norm=config.batch_norm,
            size=config.size,
            min_scale=config.min_scale,
            rois=config.rois,
            proposals=config.proposals,
        ).to(device)
        optimizer = torch.optim.SGD(
            [p for p in detector.parameters() if p.requires_grad],
            lr=0.0,
            momentum=0.9,
            weight_decay=config.weight_decay,
        )
        steps = max(1, len(data.train) // config.batch_size)
        return cls(config, data, detector, optimizer, device, steps, out, source)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step.

        It rises over 100 steps, or a tenth of the run where that is less, and drops to a tenth
        after 3/4 and after 11/12, as in MoCo's 24,000 steps on Pascal VOC.
        """
        peak = self.config.lr or 0.02 * self.config.batch_size / 16
        total = self.steps * self.config.epochs
        warmup = min(100, total // 10)
        drops = sum(self.step >= share * total for share in (3 / 4, 11 / 12))
        return peak * min(1.0, (self.step + 1) / (warmup + 1)) * 0.1**drops

    def results(self) -> dict[str, Any]:
        """Return what `results.json` holds: figures with their circumstances."""
        tested = [row for row in self.rows if "ap" in row]
        final = tested[-1] if tested else {}
        figures = {k: v for k, v in final.items() if k.startswith(("ap", "mask_", "per_class"))}
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "finished": self.step == self.steps * self.config.epochs,
            **figures,
            "classes": list(self.data.classes),
            "backbone": self.source,
            "config": dataclasses.asdict(self.config),
            "data": {
                "layout": self.data.layout,
                "train": {"split": self.data.train.name, "images": len(self.data.train)},
                "test": {"split": self.data.test.name, "images": len(self.data.test)},
            },
            "hardware": {
                "machine": platform.machine(), "gpu": gpu, "threads": torch.get_num_threads()
            },
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in _LIBRARIES},
            },
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "epochs": self.rows,
        }  # fmt: skip

    def save(self) -> None:
        """Write checkpoint and results; a crash at any moment leaves one whole checkpoint."""
        last, temporary = self.out / "last.pt", self.out / "last.pt.tmp"
        with temporary.open("wb") as file:
            torch.save(
                {
                    "model": self.detector.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "rows": self.rows,
                    "sums": self.sums,
                    "seconds": self.seconds,
                    "classes": list(self.data.classes),
                    "images": len(self.data.train),
                    "source": self.source,
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            last.replace(self.out / "previous.pt")
        temporary.replace(last)
        write_json(self.results(), self.out / "results.json")

    def load(self) -> None:
        """Restore the newest whole checkpoint, naming any damaged one."""
        content = self._read()
        classes, images = list(self.data.classes), len(self.data.train)
        if (content["classes"], content["images"]) != (classes, images):
            raise ValueError(
                f"{self.out} was started on {content['images']} images of "
                f"{', '.join(content['classes'])}, but {self.config.data} has {images} of "
                f"{', '.join(classes)}; go on with the data of the start"
            )
        self.detector.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.rows = content["step"], content["rows"]
        self.sums, self.seconds = content["sums"], content["seconds"]
        self.source = content["source"]

    def _read(self) -> dict[str, Any]:
        for path in (self.out / "last.pt", self.out / "previous.pt"):
            if not path.exists():
                continue
            try:
                content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, BadZipFile, pickle.UnpicklingError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"{path} is damaged ({reason}); looking for an older one", stacklevel=3
                )
            else:
                return content
        raise ValueError(f"{self.out} holds no whole checkpoint; start it again with --out")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON, whole whenever somebody looks."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def generator(*parts: int | str) -> torch.Generator:
    """Return a generator for what a seed and a position decide."""
    return torch.Generator().manual_seed(fold_seed(*parts))
