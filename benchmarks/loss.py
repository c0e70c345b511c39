"""Time and peak memory of losses with both mixed terms, forward and backward.

MoCo's against the three cross-entropies of the authors' release and against the one cross-entropy
of plain MoCo; those over a batch against three calls and one call of their plain formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from batch_losses import measure_all
from common import arguments, compare, interleave, peak_bytes, report
from torch import Tensor

import mixmask
from mixmask.losses import InfoNCE

_TEMPERATURE = 0.2


def cross_entropy(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """Return InfoNCE as the cross-entropy of (N, 1 + K) logits; the queue is (C, K)."""
    positive = torch.einsum("nc,nc->n", q, k)[:, None]
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], dim=1) / _TEMPERATURE
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, labels)


def three_cross_entropies(
    q: Tensor, q_mixed: Tensor, k: Tensor, queue: Tensor, lam: Tensor
) -> Tensor:
    """Return the clean term and, with the queries flipped for the second, both mixed ones."""
    own = cross_entropy(q_mixed, k, queue)
    other = cross_entropy(q_mixed.flip(0), k, queue)
    return cross_entropy(q, k, queue) + lam * own + (1 - lam) * other


def main() -> None:
    """Measure one size, all sides interleaved."""
    options = arguments(__doc__, repeats=15).parse_args()
    n, c, k_queue = (8, 16, 512) if options.small else (256, 128, 65_536)
    device = options.device

    def rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, c, device=device), dim=1)

    q, q_mixed, k = rows(n).requires_grad_(), rows(n).requires_grad_(), rows(n)
    queue = rows(k_queue)
    queue_of_columns = queue.T.contiguous()
    mixed = mixmask.mix_batch(
        torch.rand(n, 3, 16, 16, device=device), mixmask.BlockMaskGenerator(8)
    )

    def step(loss: Tensor) -> None:
        loss.backward()
        q.grad = q_mixed.grad = None

    def ours() -> None:
        criterion = InfoNCE(queue, _TEMPERATURE)
        step(criterion(q, k) + mixmask.lambda_weighted_loss(criterion, q_mixed, k, mixed))

    def reference() -> None:
        step(three_cross_entropies(q, q_mixed, k, queue_of_columns, mixed.lam))

    def plain() -> None:
        step(cross_entropy(q, k, queue_of_columns))

    sides = {"ours": ours, "reference": reference, "plain": plain}
    samples, calls = interleave(sides, repeats=options.repeats, device=device)
    peaks = {name: [peak_bytes(side, device)] for name, side in sides.items()}
    sizes = {"N": n, "C": c, "K": k_queue, "dtype": "float32"}
    name = "three-term MoCo loss"
    three, one = "three cross-entropies", "one plain cross-entropy"
    own, own_peak = samples["ours"], peaks["ours"]
    cases = [
        compare(name, three, own, samples["reference"], sizes=sizes, calls=calls, bound=0.30),
        compare(
            name,
            three,
            own_peak,
            peaks["reference"],
            sizes=sizes,
            quantity="peak memory",
            bound=1 / 6,
        ),
        compare(name, one, own, samples["plain"], sizes=sizes, calls=calls, bound=0.85),
        compare(name, one, own_peak, peaks["plain"], sizes=sizes, quantity="peak memory"),
    ]
    report("loss", [*cases, *measure_all(options)], options)


if __name__ == "__main__":
    main()
