"""kNN accuracy of large sets of features, against lightly's `knn_predict`.

Both once on all test features in a call, and lightly's also in batches of 256, as its own
benchmarks call it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from common import arguments, compare, interleave, peak_bytes, report
from lightly.utils.benchmarking import knn_predict
from torch import Tensor

from mixmask.evaluation import knn_scores

_BATCH = 256


def lightly_classes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Return lightly's predictions, all at once; it expects normalised features."""
    bank = F.normalize(train, dim=1).T
    ranked: Tensor = knn_predict(F.normalize(test, dim=1), bank, labels, classes, k, temperature)
    return ranked[:, 0]


def lightly_in_batches(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Return lightly's predictions batch by batch, on a bank that is kept transposed."""
    bank = F.normalize(train, dim=1).T.contiguous()
    batches = (
        knn_predict(F.normalize(x, dim=1), bank, labels, classes, k, temperature)[:, 0]
        for x in torch.split(test, _BATCH)
    )
    return torch.cat(list(batches))


def our_classes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Return our predictions."""
    scores = knn_scores(train, labels, test, k=k, temperature=temperature, classes=classes)
    return scores.argmax(dim=1)


def main() -> None:
    """Measure 100,000 training and 10,000 test features of 100 classes."""
    options = arguments(__doc__, repeats=3).parse_args()
    n, m, dim, classes, k = (
        (2000, 300, 32, 10, 20) if options.small else (100_000, 10_000, 128, 100, 200)
    )
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    splits = []
    for count in (n, m):
        y = torch.randint(classes, (count,), generator=generator)
        x = centres[y] + 3 * torch.randn(count, dim, generator=generator)
        splits.append((x.to(options.device), y.to(options.device)))
    (train, labels), (test, _) = splits
    inputs = (train, labels, test, classes, k, 0.1)
    ours = partial(our_classes, *inputs)
    whole, batches = partial(lightly_classes, *inputs), partial(lightly_in_batches, *inputs)
    samples, calls = interleave(
        {"ours": ours, "whole": whole, "batches": batches},
        repeats=options.repeats,
        device=options.device,
        warmup=1,
    )
    peaks = {
        name: [peak_bytes(side, options.device)]
        for name, side in (("ours", ours), ("whole", whole), ("batches", batches))
    }
    few = (train, labels, test[:512], classes, k, 0.1)
    agreement = float((our_classes(*few) == lightly_in_batches(*few)).float().mean())
    sizes = {"N": n, "M": m, "D": dim, "classes": classes, "k": k, "equal predictions": agreement}
    cases = []
    for side, against, time_bound, memory_bound in (
        ("whole", "lightly's knn_predict", 0.5, 0.1),
        ("batches", f"lightly's knn_predict, batches of {_BATCH}", None, None),
    ):
        pair = samples["ours"], samples[side]
        cases += [
            compare("knn_scores", against, *pair, sizes=sizes, calls=calls, bound=time_bound),
            compare(
                "knn_scores",
                against,
                peaks["ours"],
                peaks[side],
                sizes=sizes,
                quantity="peak memory",
                bound=memory_bound,
            ),
        ]
    report("knn", cases, options)


if __name__ == "__main__":
    main()
