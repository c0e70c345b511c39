"""Three steps of Lightning's, accelerate's and two loss packages' loops, beside an oracle.

Each runs with the lines of the recipes page, and where the package is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import codebases
import pytest
import recipes_page
import torch
import torch.nn.functional as F
from codebases import SHARES, Row, Run, SlowSGD
from slow_loops import STEPS, N, nt_xent, slowly, toward
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mixmask
from mixmask.examples import parts
from mixmask.masks import BlockMaskGenerator

DDP = nn.parallel.DistributedDataParallel


@pytest.fixture
def batches() -> list[Any]:
    return codebases.photograph_pairs(STEPS, N)


class SlowMoCo:
    """MoCo, algorithm 1, with a queue that a step replaces."""

    def __init__(self, encoder_k: Any, queue: Tensor, temperature: float, momentum: float) -> None:
        self.encoder_k, self.queue, self.momentum = encoder_k, queue, momentum
        self.temperature = temperature

    def __call__(self, model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
        encoder = getattr(model, "encoder", model)
        for of_k, of_q in zip(self.encoder_k.parameters(), encoder.parameters(), strict=True):
            of_k.data = self.momentum * of_k.data + (1 - self.momentum) * of_q.data
        q = F.normalize(encoder(views[0]), dim=1)
        q_mixed = F.normalize(encoder(x_mixed), dim=1)
        k = F.normalize(self.encoder_k(views[1]), dim=1).detach()
        total = toward(q, k, 1.0, self.contrast) + toward(q_mixed, k, lam, self.contrast)
        self.queue = torch.cat([k, self.queue])[: len(self.queue)]
        return total

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        """InfoNCE of one query, (C,)."""
        logits = torch.stack([q @ k, *(q @ key for key in self.queue)]) / self.temperature
        return -logits.log_softmax(dim=0)[0]


def lines_in(section: str, file: str | None) -> int:
    """Count the lines that a section adds to one of our examples, or to its own text."""
    source = Path(str(file)).read_text()
    without = source
    for block in recipes_page.blocks("diff", section):
        for old, new in recipes_page.hunks(block.text):
            assert without.count(new) == 1, new
            without = without.replace(new, old)
    return codebases.changed_lines(without, source)


@contextmanager
def frames() -> Iterator[None]:
    """Show frames the real DistributedDataParallel, and give masks the shares of `SHARES`."""
    real = BlockMaskGenerator.__post_init__

    def unequal(masks: BlockMaskGenerator) -> None:
        object.__setattr__(masks, "ratio", 0.4)
        real(masks)

    with (
        mock.patch.object(BlockMaskGenerator, "__post_init__", unequal),
        mock.patch.object(nn.parallel, "DistributedDataParallel", DDP),
    ):
        yield


def test_accelerate(batches: list[Any]) -> None:
    accelerate = pytest.importorskip("accelerate", reason="comes with the extra mixmask[train]")
    from mixmask.examples import accelerate_loop as example

    lines = lines_in("accelerate", example.__file__)
    with codebases.on_cpu() as run, frames():
        torch.manual_seed(0)
        encoder, queue = parts.build_encoder(16), parts.build_queue(4 * N, 16)
        run.start(encoder)
        slow = SlowMoCo(copy.deepcopy(encoder), queue, parts.TEMPERATURE, parts.MOMENTUM)
        pairs: Any = [(views[0], views[1]) for views, _ in batches]
        loader: Any = DataLoader(pairs, batch_size=None)
        accelerator = accelerate.Accelerator(cpu=True)
        losses = list(example.train(accelerator, encoder, queue, loader))
        assert len(losses) == STEPS
        errors = run.errors(*slowly(run, batches, slow, SlowSGD(parts.LR, 0.9, 0.0)))
    Row("accelerate", accelerate.__version__, lines, *errors).check(4)


def test_lightning(batches: list[Any]) -> None:
    pytest.importorskip("pytorch_lightning", reason="comes with the extra mixmask[lightly]")
    with codebases.on_cpu() as run, frames():
        from mixmask.examples import lightning_module

        example: Any = lightning_module
        torch.manual_seed(0)
        model: Any = example.MoCo(parts.build_encoder(16), parts.build_queue(4 * N, 16))
        run.start(model)
        slow = SlowMoCo(
            copy.deepcopy(model.encoder_k), model.queue, parts.TEMPERATURE, parts.MOMENTUM
        )
        pairs: Any = [(views[0], views[1]) for views, _ in batches]
        trainer = example.pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(model, DataLoader(pairs, batch_size=None))
        steps, state = slowly(run, batches, slow, SlowSGD(parts.LR, 0.9, 0.0))
        state |= {f"encoder_k.{name}": value for name, value in slow.encoder_k.state_dict().items()}
        errors = run.errors(steps, state | {"queue": slow.queue})
    lines = lines_in("PyTorch Lightning", example.__file__)
    Row("PyTorch Lightning", example.pl.__version__, lines, *errors).check(4)


def run_loop(loop: str, section: str, number: int, names: dict[str, Any]) -> int:
    """Run a loop with one of the page's diffs in it, and return the number of lines."""
    code = loop
    for old, new in recipes_page.hunks(recipes_page.blocks("diff", section)[number].text):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    for old, new in SHARES.items():
        code = code.replace(old, new)
    exec(compile(code, section, "exec"), names)  # noqa: S102 - our own text
    return codebases.changed_lines(loop, code)


# As in the package's documentation of `SelfSupervisedLoss`.
METRIC_LEARNING = """
loss_func = SelfSupervisedLoss(NTXentLoss(temperature=0.1))
for (x1, x2), _ in batches:
    z1, z2 = encoder(x1), encoder(x2)
    loss = loss_func(z1, z2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def _encoder_and_optimizer(run: Run) -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = parts.build_encoder(16)
    run.start(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.03, 0.9)
    return {"encoder": encoder, "optimizer": optimizer, "mixmask": mixmask}


def test_pytorch_metric_learning(batches: list[Any]) -> None:
    library = pytest.importorskip(
        "pytorch_metric_learning", reason="pytorch-metric-learning is not installed"
    )
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    def slow_loss(model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
        z1, z2, z_mixed = model(views[0]), model(views[1]), model(x_mixed)
        total = nt_xent(z1, z2, 0.1) + lam * nt_xent(z_mixed, z2, 0.1)
        return total + (1 - lam) * nt_xent(z_mixed, z2.flip(0), 0.1)

    with codebases.on_cpu() as run:
        names = _encoder_and_optimizer(run)
        names |= {"batches": batches, "NTXentLoss": NTXentLoss}
        names["SelfSupervisedLoss"] = SelfSupervisedLoss
        lines = run_loop(METRIC_LEARNING, "pytorch-metric-learning", 0, names)
        errors = run.errors(*slowly(run, batches, slow_loss, SlowSGD(0.03, 0.9, 0.0)))
    Row("pytorch-metric-learning", library.__version__, lines, *errors).check(4)


# As in the package's notebook of MoCo: keys are enqueued by a mask, labels are never used twice.
CROSS_BATCH = """
memory = CrossBatchMemory(NTXentLoss(temperature=0.1), embedding_size=16, memory_size=20)
for step, ((x_q, x_k), _) in enumerate(batches):
    q = encoder(x_q)
    with torch.no_grad():
        k = encoder(x_k)
    labels = torch.arange(len(q)).repeat(2) + step * len(q)
    enqueue_mask = torch.arange(2 * len(q)) >= len(q)
    loss = memory(torch.cat([q, k]), labels, enqueue_mask=enqueue_mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


class SlowMemory:
    """InfoNCE against a ring of keys, in which the batch's own are already."""

    def __init__(self, size: int) -> None:
        self.ring: list[Tensor | None] = [None] * size
        self.pointer = 0

    def __call__(self, model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
        q, k = model(views[0]), model(views[1]).detach()
        for key in k:
            self.ring[self.pointer] = key
            self.pointer = (self.pointer + 1) % len(self.ring)
        return toward(q, k, 1.0, self.contrast) + toward(model(x_mixed), k, lam, self.contrast)

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        known = [key for key in self.ring if key is not None]
        logits = torch.stack([F.cosine_similarity(q, key, dim=0) for key in known]) / 0.1
        return logits.exp().sum().log() - F.cosine_similarity(q, k, dim=0) / 0.1


def test_cross_batch_memory(batches: list[Any]) -> None:
    library = pytest.importorskip(
        "pytorch_metric_learning", reason="pytorch-metric-learning is not installed"
    )
    from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss

    with codebases.on_cpu() as run:
        names = _encoder_and_optimizer(run)
        names |= {"batches": batches, "NTXentLoss": NTXentLoss, "torch": torch}
        names["CrossBatchMemory"] = CrossBatchMemory
        lines = run_loop(CROSS_BATCH, "pytorch-metric-learning", 1, names)
        slow = SlowMemory(20)
        steps = slowly(run, batches, slow, SlowSGD(0.03, 0.9, 0.0))
        loss, gradients, state = run.errors(*steps)
        memory = names["memory"]
        ring = torch.stack([key for key in slow.ring if key is not None])
        state = max(state, codebases.worst({"m": memory.embedding_memory}, {"m": ring}))
        assert memory.queue_idx == slow.pointer == 3 * N % 20
        assert memory.has_been_filled
    Row("CrossBatchMemory", library.__version__, lines, loss, gradients, state).check(4)


# As in the package's README, with a queue that each step replaces.
INFO_NCE = """
info_nce = InfoNCE(temperature=0.1)
for (x_q, x_k), _ in batches:
    q = encoder(x_q)
    with torch.no_grad():
        k = encoder(x_k)
    loss = info_nce(q, k, queue)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    queue = torch.cat([k, queue])[:len(queue)]
"""


def test_info_nce_pytorch(batches: list[Any]) -> None:
    pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed")
    from importlib.metadata import version

    from info_nce import InfoNCE

    with codebases.on_cpu() as run:
        names = _encoder_and_optimizer(run)
        first = parts.build_queue(4 * N, 16)
        names |= {"batches": batches, "InfoNCE": InfoNCE, "torch": torch, "queue": first}
        lines = run_loop(INFO_NCE, "info-nce-pytorch", 0, names)
        queue = first

        def contrast(q: Tensor, k: Tensor) -> Tensor:
            keys = [k, *queue]
            logits = torch.stack([F.cosine_similarity(q, key, dim=0) for key in keys]) / 0.1
            return -logits.log_softmax(dim=0)[0]

        def slow_loss(model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
            nonlocal queue
            q, k = model(views[0]), model(views[1]).detach()
            total = toward(q, k, 1.0, contrast) + toward(model(x_mixed), k, lam, contrast)
            queue = torch.cat([k, queue])[: len(queue)]
            return total

        loss, gradients, state = run.errors(
            *slowly(run, batches, slow_loss, SlowSGD(0.03, 0.9, 0.0))
        )
        state = max(state, codebases.worst({"queue": names["queue"]}, {"queue": queue}))
    Row("info-nce-pytorch", version("info-nce-pytorch"), lines, loss, gradients, state).check(4)
