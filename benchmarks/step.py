"""Time, peak memory and synchronisations of a training step: MoCo v2 with MixMask.

Against the same step without mixing and against the step of the authors' release: these three
train one model on the same images. Then the trainer's step, beside the authors', lightly's and
solo-learn's, each as its user runs it.

`--precision`, `--channels-last` and `--compile` hold for the trainer's step; lightly's and
solo-learn's have the same precision and nothing else, the authors' stays in float32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from common import (
    Case,
    Side,
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
from peers import LightlyStep, Setting, TrainerStep, solo_missing, solo_step
from roofline import roofline
from torch import Tensor, nn

import mixmask
from mixmask.losses import InfoNCE
from mixmask.trainers.methods import make_config

_DIM, _TEMPERATURE, _MOMENTUM, _LEARNING_RATE, _GRID = 128, 0.2, 0.999, 0.03, 8


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


@dataclass(frozen=True)
class Pair:
    """Two sides that are compared, by their names, with what they are called and their bound."""

    ours: str
    theirs: str
    name: str
    against: str
    bound: float | None = None


_PAIRS = (
    Pair("ours", "plain", "MixMask step", "the step without mixing", 1.80),
    Pair("ours", "reference", "MixMask step", "the authors' step", 1.00),
    Pair("trainer", "trainer plain", "trainer's MixMask step", "the same without mixing", 1.80),
    Pair("trainer", "reference", "trainer's MixMask step", "the authors' step", 1.00),
    Pair("trainer", "lightly mixed", "trainer's MixMask step", "lightly's step with wrap"),
    Pair("trainer plain", "lightly", "trainer's step without mixing", "lightly's step"),
    Pair("trainer symmetric", "solo", "trainer's symmetric step", "solo-learn's step"),
)
# What a GPU with bf16 is to reach: twice the authors' images per second, 1.3 times lightly's.
_ON_GPU = {("trainer", "reference"): 1 / 2, ("trainer plain", "lightly"): 1 / 1.3}
_SMALL = {"arch": "resnet18", "size": 32, "K": 512, "batch_size": 4}


def _options() -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 256 elsewhere")
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16"), help="of the trainer's and peers'"
    )
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory layout of the trainer's step, which always has it",
    )
    parser.add_argument("--compile", action="store_true", help="compile the trainer's backbone")
    options = parser.parse_args()
    sizes: dict[str, Any] = {"arch": "resnet50", "size": 224, "K": 65_536}
    sizes["batch_size"] = options.batch_size or (8 if options.device == "cpu" else 256)
    if options.small:
        sizes = dict(_SMALL)
    if sizes["K"] % sizes["batch_size"]:
        parser.error(
            f"--batch-size must divide the queue of {sizes['K']}, got {sizes['batch_size']}"
        )
    return options, sizes


def peer_sides(
    options: argparse.Namespace, sizes: dict[str, Any], x: Tensor
) -> tuple[dict[str, Side], dict[str, Side]]:
    """Return the trainer's and the peers' steps, and those whose work can be counted."""
    arch, k_queue, n = sizes["arch"], sizes["K"], sizes["batch_size"]
    own = Setting(options.device, options.precision, options.channels_last, options.compile)
    theirs = Setting(options.device, options.precision)
    config = make_config(
        data="imagenet",
        arch=arch,
        image_size=sizes["size"],
        queue_size=k_queue,
        batch_size=n,
        grid_size=_GRID,
    )
    trainer = TrainerStep(config, own)
    lightly = LightlyStep(arch, k_queue, _LEARNING_RATE, theirs, _GRID)
    views, plain_views = [own.view(part) for part in x], list(x)
    sides: dict[str, Side] = {
        "trainer": partial(trainer, *views),
        "trainer plain": partial(trainer, *views, mix=False),
        "lightly": partial(lightly, *plain_views),
        "lightly mixed": partial(lightly, *plain_views, mix=True),
    }
    counted = {"trainer": sides["trainer"], "lightly": sides["lightly"]}
    if own.compile:  # Operations inside of compiled code are not seen.
        counted["trainer"] = partial(TrainerStep(config, replace(own, compile=False)), *views)
    missing = solo_missing()
    if missing:
        print(f"left out: solo-learn's step; {missing}")
    else:
        symmetric = TrainerStep(replace(config, symmetric=True), own)
        sides["trainer symmetric"] = partial(symmetric, *views, mix=False)
        sides["solo"] = partial(solo_step(arch, k_queue, _LEARNING_RATE, theirs, n), *plain_views)
    return sides, counted


def main() -> None:
    """Measure one size, all sides interleaved."""
    options, chosen = _options()
    device, n, size = options.device, chosen["batch_size"], chosen["size"]
    moco = MoCo(chosen["arch"], chosen["K"], device)
    x = torch.randn(2, n, 3, size, size, device=device)
    masks = mixmask.BlockMaskGenerator(_GRID)
    x_q, x_k = x
    own: dict[str, Side] = {
        "ours": lambda: mixmask_step(moco, x_q, x_k, masks),
        "plain": lambda: plain_step(moco, x_q, x_k),
        "reference": lambda: reference_step(moco, x_q, x_k, _GRID),
    }
    peers, counted = peer_sides(options, chosen, x)
    sides = own | peers
    samples, calls = interleave(sides, repeats=options.repeats, device=device, warmup=1)
    peaks = {name: [peak_bytes(side, device)] for name, side in own.items()}
    sizes = {
        "arch": chosen["arch"],
        "images": [n, 3, size, size],
        "K": chosen["K"],
        "grid_size": _GRID,
        "dtype": "float32",
    }
    setting = Setting(device, options.precision, options.channels_last, options.compile)
    peer_sizes = {**sizes, "dtype": f"trainer {setting.label}; peers {options.precision}"}
    on_gpu = torch.device(device).type == "cuda"
    plain_fp32 = options.precision == "fp32" and not options.compile
    variant = "" if plain_fp32 else slug_of(setting)
    cases: list[Case] = []
    for pair in _PAIRS:
        if pair.theirs not in sides:
            continue
        bound = pair.bound
        if on_gpu and options.precision == "bf16":
            bound = _ON_GPU.get((pair.ours, pair.theirs), bound)
        is_own = pair.ours in own
        if is_own and variant:  # They are always in float32, and in the record without a variant.
            continue
        cases.append(
            compare(
                f"{pair.name}, {setting.label}" if variant else pair.name,
                pair.against,
                samples[pair.ours],
                samples[pair.theirs],
                sizes=sizes if is_own else peer_sizes,
                calls=calls,
                bound=bound,
                images=n,
            )
        )
        if is_own:
            cases.append(memory(pair, peaks, sizes))
        if on_gpu and pair.theirs in ("plain", "reference", "trainer plain"):
            cases.append(waits(pair, sides, sizes if is_own else peer_sizes, device))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    rooflines = partial(roofline, seconds=medians, device=device, small=options.small)
    reference = {"reference": own["reference"]}
    if setting.precision == "fp32":
        figures = rooflines(counted | reference, dtype=torch.float32)
    else:
        figures = rooflines(counted, dtype=setting.dtype)
        figures += rooflines(reference, dtype=torch.float32)
    report("step", cases, options, figures, variant=variant)


def slug_of(setting: Setting) -> str:
    """Return a setting in the letters of a file name."""
    return setting.label.replace(", ", "-").replace("channels-last", "nhwc")


def memory(pair: Pair, peaks: dict[str, list[int]], sizes: dict[str, Any]) -> Case:
    """Return a pair's peak memory."""
    return compare(
        pair.name,
        pair.against,
        peaks[pair.ours],
        peaks[pair.theirs],
        sizes=sizes,
        quantity="peak memory",
        bound=1.10 if pair.theirs == "plain" else None,
    )


def waits(pair: Pair, sides: dict[str, Side], sizes: dict[str, Any], device: str) -> Case:
    """Return how often each side of a pair waits for the GPU; mixing may add nothing."""
    return compare(
        pair.name,
        pair.against,
        [synchronisations(sides[pair.ours], device)],
        [synchronisations(sides[pair.theirs], device)],
        sizes=sizes,
        quantity="synchronisations",
        bound=None if pair.theirs == "reference" else 0,
    )


if __name__ == "__main__":
    main()
