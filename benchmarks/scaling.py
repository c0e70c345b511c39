"""How costs grow: over batch, queue, grid, workers and processes, measured and on paper.

Times over a size are fitted by a power of it. What processes exchange is counted without any:
a step of ResNet-50 at 224 px runs on tensors without values while collectives write down what
they were given, for any number of GPUs. Two local processes show the same counts at work.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from zipfile import ZipFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    ROOT,
    Side,
    Spread,
    amount,
    arguments,
    circumstances,
    interleave,
    slug,
    write_json,
)
from torch.multiprocessing.spawn import spawn

import mixmask
from mixmask import losses
from mixmask.data.folders import Files, list_folder
from mixmask.data.sets import StoredImages
from mixmask.data.stream import Draw, Stream
from mixmask.data.views import RandomView
from mixmask.trainers.methods import METHODS, build_method, make_config

Row = dict[str, Any]

_GPUS, _GBITS = (8, 64, 512), (100, 400)


def power(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return p of the least-squares fit seconds ~ size ** p."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    middle = statistics.fmean(x)
    slope = sum((a - middle) * b for a, b in zip(x, y, strict=True))
    return slope / sum((a - middle) ** 2 for a in x)


def grow(
    name: str, axis: str, sizes: Sequence[int], build: Callable[[int], Side], options: Any
) -> Row:
    """Time a side at each size, all in turn; return the times and the power that fits them."""
    sides = {str(size): build(size) for size in sizes}
    samples, _ = interleave(sides, repeats=options.repeats, device=options.device, warmup=1)
    # The fastest of the samples: what disturbs one size must not bend the fit.
    fitted = power(sizes, [min(taken) for taken in samples.values()])
    return {**times(name, axis, samples), "power": fitted}


def times(name: str, axis: str, samples: Mapping[str, Sequence[float]]) -> Row:
    """Return the samples of each size as a row of the record."""
    spreads = [asdict(Spread.of(taken)) for taken in samples.values()]
    return {"what": name, "axis": axis, "sizes": list(map(int, samples)), "seconds": spreads}


def mixed_loss(criterion: Any, n: int, c: int, device: str) -> Side:
    """Return a clean term and both mixed ones of N rows, forward and backward."""
    rows = [F.normalize(torch.randn(n, c, device=device), dim=1) for _ in range(3)]
    z, z_mixed, target = rows[0].requires_grad_(), rows[1].requires_grad_(), rows[2]
    mixed = mixmask.mix_batch(
        torch.rand(n, 1, 16, 16, device=device), mixmask.BlockMaskGenerator(8)
    )

    def step() -> None:
        loss = criterion(z, target)
        loss = loss + mixmask.lambda_weighted_loss(criterion, z_mixed, target, mixed)
        loss.backward()
        z.grad = z_mixed.grad = None

    return step


def single(options: Any) -> list[Row]:
    """Measure what one process does, over N, K and g."""
    device, few = options.device, options.small
    batches, grids = ([4, 8], [2, 4]) if few else ([256, 1024, 4096], [4, 8, 16, 32])
    small, queues = ([4, 8], [64, 128]) if few else ([32, 64, 128], [4096, 16_384, 65_536])

    def masks(n: int, grid: int) -> Side:
        return partial(mixmask.BlockMaskGenerator(grid), n, device=device)

    def mixing(n: int) -> Side:
        images = torch.rand(n, 3, 64, 64, device=device)
        return partial(mixmask.mix_batch, images, mixmask.BlockMaskGenerator(8))

    def moco(n: int, k: int) -> Side:
        queue = F.normalize(torch.randn(k, 128, device=device), dim=1)
        return mixed_loss(losses.InfoNCE(queue, 0.2), n, 128, device)

    def views(n: int) -> Side:
        images = torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8, device=device)
        return partial(RandomView(32).to(device), images)

    return [
        grow("masks, grid 8", "N", batches, lambda n: masks(n, 8), options),
        grow("1,024 masks", "g", grids, lambda g: masks(4 if few else 1024, g), options),
        grow("mixing, 64 px", "N", small, mixing, options),
        grow("MoCo's three terms, K 65,536", "N", small, lambda n: moco(n, queues[-1]), options),
        grow("MoCo's three terms, N 128", "K", queues, lambda k: moco(small[-1], k), options),
        grow("NT-Xent's three terms", "N", batches,
             lambda n: mixed_loss(losses.NTXent(0.2), n, 128, device), options),
        grow("a view, 32 px from 64 px", "N", small, views, options),
    ]  # fmt: skip


def loading(options: Any) -> Row:
    """Measure crops of 64 px files by 0, 1 and 2 workers, starts included."""
    count = 8 if options.small else 512
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(mixmask.__file__).parent / "data" / "clothing64.zip"
        ZipFile(archive).extractall(scratch)
        found = list_folder(Path(scratch) / "clothing64").train.files
        assert isinstance(found, Files)
        images = StoredImages(found.subset(range(count)), 64)

        def read(workers: int) -> None:
            draws = [Draw(part, 2, i) for i, part in enumerate(torch.arange(count).split(64))]
            device = torch.device(options.device)
            stream = Stream(images, draws, size=64, min_scale=0.2, workers=workers, device=device)
            with closing(stream) as batches:
                for _ in batches:
                    pass

        sides: dict[str, Side] = {str(workers): partial(read, workers) for workers in (0, 1, 2)}
        samples, _ = interleave(sides, repeats=options.repeats, device="cpu", warmup=1)
    return times(f"two crops of each of {count} files of 64 px", "workers", samples)


@contextmanager
def counted(world: int) -> Iterator[list[float]]:
    """Pretend to be one of `world` processes; yield a list that collects the bytes received.

    As in rings: gathering brings the rows of all others, a sum twice its size but for the own part.
    """
    received: list[float] = []
    share = (world - 1) / world

    def note(factor: float) -> Callable[..., None]:
        return lambda tensor, *_, **__: received.append(factor * share * tensor.nbytes)

    alike: dict[str, Any] = {"check_even": lambda *_: None}
    with (
        mock.patch.multiple(
            dist,
            is_initialized=lambda: True,
            get_world_size=lambda: world,
            get_rank=lambda: 0,
            all_reduce=note(2),
            all_to_all_single=note(1),
        ),
        mock.patch.multiple("mixmask._distributed", _all_gather=note(1), **alike),
        mock.patch.multiple("mixmask.losses.redundancy", **alike),
        mock.patch.multiple("mixmask.losses.clustering", **alike),
    ):
        yield received


def exchanged(method: str, world: int, *, mix: bool, small: bool) -> tuple[float, float]:
    """Return the bytes that a process receives per step: by the method, and for its gradients."""
    given: dict[str, Any] = {"arch": "resnet50", "image_size": 224, "batch_size": 256}
    if small:
        given = {"arch": "narrow", "image_size": 32, "batch_size": 8}
    config = make_config(data="imagenet", method=method, **given)
    size = config.image_size
    with torch.device("meta"):
        model: Any = build_method(config)
        x1, x2 = torch.empty(2, config.batch_size, 3, size, size)
    with counted(world) as received:
        for term in model.terms(x1, x2, torch.Generator().manual_seed(0), mix=mix):
            term.loss.backward()
        model.after_step(0.5)
    trained = sum(p.nbytes for p in model.parameters() if p.grad is not None)
    return sum(received), 2 * trained * (world - 1) / world


def on_paper(options: Any) -> list[Row]:
    """Count the bytes that a process receives per step with each method, at 256 images per GPU."""
    rows = []
    for method in METHODS:
        for world in _GPUS:
            own, gradients = exchanged(method, world, mix=True, small=options.small)
            plain, _ = exchanged(method, world, mix=False, small=options.small)
            rows.append({
                "method": method, "gpus": world, "gradients": gradients, "method_bytes": own,
                "mixed_bytes": own - plain,
            })  # fmt: skip
    return rows


def _work(rank: int, folder: str, world: int, n: int, steps: int) -> None:
    """Take steps of MoCo on small images in one of the processes, one thread each."""
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    config = make_config(data="clothing64", batch_size=n)
    torch.manual_seed(0)
    model: Any = build_method(config)
    model.to(memory_format=torch.channels_last)
    images = torch.randn(2 * n, 3, 32, 32).to(memory_format=torch.channels_last)
    x1, x2 = images.chunk(2)
    generator, times = torch.Generator().manual_seed(0), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        for term in model.terms(x1, x2, generator):
            term.loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None and world > 1:
                dist.all_reduce(parameter.grad)
        model.after_step(0.5)
        times.append(time.perf_counter() - start)
    if rank == 0:
        torch.save(times[2:], f"{folder}/times.pt")
    if world > 1:
        dist.destroy_process_group()


def processes(options: Any) -> Row:
    """Measure a small step of MoCo in one process and in two, of one thread each."""
    n, steps = (8, 2) if options.small else (64, 30)
    samples = {}
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            spawn(_work, (folder, world, n, steps), world)
            samples[str(world)] = torch.load(f"{folder}/times.pt")
    return times(f"a MoCo step, narrow, {n} images of 32 px in each process", "processes", samples)


def tables(record: Mapping[str, Any]) -> str:
    """Return what was measured, and what was counted, as two tables."""
    lines = ["| what | over | sizes | time (quartiles) | power |", "| --- " * 5 + "|"]
    for row in record["measured"]:
        sizes = ", ".join(f"{size:,}" for size in row["sizes"])
        taken = ", ".join(
            f"{amount(one['median'], 's')} ({amount(one['q1'], 's')} … {amount(one['q3'], 's')})"
            for one in row["seconds"]
        )
        power_of = f"{row['power']:.2f}" if "power" in row else "–"
        lines.append(f"| {row['what']} | {row['axis']} | {sizes} | {taken} | {power_of} |")
    rates = " | ".join(f"at {rate} Gbit/s" for rate in _GBITS)
    head = "| method | GPUs | gradients | the method's own | of which mixing |"
    lines += ["", f"{head} {rates} |", "| --- " * (5 + len(_GBITS)) + "|"]
    for row in record["counted"]:
        parts = [amount(row[key], "bytes") for key in ("gradients", "method_bytes", "mixed_bytes")]
        total = (row["gradients"] + row["method_bytes"]) * 8
        parts += [amount(total / (rate * 1e9), "s") for rate in _GBITS]
        lines.append(f"| {row['method']} | {row['gpus']} | {' | '.join(parts)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and count everything."""
    options = arguments(__doc__, repeats=5).parse_args()
    measured = [*single(options), loading(options), processes(options)]
    record = {"measured": measured, "counted": on_paper(options)}
    print(tables(record))
    if options.out is None and options.small:
        return
    around = {"script": "scaling", "small": options.small, **circumstances(options.device)}
    out = options.out or ROOT / "results" / f"scaling-{slug(options.device)}.json"
    write_json(out, {**around, "scaling": record})


if __name__ == "__main__":
    main()
