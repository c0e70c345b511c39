"""Losses over a batch, their clean and both mixed terms, beside what others compute: see loss.py.

Against three calls of the plain formula, one call of it, and three calls of what a user would
pick instead: lightly's and pytorch-metric-learning's NT-Xent and info-nce-pytorch, where they are
installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import Case, compare, interleave, peak_bytes
from torch import Tensor

import mixmask
from mixmask import losses

Loss = Callable[[Tensor, Tensor], Tensor]

_TEMPERATURE = 0.2
_CONTRASTIVE_BOUNDS = {"three": (0.5, 0.1), "one": (1.0, None)}
_STATISTICS_BOUNDS = {"three": (0.7, None)}


def nt_xent(z: Tensor, target: Tensor) -> Tensor:
    """Return NT-Xent as the cross-entropy of (2N, 2N) logits."""
    n = len(z)
    rows = F.normalize(torch.cat([z, target]), dim=1)
    logits = rows @ rows.T / _TEMPERATURE
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def info_nce(z: Tensor, target: Tensor) -> Tensor:
    """Return InfoNCE with the batch's other targets as the cross-entropy of (N, N) logits."""
    z, target = F.normalize(z, dim=1), F.normalize(target, dim=1)
    return F.cross_entropy(z @ target.T / _TEMPERATURE, torch.arange(len(z), device=z.device))


def barlow_twins(z: Tensor, target: Tensor) -> Tensor:
    """Return Barlow Twins as its authors write it."""
    z, target = ((rows - rows.mean(dim=0)) / rows.std(dim=0) for rows in (z, target))
    correlation = z.T @ target / len(z)
    on_diagonal = (correlation.diagonal() - 1).pow(2).sum()
    return on_diagonal + 5e-3 * _drop_diagonal(correlation).pow(2).sum()


def vicreg(z: Tensor, target: Tensor) -> Tensor:
    """Return VICReg as its authors write it."""
    loss = 25 * F.mse_loss(z, target)
    for rows in (z, target):
        centred = rows - rows.mean(dim=0)
        deviation = (centred.var(dim=0) + 1e-4).sqrt()
        covariance = centred.T @ centred / (len(rows) - 1)
        loss = loss + 25 * F.relu(1 - deviation).mean() / 2
        loss = loss + _drop_diagonal(covariance).pow(2).sum() / rows.shape[1]
    return loss


def _drop_diagonal(square: Tensor) -> Tensor:
    c = len(square)
    return square.flatten()[:-1].view(c - 1, c + 1)[:, 1:]


def find_peers() -> dict[str, dict[str, Loss]]:
    """Return the criteria of other packages that are installed, by what they compute."""
    peers: dict[str, dict[str, Loss]] = {"NT-Xent": {}, "NT-Xent, cubic": {}, "InfoNCE": {}}
    try:
        from lightly.loss import NTXentLoss as OfLightly
    except ImportError:
        pass
    else:
        peers["NT-Xent"]["lightly's NTXentLoss"] = OfLightly(_TEMPERATURE)
    try:
        from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
    except ImportError:
        pass
    else:
        wrapped: Any = SelfSupervisedLoss(NTXentLoss(_TEMPERATURE))
        # It compares (2N, 4 N^2) labels: 550 GB at N 4,096.
        peers["NT-Xent, cubic"]["pytorch-metric-learning's NTXentLoss"] = wrapped
    try:
        from info_nce import InfoNCE
    except ImportError:
        pass
    else:
        peers["InfoNCE"]["info-nce-pytorch"] = InfoNCE(_TEMPERATURE)
    return peers


def measure(
    name: str,
    ours: Loss,
    plain: Loss,
    peers: dict[str, Loss],
    n: int,
    c: int,
    options: argparse.Namespace,
) -> list[Case]:
    """Measure one loss, all sides interleaved."""
    device = options.device
    z, z_mixed, target = (torch.randn(n, c, device=device).requires_grad_() for _ in range(3))
    mixed = mixmask.mix_batch(
        torch.rand(n, 1, 16, 16, device=device), mixmask.BlockMaskGenerator(8)
    )
    lam, partner = mixed.lam, mixed.partner

    def step(loss: Tensor) -> None:
        loss.backward()
        z.grad = z_mixed.grad = target.grad = None

    def share() -> None:
        step(ours(z, target) + mixmask.lambda_weighted_loss(ours, z_mixed, target, mixed))

    def call_thrice(loss: Loss) -> None:
        own, other = loss(z_mixed, target), loss(z_mixed, target[partner])
        step(loss(z, target) + lam * own + (1 - lam) * other)

    sides: dict[str, Callable[[], object]] = {
        "ours": share,
        "three plain calls": partial(call_thrice, plain),
    }
    sides["one plain call"] = lambda: step(plain(z, target))
    for peer, loss in peers.items():
        sides[f"three calls of {peer}"] = partial(call_thrice, loss)
    samples, calls = interleave(sides, repeats=options.repeats, device=device, warmup=1)
    peaks = {side: [peak_bytes(call, device)] for side, call in sides.items()}
    bounds = _CONTRASTIVE_BOUNDS if name in find_peers() else _STATISTICS_BOUNDS
    if n < 4096 and name in find_peers():
        bounds = {}  # They are stated for 4,096.
    sizes = {"N": n, "C": c, "dtype": "float32"}
    cases = []
    for side in list(sides)[1:]:
        of_time, of_memory = bounds.get(side.partition(" ")[0], (None, None))
        if side not in ("three plain calls", "one plain call"):
            of_time = of_memory = None
        described = f"{name} with both mixed terms, N {n:,}"
        cases += [
            compare(
                described, side, samples["ours"], samples[side],
                sizes=sizes, calls=calls, bound=of_time,
            ),
            compare(
                described, side, peaks["ours"], peaks[side],
                sizes=sizes, quantity="peak memory", bound=of_memory,
            ),
        ]  # fmt: skip
    return cases


def measure_all(options: argparse.Namespace) -> list[Case]:
    """Measure each loss at one size."""
    n, c = (16, 8) if options.small else (4096, 128)
    wide = (8, 32) if options.small else (256, 2048)
    peers = find_peers()
    of_views, of_targets = losses.NTXent(_TEMPERATURE), losses.InfoNCE(temperature=_TEMPERATURE)
    return [
        *measure("NT-Xent", of_views, nt_xent, peers["NT-Xent"], n, c, options),
        *measure(
            "NT-Xent", of_views, nt_xent, peers["NT-Xent, cubic"], max(n // 16, 4), c, options
        ),
        *measure(
            "InfoNCE", _NormalizedInfoNCE(of_targets), info_nce, peers["InfoNCE"], n, c, options
        ),
        *measure("Barlow Twins", losses.BarlowTwins(), barlow_twins, {}, *wide, options),
        *measure("VICReg", losses.VICReg(), vicreg, {}, *wide, options),
    ]


class _NormalizedInfoNCE:
    """InfoNCE of rows of any length, as the formula beside it takes them."""

    def __init__(self, criterion: losses.InfoNCE) -> None:
        self.criterion = criterion

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        return self.criterion(F.normalize(z, dim=1), F.normalize(target, dim=1))

    def weighted(
        self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor, partner: Tensor
    ) -> Tensor:
        z, target = F.normalize(z, dim=1), F.normalize(target, dim=1)
        return self.criterion.weighted(z, target, other, lam, partner)
