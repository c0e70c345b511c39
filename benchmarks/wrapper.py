"""What `LambdaWeightedLoss` adds to a mixed step, against the same algebra written by hand.

Once around a criterion without state, SimCLR's, and once around one that keeps a queue in a
buffer. Then lightly's NTXentLoss with a bank, in `integrations.lightly.wrap` and by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from common import Case, arguments, compare, interleave, peak_bytes, report
from lightly.loss import NTXentLoss
from loss import cross_entropy
from torch import Tensor, nn

import mixmask
from mixmask import MixedBatch, losses
from mixmask.integrations.lightly import wrap

_DIM, _TEMPERATURE = 128, 0.2

Loss = Callable[[Tensor, Tensor, Tensor, MixedBatch], Tensor]


class QueueLoss(nn.Module):
    """MoCo's loss as a criterion that enqueues at every call."""

    queue: Tensor

    def __init__(self, k_queue: int) -> None:
        """Start with random negatives."""
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(_DIM, k_queue), dim=0))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the loss against the queue, then put the keys into it."""
        loss = cross_entropy(q, k, self.queue)
        self.enqueue(k)
        return loss

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        """Overwrite keys, always the first ones: a pointer costs nothing worth measuring."""
        self.queue[:, : len(k)] = k.T


def simclr_by_hand(z: Tensor, target: Tensor, z_mixed: Tensor, mixed: MixedBatch) -> Tensor:
    """Return NT-Xent and its two weighted terms."""
    own = losses.nt_xent(z_mixed, target, _TEMPERATURE)
    other = losses.nt_xent(z_mixed, target[mixed.partner], _TEMPERATURE)
    clean = losses.nt_xent(z, target, _TEMPERATURE)
    return clean + mixed.lam * own + (1 - mixed.lam) * other


def queue_by_hand(criterion: QueueLoss) -> Loss:
    """Return the three terms on one snapshot of the queue, and one enqueue."""

    def loss(q: Tensor, k: Tensor, q_mixed: Tensor, mixed: MixedBatch) -> Tensor:
        own = cross_entropy(q_mixed, k, criterion.queue)
        other = cross_entropy(q_mixed, k[mixed.partner], criterion.queue)
        total = cross_entropy(q, k, criterion.queue)
        criterion.enqueue(k)
        return total + mixed.lam * own + (1 - mixed.lam) * other

    return loss


def bank_by_hand(criterion: NTXentLoss) -> Loss:
    """Return the three terms on the bank that lightly hands out, read and filled once."""

    def loss(z: Tensor, target: Tensor, z_mixed: Tensor, mixed: MixedBatch) -> Tensor:
        q, k, q_mixed = (F.normalize(rows, dim=1) for rows in (z, target, z_mixed))
        _, bank = criterion.memory_bank(k, update=True)
        own = cross_entropy(q_mixed, k, bank)
        other = cross_entropy(q_mixed, k[mixed.partner], bank)
        return cross_entropy(q, k, bank) + mixed.lam * own + (1 - mixed.lam) * other

    return loss


def main() -> None:
    """Measure whole steps of a ResNet-18, and lightly's loss alone."""
    parser = arguments(__doc__, repeats=15)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    device = options.device
    n, size, k_queue = (4, 32, 64) if options.small else (options.batch_size, 64, 65_536)
    network = torchvision.models.resnet18(num_classes=_DIM).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
    images = torch.rand(2, n, 3, size, size, device=device)
    masks = mixmask.BlockMaskGenerator(4)

    def encode(batch: Tensor) -> Tensor:
        return F.normalize(network(batch), dim=1)

    def step(loss: Loss, *, keys: bool) -> Callable[[], None]:
        def side() -> None:
            mixed = mixmask.mix_batch(images[0], masks)
            z, z_mixed = encode(images[0]), encode(mixed.images)
            with torch.set_grad_enabled(not keys):
                target = encode(images[1])
            optimiser.zero_grad()
            loss(z, target, z_mixed, mixed).backward()
            optimiser.step()

        return side

    def measured(name: str, ours: Callable[[], None], theirs: Callable[[], None]) -> list[Case]:
        samples, calls = interleave(
            {"ours": ours, "theirs": theirs}, repeats=options.repeats, device=device
        )
        peaks = [[peak_bytes(side, device)] for side in (ours, theirs)]
        sizes = {"N": n, "C": _DIM, "image": size, "K": k_queue}
        hand = "by hand"
        return [
            compare(
                name, hand, samples["ours"], samples["theirs"], sizes=sizes, calls=calls, bound=1.05
            ),
            compare(name, hand, *peaks, sizes=sizes, quantity="peak memory"),
        ]

    simclr = mixmask.LambdaWeightedLoss(losses.NTXent(_TEMPERATURE))
    cases = measured(
        "SimCLR step, LambdaWeightedLoss",
        step(simclr, keys=False),
        step(simclr_by_hand, keys=False),
    )
    queue = QueueLoss(k_queue).to(device)
    cases += measured(
        "MoCo step, LambdaWeightedLoss around a queue",
        step(mixmask.LambdaWeightedLoss(queue), keys=True),
        step(queue_by_hand(queue), keys=True),
    )
    criterion = NTXentLoss(_TEMPERATURE, memory_bank_size=(k_queue, _DIM)).to(device)
    wrapped = wrap(criterion)
    mixed = mixmask.mix_batch(images[0], masks)
    rows = torch.randn(3, n, _DIM, device=device)
    z, z_mixed = rows[0].clone().requires_grad_(), rows[1].clone().requires_grad_()
    by_hand = bank_by_hand(criterion)

    def alone(loss: Loss) -> Callable[[], None]:
        def side() -> None:
            loss(z, rows[2], z_mixed, mixed).backward()

        return side

    cases += measured("lightly's NTXentLoss with a bank, wrap", alone(wrapped), alone(by_hand))
    report("wrapper", cases, options)


if __name__ == "__main__":
    main()
