"""Time, peak memory and synchronisations of a training step: MoCo v2 with MixMask.

Against the same step without mixing and against the step of the authors' release. All three
train the same model on the same images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torchvision
from common import (
    Case,
    arguments,
    compare,
    interleave,
    peak_bytes,
    report,
    synchronisations,
)
from loss import cross_entropy
from masks import beit_mask
from mixing import formula
from torch import Tensor, nn

import mixmask
from mixmask.losses import InfoNCE

_DIM, _TEMPERATURE, _MOMENTUM, _LEARNING_RATE = 128, 0.2, 0.999, 0.03


class MoCo:
    """Two encoders, a queue of keys and an optimiser, all kept from step to step."""

    def __init__(self, arch: str, k_queue: int, device: str) -> None:
        """Build a torchvision ResNet with MoCo v2's two-layer head, and its copy."""
        network = torchvision.models.get_model(arch)
        width = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, _DIM))
        self.online: nn.Module = network.to(device)
        self.momentum: nn.Module = copy.deepcopy(self.online).requires_grad_(requires_grad=False)
        self.queue = F.normalize(torch.randn(k_queue, _DIM, device=device), dim=1)
        self.queue_of_columns = self.queue.T.contiguous()
        self.place = 0
        self.optimiser = torch.optim.SGD(
            self.online.parameters(), lr=_LEARNING_RATE, momentum=0.9, weight_decay=1e-4
        )

    def encode(self, images: Tensor) -> Tensor:
        """Return (N, C) queries."""
        return F.normalize(self.online(images), dim=1)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parameters of the momentum branch with those that they follow."""
        return zip(self.momentum.parameters(), self.online.parameters(), strict=True)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Let the momentum branch follow, and return its (N, C) keys."""
        for follower, leader in self.pairs():
            follower.lerp_(leader, 1 - _MOMENTUM)
        return F.normalize(self.momentum(images), dim=1)

    @torch.no_grad()
    def reference_keys(self, images: Tensor) -> Tensor:
        """Do the same with the momentum update written out."""
        for follower, leader in self.pairs():
            follower.data = follower.data * _MOMENTUM + leader.data * (1 - _MOMENTUM)
        return F.normalize(self.momentum(images), dim=1)

    def learn(self) -> None:
        """Update the weights and let the gradients go."""
        self.optimiser.step()
        self.optimiser.zero_grad()

    def enqueue(self, k: Tensor, *, columns: bool = False) -> None:
        """Replace the oldest keys, in the queue that is stored in rows or in columns."""
        rows = slice(self.place, self.place + len(k))
        if columns:
            self.queue_of_columns[:, rows] = k.T
        else:
            self.queue[rows] = k
        self.place = (self.place + len(k)) % len(self.queue)


def plain_step(moco: MoCo, x_q: Tensor, x_k: Tensor) -> None:
    """Train on the clean images alone."""
    k = moco.keys(x_k)
    loss = InfoNCE(moco.queue, _TEMPERATURE)(moco.encode(x_q), k)
    loss.backward()
    moco.learn()
    moco.enqueue(k)


def mixmask_step(moco: MoCo, x_q: Tensor, x_k: Tensor, masks: mixmask.BlockMaskGenerator) -> None:
    """Train term by term: the clean one's backward comes before the mixed one's forward."""
    k = moco.keys(x_k)
    criterion = InfoNCE(moco.queue, _TEMPERATURE)
    criterion(moco.encode(x_q), k).backward()
    mixed = mixmask.mix_batch(x_q, masks)
    loss = mixmask.lambda_weighted_loss(criterion, moco.encode(mixed.images), k, mixed)
    loss.backward()
    moco.learn()
    moco.enqueue(k)


def reference_step(moco: MoCo, x_q: Tensor, x_k: Tensor, grid: int) -> None:
    """Train as the authors' release does: both forward passes, then one backward."""
    cells = torch.from_numpy(beit_mask(grid, grid * grid // 2)).float()
    mask = F.interpolate(cells[None, None], size=x_q.shape[-2:])[0, 0].to(x_q.device)
    lam = grid * grid // 2 / grid**2
    mixed = formula(x_q, mask)
    q, q_mixed = moco.encode(x_q), moco.encode(mixed)
    k = moco.reference_keys(x_k)
    own = cross_entropy(q_mixed, k, moco.queue_of_columns)
    other = cross_entropy(q_mixed.flip(0), k, moco.queue_of_columns)
    clean = cross_entropy(q, k, moco.queue_of_columns)
    loss = clean + lam * own + (1 - lam) * other
    loss.backward()
    moco.learn()
    moco.enqueue(k, columns=True)


def main() -> None:
    """Measure one size, all sides interleaved."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 256 elsewhere")
    options = parser.parse_args()
    device = options.device
    arch, size, k_queue, grid = "resnet50", 224, 65_536, 8
    n = options.batch_size or (8 if device == "cpu" else 256)
    if options.small:
        arch, size, k_queue, n = "resnet18", 32, 512, 4
    if k_queue % n:
        parser.error(f"--batch-size must divide the queue of {k_queue}, got {n}")
    moco = MoCo(arch, k_queue, device)
    x_q, x_k = torch.randn(2, n, 3, size, size, device=device)
    masks = mixmask.BlockMaskGenerator(grid)
    sides = {
        "ours": lambda: mixmask_step(moco, x_q, x_k, masks),
        "plain": lambda: plain_step(moco, x_q, x_k),
        "reference": lambda: reference_step(moco, x_q, x_k, grid),
    }
    samples, calls = interleave(sides, repeats=options.repeats, device=device, warmup=1)
    peaks = {name: [peak_bytes(side, device)] for name, side in sides.items()}
    sizes = {
        "arch": arch,
        "images": [n, 3, size, size],
        "K": k_queue,
        "grid_size": grid,
        "dtype": "float32",
    }
    name = "MixMask step"
    against = {"plain": "the step without mixing", "reference": "the authors' step"}
    time_bounds, peak_bounds = {"plain": 1.80, "reference": 1.00}, {"plain": 1.10}
    cases: list[Case] = []
    for other, label in against.items():
        cases.append(
            compare(
                name,
                label,
                samples["ours"],
                samples[other],
                sizes=sizes,
                calls=calls,
                bound=time_bounds[other],
            )
        )
        cases.append(
            compare(
                name,
                label,
                peaks["ours"],
                peaks[other],
                sizes=sizes,
                quantity="peak memory",
                bound=peak_bounds.get(other),
            )
        )
        if torch.device(device).type == "cuda":
            cases.append(
                compare(
                    name,
                    label,
                    [synchronisations(sides["ours"], device)],
                    [synchronisations(sides[other], device)],
                    sizes=sizes,
                    quantity="synchronisations",
                    bound=0 if other == "plain" else None,
                )
            )
    report("step", cases, options)


if __name__ == "__main__":
    main()
