"""A run: all that it is made of, where it stands, and the files it leaves."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import pickle
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mixmask._seeds import fold_seed
from mixmask.data.jpegs import check_decoder
from mixmask.data.resources import choose_workers
from mixmask.data.sets import FolderImages, Images
from mixmask.data.stream import part_bytes
from mixmask.data.views import RandomView
from mixmask.trainers.config import RunConfig
from mixmask.trainers.methods import build_method
from mixmask.trainers.parts import Term, build_optimizer, compile_backbones

Row = dict[str, float]

# What `Meter.look` sees, where a method shows its embeddings.
_SEEN = ("spread", "alignment", "uniformity")


def random_view(config: RunConfig, images: Images) -> RandomView:
    """Build the random view that a configuration describes; a folder's images come cropped."""
    return RandomView(
        config.image_size,
        min_scale=config.min_scale,
        jitter=config.jitter,
        hue=config.hue,
        grey=config.grey,
        blur=config.blur,
        crop=isinstance(images, Tensor),
    )


@dataclass(frozen=True)
class Sent:
    """A meter's sums on their way to the host, for which nobody waits."""

    sums: tuple[Tensor | float, ...]
    steps: int
    views: int
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, meter: Meter) -> Sent:
        """Send a meter's sums."""
        sums: list[Tensor | float] = []
        copied: torch.cuda.Event | None = None
        for total in (meter.clean, meter.mixed, meter.lam):
            if isinstance(total, Tensor):
                # From a GPU into pinned memory, behind the steps that were queued before.
                sums.append(total.to("cpu", non_blocking=True))
                copied = torch.cuda.Event() if total.is_cuda else None
            else:
                sums.append(total)
        if copied is not None:
            copied.record()
        return cls(tuple(sums), max(meter.steps, 1), meter.views, copied)

    @property
    def arrived(self) -> bool:
        """Whether they can be read."""
        return self.copied is None or self.copied.query()

    @property
    def loss(self) -> float:
        """The mean loss of a step."""
        return (float(self.sums[0]) + float(self.sums[1])) / self.steps

    @property
    def lam(self) -> float:
        """The mean λ of the mixed views, 1 where there are none."""
        return float(self.sums[2]) / self.views if self.views else 1.0


@dataclass
class Meter:
    """Means over an epoch: sums that stay on the device until somebody looks."""

    steps: int = 0
    views: int = 0
    clean: Tensor | float = 0.0
    mixed: Tensor | float = 0.0
    lam: Tensor | float = 0.0
    spread: Tensor | float = 0.0
    alignment: Tensor | float = 0.0
    uniformity: Tensor | float = 0.0
    looks: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    began: float | None = None
    images_a_step: int = 0
    sent: Sent | None = field(default=None, init=False)
    shown: str = field(default="", init=False)

    def start(self, images_a_step: int) -> None:
        """Start the clock, or go on with the seconds of an interrupted epoch."""
        self.images_a_step = images_a_step
        self.began = time.perf_counter()

    def elapsed(self) -> float:
        """Return the epoch's seconds, those before an interruption included."""
        return self.seconds + (0 if self.began is None else time.perf_counter() - self.began)

    def add(self, term: Term, share: float = 1.0) -> None:
        """Count a term in, or one part of an accumulated step with its share."""
        if term.lam is None:
            self.clean = self.clean + share * term.loss.detach().float()
        else:
            self.mixed = self.mixed + share * term.loss.detach().float()
            self.lam = self.lam + term.lam
            self.views += 1

    @torch.no_grad()
    def look(self, pair: tuple[Tensor, Tensor]) -> None:
        """Note how far a step's embeddings are spread, and how close views lie (once a step).

        The spread is the standard deviation of the normalised features times the root of their
        number: about 1 on a whole sphere, 0 when all images share a point (SimSiam, section 4.1).
        Alignment and uniformity are those of Wang and Isola.
        """
        self.looks += 1
        z, other = (F.normalize(rows.float(), dim=1) for rows in pair)
        self.spread = self.spread + z.std(dim=0).mean() * z.shape[1] ** 0.5
        self.alignment = self.alignment + ((z - other) ** 2).sum(dim=1).mean()
        # Distances of unit vectors by their cosines; a row's own one is left out.
        closeness = (4 * (z @ z.T - 1)).exp().sum() - len(z)
        self.uniformity = self.uniformity + (closeness / (len(z) * (len(z) - 1))).log()

    def row(self) -> Row:
        """Return the means as columns of `metrics.csv`; this waits for the device."""
        steps, seconds = max(self.steps, 1), self.elapsed()
        clean, mixed = float(self.clean) / steps, float(self.mixed) / steps
        return {
            "loss": clean + mixed,
            "loss_clean": clean,
            "loss_mixed": mixed,
            "lam": float(self.lam) / self.views if self.views else 1.0,
            **{name: float(getattr(self, name)) / self.looks for name in _SEEN if self.looks},
            "images_per_s": steps * self.images_a_step / seconds,
            "seconds": seconds,
            "wait": self.waited / seconds,
        }

    def summary(self) -> str:
        """Return what the progress bar shows; loss and λ are the last ones that a GPU has sent."""
        sent = self.sent or Sent.of(self)
        self.sent = None if sent.arrived else sent
        if sent.arrived:
            self.shown = f"loss {sent.loss:.3f}, λ {sent.lam:.3f}, "
        seconds = self.elapsed()
        text = f"{self.shown}{self.steps * self.images_a_step / seconds:.0f} images/s"
        wait = self.waited / seconds
        return text + (f", waiting {wait:.0%}" if wait >= 0.01 else "")

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps, so that a resumed epoch has whole means."""
        sums = {name: float(getattr(self, name)) for name in ("clean", "mixed", "lam", *_SEEN)}
        counts = {name: getattr(self, name) for name in ("steps", "views", "looks")}
        return {**counts, "seconds": self.elapsed(), "waited": self.waited, **sums}


@dataclass
class Run:
    """All that a run is made of, where it stands, and its files."""

    config: RunConfig
    accelerator: Accelerator
    model: Any
    optimizer: Any
    view: RandomView
    images: Images
    workers: int
    steps: int
    out: Path
    rows: list[Row] = field(default_factory=list)
    step: int = 0
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def build(cls, config: RunConfig, images: Images, out: Path) -> Run:
        """Build a run at its first step; the seed alone decides its weights."""
        precision = "no" if config.precision == "fp32" else config.precision
        AcceleratorState._reset_state()  # An earlier run in this process may have had another.
        tracker = None if config.tracker == "none" else _installed(config.tracker)
        accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=out)
        _check_joined(accelerator)
        steps = len(images) // (config.batch_size * accelerator.num_processes)
        if steps == 0:
            raise ValueError(
                f"--batch-size {config.batch_size} is more than the {len(images)} images there "
                f"are for {accelerator.num_processes} process(es); use a smaller one"
            )
        workers = 0
        if isinstance(images, FolderImages):
            largest = 0
            if config.decode == "device":
                check_decoder(accelerator.device)
                largest = _large_file(images)
            handed = part_bytes(config.image_size, 2 + config.extra_crops, largest)
            workers = choose_workers(config.workers, handed)
        else:
            if config.decode == "device":
                warnings.warn(
                    "--decode device changes nothing here: the images are decoded already and in "
                    "memory; a folder stays on disk with --stream always",
                    stacklevel=2,
                )
            images = images.to(accelerator.device)
        torch.manual_seed(fold_seed(config.seed, "weights"))
        model = build_method(config)
        if config.sync_bn and accelerator.num_processes > 1:
            if accelerator.device.type == "cpu":
                raise ValueError(
                    "--sync-bn needs GPUs, torch synchronises no statistics on CPUs; leave it out"
                )
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(memory_format=torch.channels_last).to(accelerator.device)
        if config.checkpointing:
            _recompute(model.backbone, config.arch)
        if config.compile:
            compile_backbones(model, config.compile_mode)
        optimizer = build_optimizer(model, config)
        return cls(
            config,
            accelerator,
            model,
            accelerator.prepare(optimizer),
            random_view(config, images).to(accelerator.device),
            images,
            workers,
            steps,
            out,
        )

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.out / "last.pt"

    @property
    def previous(self) -> Path:
        """The checkpoint before, in case the newest is damaged."""
        return self.out / "previous.pt"

    def save(self) -> None:
        """Write checkpoint and metrics; a crash at any moment leaves one whole checkpoint."""
        if not self.accelerator.is_main_process:
            return
        temporary = self.out / "last.pt.tmp"
        with temporary.open("wb") as file:
            content = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "rows": self.rows,
                "meter": self.meter.state(),
            }
            if self.accelerator.scaler is not None:
                content["scaler"] = self.accelerator.scaler.state_dict()
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if self.last.exists():
            self.last.replace(self.previous)
        temporary.replace(self.last)
        self.write_csv()

    def load(self) -> None:
        """Restore the newest whole checkpoint, naming any damaged one."""
        content = self._read()
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.step, self.rows = content["step"], content["rows"]
        self.meter = Meter(**content["meter"])

    def _read(self) -> dict[str, Any]:
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            content = _read_whole(path)
            if content is not None:
                return content
        raise ValueError(f"{self.out} holds no whole checkpoint; start it again with --out")

    def write_csv(self) -> None:
        """Write all rows, each epoch anew, so that a resumed run leaves no row twice."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        temporary = self.out / "metrics.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.out / "metrics.csv")


def _check_joined(accelerator: Accelerator) -> None:
    """Refuse processes that know nothing of each other, and would write the same files."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate has joined "
            f"{accelerator.num_processes}; without GPUs, set ACCELERATE_USE_CPU=true"
        )


def _large_file(images: FolderImages) -> int:
    """Return the bytes of the largest of a few files."""
    sizes = [0]
    for file in images.files.sample(64):
        with contextlib.suppress(OSError):  # Whoever reads it will say so.
            sizes.append(file.stat().st_size)
    return max(sizes)


def _installed(tracker: str) -> str:
    """Return the tracker's name, or say what it needs."""
    if importlib.util.find_spec(tracker) is None:
        raise ValueError(
            f"--tracker {tracker} needs the package {tracker}, which is not installed; "
            f"pip install {tracker}, or leave the option out"
        )
    return tracker


def _recompute(backbone: nn.Module, arch: str) -> None:
    try:
        backbone.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError):
        raise ValueError(
            f"--checkpointing is not known to {arch}; leave it out, or use --accumulate"
        ) from None


def _read_whole(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or warn, with its name, that it is damaged."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, BadZipFile, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"{path} is damaged ({reason}); looking for an older one", stacklevel=2)
        return None
    return content
