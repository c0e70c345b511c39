"""Small builders of MoCo's family, written for the tests; `moco_slowly` takes their steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
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
        order = shuffle(len(everybody))
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
        q = self.query(im_q)
        self._follow()
        k = self._keys(im_k)
        output = self.compare(q, k, self.queue)
        self._dequeue_and_enqueue(k)
        return output

    def query(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder_q(images), dim=1)

    def compare(self, q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, 1 + K), the key first, and labels; the queue is (C, K)."""
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.clone()], dim=1)
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
            q, k = self.query(one), self._keys(other)
            if im_mixed is not None:
                self.encoder_q(im_mixed)
            loss = loss + F.cross_entropy(*self.compare(q, k, self.queue))
            keys.insert(0, k)
        # As some builders have it; the mixed term needs gradients all the same.
        with torch.no_grad():
            self._dequeue_and_enqueue(torch.cat(keys))
        return loss


def shuffle(n: int) -> Tensor:
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


def same(ours: Any, slow: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, slow, rtol=tolerance, atol=tolerance)


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
    join: Callable[[list[Tensor]], Tensor] = staticmethod(torch.stack)

    def forward(self, pair: Tensor) -> Any:  # type: ignore[override]
        return super().forward(pair[0], pair[1])


class Doubled(Stacked):
    join = staticmethod(torch.cat)

    def forward(self, pair: Tensor) -> Any:  # type: ignore[override]
        return super().forward(torch.stack(pair.chunk(2)))


class Channels(Stacked):
    join = staticmethod(partial(torch.cat, dim=1))

    def forward(self, pair: Tensor) -> Any:  # type: ignore[override]
        return super().forward(torch.stack(pair.chunk(2, dim=1)))


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
        output = self.compare(self.query(im_q), k := self._keys(im_k), self.queue)
        self._dequeue_and_enqueue(k.roll(1, 0))
        return output


class Early(Builder):
    """Fills its queue before it reads it."""

    def forward(self, im_q: Tensor, im_k: Tensor) -> Any:
        q, k = self.query(im_q), self._keys(im_k)
        self._dequeue_and_enqueue(k)
        return self.compare(q, k, self.queue)


class Reading(Builder):
    """Normalises its queue where it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.queue.mul_(2)

    def compare(self, q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        return super().compare(q, k, F.normalize(queue, dim=0))


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
        q = self.query(im_q)
        self._follow()
        k = self._keys(im_k)
        output = self.compare(q, k, self.memory.T)  # type: ignore[arg-type]
        self.update_queue(k)
        return output


class Half(Builder):
    """Embeds both views as queries but enqueues the keys of one."""

    def forward(self, im_1: Tensor, im_2: Tensor) -> Any:
        self.encoder_q(im_1)
        self.encoder_q(im_2)
        self._dequeue_and_enqueue(self._keys(im_2))
