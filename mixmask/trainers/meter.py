"""Means over an epoch, summed on the device so that no step waits for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask.runs.folder import Row
from mixmask.trainers.mixtures import Term

# What `Meter.look` measures, where a method yields its embeddings.
_SEEN = ("spread", "alignment", "uniformity")


class Sent(NamedTuple):
    """The sums of some steps on their way to the host; `copied` tells when they can be read."""

    sums: tuple[Tensor | float, ...]
    steps: int
    views: int
    copied: torch.cuda.Event | None


@dataclass
class Meter:
    """Means over an epoch: sums that stay on the device until they are read."""

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
    images_per_step: int = 0
    sent: Sent | None = field(default=None, init=False)
    shown: str = field(default="", init=False)

    def start(self, images_per_step: int) -> None:
        """Start the clock, or go on with the seconds of an interrupted epoch."""
        self.images_per_step = images_per_step
        self.began = time.perf_counter()

    def elapsed(self) -> float:
        """Return the epoch's seconds, those before an interruption included."""
        return self.seconds + (0 if self.began is None else time.perf_counter() - self.began)

    def add(self, term: Term, share: float = 1.0) -> None:
        """Add a term, or one part of an accumulated step with its share."""
        loss = share * term.loss.detach().float()
        if term.lam is None:
            self.clean = self.clean + loss
        else:
            self.mixed = self.mixed + loss
            self.lam = self.lam + term.lam
            self.views += 1

    @torch.no_grad()
    def look(self, pair: tuple[Tensor, Tensor]) -> None:
        """Measure the spread of a step's embeddings (N, dim), and how close views are.

        The spread is the standard deviation of the normalised features times the root of their
        number: about 1 on a whole sphere, 0 when all images share a point (SimSiam, section 4.1).
        Alignment and uniformity are those of Wang and Isola.
        """
        self.looks += 1
        z, other = (F.normalize(rows.float(), dim=1) for rows in pair)  # (N, dim)
        self.spread = self.spread + z.std(dim=0).mean() * z.shape[1] ** 0.5
        self.alignment = self.alignment + ((z - other) ** 2).sum(dim=1).mean()
        # exp(-2 |z - z'|^2) of unit vectors by their cosines, without each row's own.
        closeness = (4 * (z @ z.T - 1)).exp().sum() - len(z)  # z @ z.T: (N, N)
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
            "images_per_s": steps * self.images_per_step / seconds,
            "seconds": seconds,
            "wait": self.waited / seconds,
        }

    def summary(self) -> str:
        """Return what the progress bar shows; loss and λ are the last ones that a GPU has sent."""
        sent = self.sent = self.sent or self.send()
        if sent.copied is None or sent.copied.query():
            clean, mixed, lam = map(float, sent.sums)
            self.shown = f"loss {(clean + mixed) / sent.steps:.3f}, "
            if sent.views:
                self.shown += f"λ {lam / sent.views:.3f}, "
            self.sent = None
        seconds = self.elapsed()
        text = f"{self.shown}{self.steps * self.images_per_step / seconds:.0f} images/s"
        wait = self.waited / seconds
        return text + (f", waiting {wait:.0%}" if wait >= 0.01 else "")

    def send(self) -> Sent:
        """Send the sums to the host, without waiting for the device."""
        sums: tuple[Tensor | float, ...] = (self.clean, self.mixed, self.lam)
        copied = None
        if any(isinstance(total, Tensor) and total.is_cuda for total in sums):
            # Into pinned memory, behind the steps that were queued before.
            sums = tuple(torch.as_tensor(s).to("cpu", non_blocking=True) for s in sums)
            copied = torch.cuda.Event()
            copied.record()
        return Sent(sums, max(self.steps, 1), self.views, copied)

    @classmethod
    def takes(cls, state: Mapping[str, object]) -> bool:
        """Tell whether a checkpoint's state is one."""
        numbers = all(isinstance(value, int | float) for value in state.values())
        return numbers and set(state) == set(cls().state())

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps, so that a resumed epoch has whole means."""
        sums = {name: float(getattr(self, name)) for name in ("clean", "mixed", "lam", *_SEEN)}
        counts = {name: getattr(self, name) for name in ("steps", "views", "looks")}
        return {**counts, "seconds": self.elapsed(), "waited": self.waited, **sums}
