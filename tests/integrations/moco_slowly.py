"""The steps of MoCo's builders written out slowly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from moco_builders import LR, MOMENTUM, TAU, C, K, N, View, shuffle
from torch import Tensor

from mixmask import MixedBatch

Records = Callable[[int, Tensor], MixedBatch]
# Losses by process, and the gradients averaged over them.
Step = tuple[list[float], dict[str, Tensor]]


@dataclass
class Slow:
    """MoCo and eq. 4 row by row, for all processes in one; batch norm is each one's own.

    Attributes:
        initial: A builder, which is not changed.
        records: What process r mixes of its images.
        switch: False leaves the partners' terms out.
        directions: 2 where both views are queries.
        lr: Rate of plain SGD.
        world: How many processes there are.
    """

    initial: Any
    records: Records
    switch: bool = True
    directions: int = 1
    lr: float = LR
    world: int = 1
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.online, self.momentum = (
            [copy.deepcopy(encoder) for _ in range(self.world)]
            for encoder in (self.initial.encoder_q, self.initial.encoder_k)
        )
        self.queue, self.pointer = self.initial.queue.clone(), 0

    def run(self, steps: Sequence[Sequence[View]]) -> Slow:
        """Train; `steps` has two views by step and process."""
        for views in steps:
            self.step(views)
        return self

    def step(self, views: Sequence[View]) -> None:
        queries = [self.queries(r, views[r]) for r in range(self.world)]
        for online, momentum in zip(self.online, self.momentum, strict=True):
            for of_q, of_k in zip(online.parameters(), momentum.parameters(), strict=True):
                of_k.data = MOMENTUM * of_k.data + (1 - MOMENTUM) * of_q.data
        keys = [self.keys([view[1 - d] for view in views]) for d in range(self.directions)]
        losses, gradients = [], []
        for r in range(self.world):
            mine = [key[r] for key in keys]
            loss = self.clean(queries[r], mine) + self.mixed(r, views[r], mine)
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, [*self.online[r].parameters()]))
        mean = [torch.stack(parts).mean(dim=0) for parts in zip(*gradients, strict=True)]
        for encoder in self.online:
            for weight, gradient in zip(encoder.parameters(), mean, strict=True):
                weight.data = weight.data - self.lr * gradient
        names = [f"encoder_q.{name}" for name, _ in self.online[0].named_parameters()]
        self.steps.append((losses, dict(zip(names, mean, strict=True))))
        for key in torch.cat([part for direction in reversed(keys) for part in direction]):
            self.queue[:, self.pointer] = key
            self.pointer = (self.pointer + 1) % K

    def queries(self, r: int, view: View) -> list[Tensor]:
        return [F.normalize(self.online[r](x), dim=1) for x in view[: self.directions]]

    def keys(self, images: list[Tensor]) -> list[Tensor]:
        """Embed one view of all processes, shuffled among them."""
        everybody = torch.cat(images)
        keys = torch.empty(len(everybody), C, dtype=everybody.dtype)
        for r, rows in enumerate(shuffle(len(everybody)).split(N)):
            for row, key in zip(rows, self.momentum[r](everybody[rows]), strict=True):
                keys[row] = (key / key.norm()).detach()
        return list(keys.split(N))

    def clean(self, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for direction, rows in enumerate(queries):
            for q, k in zip(rows, keys[direction], strict=True):
                loss = loss + self.contrast(q, k) / N
        return loss

    def mixed(self, r: int, view: View, keys: list[Tensor]) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for direction in range(self.directions):
            mixed = self.records(r, view[direction])
            lam, target = mixed.lam.expand(N).double(), keys[direction]
            for i, q in enumerate(F.normalize(self.online[r](mixed.images), dim=1)):
                loss = loss + lam[i] * self.contrast(q, target[i]) / N
                if self.switch:
                    partner = target[int(mixed.partner[i])]
                    loss = loss + (1 - lam[i]) * self.contrast(q, partner) / N
        return loss

    def contrast(self, q: Tensor, key: Tensor) -> Tensor:
        near = torch.stack([q @ key, *(q @ self.queue[:, j] for j in range(K))]) / TAU
        loss: Tensor = near.logsumexp(dim=0) - near[0]
        return loss

    @property
    def state(self) -> dict[str, Tensor]:
        """The first process's end state."""
        state = {"queue": self.queue, "queue_ptr": torch.tensor([self.pointer])}
        for name, encoder in (("encoder_q", self.online[0]), ("encoder_k", self.momentum[0])):
            state |= {f"{name}.{key}": value for key, value in encoder.state_dict().items()}
        return state
