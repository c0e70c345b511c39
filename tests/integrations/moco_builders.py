"""Small builders of MoCo's family, written for the tests, and their steps written out slowly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixmask
from mixmask import MixedBatch
from mixmask._distributed import gather_rows, rank

N, C, K, TAU, STEPS = 4, 6, 24, 0.2, 3
MOMENTUM, LR, SIZE = 0.9, 0.1, 8
MASKS = mixmask.BlockMaskGenerator(4, 0.4)

View = tuple[Tensor, Tensor]


class Encoder(nn.Sequential):
    """A small network with batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, C),
        )


class Builder(nn.Module):
    """What the family has in common, with shuffled batch norm over the processes."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.T = TAU
        self.encoder_q: Any = Encoder()
        self.encoder_k: Any = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(C, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        keys = gather_rows(keys)
        start = int(self.queue_ptr)
        self.queue[:, start : start + len(keys)] = keys.T
        self.queue_ptr[0] = (start + len(keys)) % K

    @torch.no_grad()
    def _keys(self, im_k: Tensor) -> Tensor:
        everybody = gather_rows(im_k)
        order = _order(len(everybody))
        mine = slice(rank() * len(im_k), (rank() + 1) * len(im_k))
        k = F.normalize(self.encoder_k(everybody[order[mine]]), dim=1)
        return gather_rows(k)[order.argsort()[mine]]

    @torch.no_grad()
    def _follow(self) -> None:
        for of_q, of_k in zip(
            self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True
        ):
            of_k.mul_(MOMENTUM).add_((1 - MOMENTUM) * of_q)

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        self._follow()
        k = self._keys(im_k)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
        self._dequeue_and_enqueue(k)
        return logits / self.T, torch.zeros(len(q), dtype=torch.long)


class Symmetric(Builder):
    """Both views are queries; the keys of both are enqueued at the end, view by view."""

    def forward(  # type: ignore[override]
        self, im_1: Tensor, im_2: Tensor, im_mixed: Tensor | None = None
    ) -> Tensor:
        """Embed a mixture of one's own beside each view, as Un-Mix does, if there is one."""
        self._follow()
        keys: list[Tensor] = []
        loss = torch.zeros(())
        for one, other in ((im_1, im_2), (im_2, im_1)):
            q, k = F.normalize(self.encoder_q(one), dim=1), self._keys(other)
            if im_mixed is not None:
                self.encoder_q(im_mixed)
            logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
            loss = loss + F.cross_entropy(logits / self.T, torch.zeros(len(q), dtype=torch.long))
            keys.insert(0, k)
        self._dequeue_and_enqueue(torch.cat(keys))
        return loss


def _order(n: int) -> Tensor:
    """A shuffle that every process knows."""
    return torch.arange(n) * 3 % n


def views(world: int = 1) -> list[list[View]]:
    """Two views per step and process."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(STEPS, world, 2, N, 3, SIZE, SIZE, generator=generator)
    return [[(x[0], x[1]) for x in step] for step in images.double()]


def build(kind: type[Builder] = Builder) -> Any:
    torch.manual_seed(1)
    return kind().double()


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(images: Tensor, generator: torch.Generator, options: dict[str, Any]) -> MixedBatch:
    """What a step mixes, in the order in which it is drawn."""
    masks = MASKS(N, generator=generator) if options.get("per_sample") else MASKS
    return mixmask.mix_batch(
        images, masks, partner=options.get("partner", "reverse"), generator=generator
    )


class Lists(Builder):
    """As OpenMixup has it: a list of views, a list of outputs, the temperature in the head."""

    def __init__(self) -> None:
        super().__init__()
        del self.T
        self.head = nn.Module()
        self.head.temperature = TAU  # type: ignore[assignment]
        for name in ("encoder_q", "encoder_k"):
            setattr(self, name, nn.Sequential(getattr(self, name), _List()))

    def forward(self, img: list[Tensor], mode: str = "train") -> Any:  # type: ignore[override]
        del mode
        q = F.normalize(self.encoder_q(img[0])[0], dim=1)
        self._follow()
        with torch.no_grad():
            k = F.normalize(self.encoder_k(img[1])[0], dim=1)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
        self._dequeue_and_enqueue(k)
        return logits / TAU, torch.zeros(len(q), dtype=torch.long)


class _List(nn.Module):
    def forward(self, z: Tensor) -> list[Tensor]:
        return [z]


class Swapped(Builder):
    """The key comes first, under names of its own."""

    def forward(self, x_0: Tensor, x_1: Tensor) -> Any:
        return super().forward(x_1, x_0)


class Named(Builder):
    """The key comes first, under the family's names."""

    def forward(self, im_k: Tensor, im_q: Tensor) -> Any:  # type: ignore[override]
        return super().forward(im_q, im_k)


class Augmenting(Builder):
    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        return super().forward(im_q.flip(3), im_k)


class Stacked(Builder):
    def forward(self, pair: Tensor) -> Any:  # type: ignore[override]
        return super().forward(pair[0], pair[1])


class Twice(Builder):
    """Enqueues each view's keys by themselves."""

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        first = super().forward(im_q, im_k)
        self._dequeue_and_enqueue(self._keys(im_q))
        return first


class Long(Builder):
    """Keys that are not normalised."""

    def _keys(self, im_k: Tensor) -> Tensor:
        return 3 * super()._keys(im_k)


class Predicting(Builder):
    """A predictor follows the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = nn.Linear(C, C)

    def query(self, images: Tensor) -> Tensor:
        return F.normalize(self.predictor(self.encoder_q(images)), dim=1)

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        q, k = self.query(im_q), self._keys(im_k)
        self._follow()
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
        self._dequeue_and_enqueue(k)
        return logits / self.T, torch.zeros(len(q), dtype=torch.long)


class Wide(Predicting):
    """The projector is no part of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_q, self.predictor = nn.Sequential(*list(Encoder())[:-1]), nn.Linear(36, C)

    def _follow(self) -> None:
        """Leave the keys' encoder as it is."""


class PredictingLoss(Predicting):
    """Returns its loss alone."""

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        return F.cross_entropy(*super().forward(im_q, im_k))


class Centring(Predicting):
    """Something follows the encoder that has no weights."""

    def __init__(self) -> None:
        super().__init__()
        del self.predictor

    def query(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder_q(images) - 0.3, dim=1)


class Unordered(Builder):
    """Enqueues keys in another order, which is the same for its own loss."""

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        q, k = F.normalize(self.encoder_q(im_q), dim=1), self._keys(im_k)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
        self._dequeue_and_enqueue(k.roll(1, 0))
        return logits / self.T, torch.zeros(len(q), dtype=torch.long)


class Early(Builder):
    """Fills its queue before it reads it."""

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        q, k = F.normalize(self.encoder_q(im_q), dim=1), self._keys(im_k)
        self._dequeue_and_enqueue(k)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
        return logits / self.T, torch.zeros(len(q), dtype=torch.long)


class Reading(Builder):
    """Normalises its queue where it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.queue.mul_(2)

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        q, k = F.normalize(self.encoder_q(im_q), dim=1), self._keys(im_k)
        queue = F.normalize(self.queue.clone(), dim=0)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue], dim=1)
        self._dequeue_and_enqueue(k)
        return logits / self.T, torch.zeros(len(q), dtype=torch.long)


class Renamed(Builder):
    """Other names, and keys as rows of the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", self.queue.T.clone())
        del self.queue

    @torch.no_grad()
    def update_queue(self, keys: Tensor) -> None:
        start = int(self.queue_ptr)
        self.memory[start : start + len(keys)] = keys  # type: ignore[operator]
        self.queue_ptr[0] = (start + len(keys)) % K

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        self._follow()
        k, rows = self._keys(im_k), self.memory.clone()  # type: ignore[operator]
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ rows.T], dim=1)
        self.update_queue(k)
        return logits / self.T, torch.zeros(len(q), dtype=torch.long)


class Half(Builder):
    """Embeds both views as queries but enqueues the keys of one."""

    def forward(self, im_1: Tensor, im_2: Tensor) -> Any:
        self.encoder_q(im_1)
        self.encoder_q(im_2)
        self._dequeue_and_enqueue(self._keys(im_2))


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
        for r, rows in enumerate(_order(len(everybody)).split(N)):
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
