"""Loops of lightly's users with our lines in them, beside the same loops written out slowly.

Every method is a LightningModule, as lightly's users write them. It runs by `Trainer.fit` and by
a plain loop; the slow one has the formulas of the papers, a queue and weights that move name by
name, and none of our code but the draw of the masks. The two are compared in float64: a few steps
with small batches blow float32's roundings up to 1e-2.
"""

from __future__ import annotations

import pytest

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install '.[lightly]' for these tests"
)

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightly_methods import (
    BYOL,
    DINO,
    GRID,
    LR,
    MOMENTUM,
    PROTOTYPES,
    QUEUE,
    RATIO,
    STEPS,
    TAU,
    WIDTH,
    BarlowTwins,
    Batch,
    Method,
    MoCo,
    N,
    SimCLR,
    SimSiam,
    SwaV,
    draw_generator,
)
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mixmask import BlockMaskGenerator
from mixmask.data.named import clothing64

# Imported in the usual way it leads mypy, which finds a py.typed here, into all of lightly.
transforms = pytest.importorskip("lightly.transforms")


pytestmark = [
    # A few steps in a process of their own need neither workers nor logs.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # lightly's head of DINO.
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning"),
]


LARGE = 32
SMALL = 16
Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Two large and two small crops of photographs, drawn by lightly."""
    torch.manual_seed(0)
    (files, _), _, _ = clothing64()
    crops = transforms.SwaVTransform(crop_sizes=(LARGE, SMALL), crop_counts=(2, 2), normalize=None)
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files[:: len(files) // 60]]
    views = [crops(image) for image in images[: STEPS * N]]
    columns = [torch.stack(column) for column in zip(*views, strict=True)]
    return [[column[i * N : (i + 1) * N] for column in columns] for i in range(STEPS)]


def _mixed_slowly(x: Tensor, step: int, view: int = 0) -> tuple[Tensor, float]:
    """Images and their partners from the other end of the batch, pixel by pixel."""
    cells = BlockMaskGenerator(GRID, RATIO)(generator=draw_generator(step, view))
    size = x.shape[-1]
    mixed, kept = x.clone(), 0
    for row in range(size):
        for column in range(size):
            if cells[row * GRID // size, column * GRID // size]:
                kept += 1
                continue
            for i in range(len(x)):
                mixed[i, :, row, column] = x[len(x) - 1 - i, :, row, column]
    return mixed, kept / size**2


def _eq_4(loss: Loss, z_mixed: Tensor, target: Tensor, lam: float) -> Tensor:
    return lam * loss(z_mixed, target) + (1 - lam) * loss(z_mixed, target.flip(0))


def _cosine(p: Tensor, z: Tensor) -> Tensor:
    p, z = p.double(), z.double()
    return torch.stack([-(a @ b) / a.norm() / b.norm() for a, b in zip(p, z, strict=True)]).mean()


def _nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    rows = torch.cat([z0, z1]).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    losses = []
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j != i]
        similar = rows[others] @ rows[i] / TAU
        losses.append(similar.logsumexp(dim=0) - rows[i] @ rows[(i + N) % (2 * N)] / TAU)
    return torch.stack(losses).mean()


def _barlow(z0: Tensor, z1: Tensor) -> Tensor:
    features = [
        (z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + 1e-5).sqrt()
        for z in (z0.double(), z1.double())
    ]
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(WIDTH):
        for j in range(WIDTH):
            correlation = (features[0][:, i] * features[1][:, j]).mean()
            loss = loss + ((1 - correlation) ** 2 if i == j else 5e-3 * correlation**2)
    return loss


def _cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """Of temperature 0.1, which both SwAV and DINO have."""
    return -(target * (z.double() / 0.1).log_softmax(dim=1)).sum(dim=1).mean()


def _follow(model: nn.Module, teacher: nn.Module) -> None:
    weights = dict(model.named_parameters())
    for name, weight in teacher.named_parameters():
        weight.data = MOMENTUM * weight.data + (1 - MOMENTUM) * weights[name].data


Slow = Iterator[Tensor]


def slow_moco(method: Any, batches: list[Batch]) -> Slow:
    queue = method.criterion.criterion.memory_bank.bank.clone()
    for step, (x_query, x_key, *_) in enumerate(batches):
        _follow(method.backbone, method.backbone_momentum)
        _follow(method.head, method.head_momentum)
        query = method.head(method.backbone(x_query))
        key = method.head_momentum(method.backbone_momentum(x_key)).detach()
        images, lam = _mixed_slowly(x_query, step)
        query_mixed = method.head(method.backbone(images))

        def info_nce(q: Tensor, k: Tensor, queue: Tensor = queue) -> Tensor:
            losses = []
            for i in range(N):
                a, b = q[i].double() / q[i].double().norm(), k[i].double() / k[i].double().norm()
                logits = torch.cat([(a @ b)[None], queue.double() @ a]) / TAU
                losses.append(logits.logsumexp(dim=0) - logits[0])
            return torch.stack(losses).mean()

        yield info_nce(query, key) + _eq_4(info_nce, query_mixed, key, lam)
        queue = torch.cat([queue[N:], key / key.norm(dim=1, keepdim=True)])


def _slow_pairs(method: Any, batches: list[Batch], loss: Loss) -> Slow:
    for step, (x0, x1, *_) in enumerate(batches):
        z0, z1 = method.head(method.backbone(x0)), method.head(method.backbone(x1))
        total = loss(z0, z1)
        for view, (x, target) in enumerate([(x0, z1), (x1, z0)][: 1 + method.both]):
            images, lam = _mixed_slowly(x, step, view)
            total = total + _eq_4(loss, method.head(method.backbone(images)), target, lam)
        yield total


def slow_simclr(method: Any, batches: list[Batch]) -> Slow:
    return _slow_pairs(method, batches, _nt_xent)


def slow_barlow(method: Any, batches: list[Batch]) -> Slow:
    return _slow_pairs(method, batches, _barlow)


def slow_byol(method: Any, batches: list[Batch]) -> Slow:
    for step, (x0, x1, *_) in enumerate(batches):
        _follow(method.backbone, method.backbone_momentum)
        _follow(method.head, method.head_momentum)
        p0, p1 = (method.predictor(method.head(method.backbone(x))) for x in (x0, x1))
        z0, z1 = (method.head_momentum(method.backbone_momentum(x)).detach() for x in (x0, x1))
        total = _cosine(p0, z1) + _cosine(p1, z0)
        for view, (x, target) in enumerate([(x0, z1), (x1, z0)][: 1 + method.both]):
            images, lam = _mixed_slowly(x, step, view)
            p_mixed = method.predictor(method.head(method.backbone(images)))
            total = total + _eq_4(_cosine, p_mixed, target, lam)
        yield total


def slow_simsiam(method: Any, batches: list[Batch]) -> Slow:
    for step, (x0, x1, *_) in enumerate(batches):
        z0, z1 = (method.head(method.backbone(x)) for x in (x0, x1))
        p0, p1 = method.predictor(z0), method.predictor(z1)
        z0, z1 = z0.detach(), z1.detach()
        total = _cosine(p0, z1) / 2 + _cosine(p1, z0) / 2
        for view, (x, target) in enumerate([(x0, z1), (x1, z0)][: 1 + method.both]):
            images, lam = _mixed_slowly(x, step, view)
            p_mixed = method.predictor(method.head(method.backbone(images)))
            total = total + _eq_4(_cosine, p_mixed, target, lam)
        yield total


def _slow_crops(method: Any, batch: Batch, step: int, targets: Batch, logits: Batch) -> Tensor:
    """Every crop against the targets of the other large ones; then the mixed ones likewise."""
    pairs = [(v, i) for i in range(2) for v in range(len(logits)) if v != i]
    losses = [_cross_entropy(logits[v], targets[i]) for v, i in pairs]
    total = torch.stack(losses).mean()
    for view in [1, 2] if method.both else [0]:
        images, lam = _mixed_slowly(batch[view], step, view)
        z_mixed = method(images)
        terms = [_eq_4(_cross_entropy, z_mixed, targets[i], lam) for i in range(2) if i != view]
        total = total + torch.stack(terms).mean()
    return total


def slow_swav(method: Any, batches: list[Batch]) -> Slow:
    for step, batch in enumerate(batches):
        weight = method.prototypes.heads[0].weight
        weight.data = weight.data / weight.data.norm(dim=1, keepdim=True)
        scores = [method(crop) for crop in batch]
        codes = []
        for crop in scores[:2]:
            code = (crop.detach().double() / 0.05).exp()
            for _ in range(3):
                code = code / code.sum(dim=0, keepdim=True)
                code = code / code.sum(dim=1, keepdim=True)
            codes.append(code)
        yield _slow_crops(method, batch, step, codes, scores)


def slow_dino(method: Any, batches: list[Batch]) -> Slow:
    center = torch.zeros(PROTOTYPES, dtype=torch.float64)
    for step, batch in enumerate(batches):
        _follow(method.backbone, method.backbone_momentum)
        _follow(method.head, method.head_momentum)
        teacher = [
            method.head_momentum(method.backbone_momentum(crop)).detach().double()
            for crop in batch[:2]
        ]
        student = [method(crop) for crop in batch]
        # lightly rounds this one number to float32, and so does the oracle.
        temperature = float(torch.tensor(0.07))
        targets = [((logits - center) / temperature).softmax(dim=1) for logits in teacher]
        yield _slow_crops(method, batch, step, targets, student)
        center = 0.9 * center + 0.1 * torch.cat(teacher).mean(dim=0)


EXAMPLES: dict[str, tuple[Callable[[], Method], Callable[[Any, list[Batch]], Slow]]] = {
    "moco": (MoCo, slow_moco),
    "simclr": (SimCLR, slow_simclr),
    "simclr both": (lambda: SimCLR(both=True), slow_simclr),
    "barlow": (BarlowTwins, slow_barlow),
    "barlow both": (lambda: BarlowTwins(both=True), slow_barlow),
    "byol": (BYOL, slow_byol),
    "byol both": (lambda: BYOL(both=True), slow_byol),
    "simsiam": (SimSiam, slow_simsiam),
    "simsiam both": (lambda: SimSiam(both=True), slow_simsiam),
    "swav": (SwaV, slow_swav),
    "swav, others": (lambda: SwaV(both=True), slow_swav),
    "dino": (DINO, slow_dino),
    "dino, others": (lambda: DINO(both=True), slow_dino),
}
every = pytest.mark.parametrize("name", EXAMPLES)


def _build(name: str) -> Method:
    torch.manual_seed(1)
    return EXAMPLES[name][0]()


def _wide(batches: list[Batch]) -> list[Batch]:
    return [[crop.double() for crop in batch] for batch in batches]


def _run_slowly(name: str, batches: list[Batch]) -> Method:
    method = _build(name).double()
    batches = _wide(batches)
    trained = [weight for weight in method.parameters() if weight.requires_grad]
    for loss in EXAMPLES[name][1](method, batches):
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for weight, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                weight.data -= LR * gradient
        method.seen.append(loss.item())
    return method


def _run_plainly(name: str, batches: list[Batch], dtype: torch.dtype = torch.float32) -> Method:
    method = _build(name).to(dtype)
    batches = _wide(batches) if dtype == torch.float64 else batches
    optimizer = method.configure_optimizers()
    for step, batch in enumerate(batches):
        loss = method.training_step(batch, step)
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.seen.append(loss.item())
    return method


def _trainer(folder: Path, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def _run_by_lightning(name: str, batches: list[Batch], folder: Path) -> Method:
    method = _build(name)
    _trainer(folder).fit(method, _loader(batches))
    return method


def _agree(ours: Method, slow: Method) -> None:
    """Each step's loss, and then the weights, of the teacher too, and what batch norm saw."""
    assert len(ours.seen) == STEPS
    np.testing.assert_allclose(ours.seen, slow.seen, rtol=1e-9, atol=1e-9)
    others = dict(slow.named_buffers()) | dict(slow.named_parameters())
    for key, value in (*ours.named_buffers(), *ours.named_parameters()):
        if not key.startswith("criterion."):
            torch.testing.assert_close(value, others[key], rtol=1e-9, atol=1e-9)


@every
def test_a_plain_loop_is_that_of_the_paper(name: str, batches: list[Batch]) -> None:
    slow = _run_slowly(name, batches)
    _agree(_run_plainly(name, batches, torch.float64), slow)
    narrow = _run_plainly(name, batches)
    assert narrow.seen[0] == pytest.approx(slow.seen[0], rel=1e-5, abs=1e-5)


@every
def test_trainer_fit_is_the_plain_loop(name: str, batches: list[Batch], tmp_path: Path) -> None:
    plain, fitted = _run_plainly(name, batches), _run_by_lightning(name, batches, tmp_path)
    assert fitted.seen == plain.seen
    state = plain.state_dict()
    assert fitted.state_dict().keys() == state.keys()
    for key, value in fitted.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_the_bank_holds_the_keys_of_the_last_steps(batches: list[Batch]) -> None:
    method: Any = _run_plainly("moco", batches)
    bank = method.criterion.criterion.memory_bank
    assert int(bank.bank_ptr) == STEPS * N % QUEUE
    key = method.head_momentum(method.backbone_momentum(batches[-1][1]))
    start = (STEPS - 1) * N % QUEUE
    torch.testing.assert_close(bank.bank[start : start + N], F.normalize(key, dim=1).detach())


@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_run_that_lightning_resumes_ends_alike(
    name: str, batches: list[Batch], tmp_path: Path
) -> None:
    whole = _build(name)
    _trainer(tmp_path, epochs=2).fit(whole, _loader(batches))
    first = _build(name)
    trainer = _trainer(tmp_path)
    trainer.fit(first, _loader(batches))
    trainer.save_checkpoint(tmp_path / "first.ckpt")

    torch.manual_seed(2)
    second = EXAMPLES[name][0]()
    _trainer(tmp_path, epochs=2).fit(
        second, _loader(batches), ckpt_path=str(tmp_path / "first.ckpt")
    )
    assert first.seen + second.seen == whole.seen
    state = whole.state_dict()
    assert any("bank" in key or "center" in key for key in state)
    for key, value in second.state_dict().items():
        assert torch.equal(value, state[key]), key
