"""Criteria, mixed terms and integrations on a pretended accelerator, in one process and in two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import kornia.augmentation as K
import pytest
import torch
import torch.nn.functional as F
from pretended import DEVICE, Accelerator, pretend
from pretended_known import NEW_CRITERIA
from pretended_processes import pretend_two_processes
from torch import Tensor, nn

from mixmask import BlockMaskGenerator, LambdaWeightedLoss, losses, mix_batch
from mixmask import lambda_weighted_loss as weigh
from mixmask.integrations.kornia import RandomMixMask, take_labels
from mixmask.integrations.moco import mixed_loss, wrap
from mixmask.integrations.recording import RecordingCriterion, RecordingView, record_embeddings

N, C, Q = 8, 12, 20
MASKS = BlockMaskGenerator(4)


class Bank(nn.Module):
    """A criterion whose every call moves a bank, a pointer and a running center."""

    bank: Tensor
    center: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("bank", F.normalize(torch.randn(Q, C), dim=1))
        self.center = torch.zeros(C, device=device)
        self.pointer, self.seen = 0, [0]
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        loss = losses.info_nce(self.scale * z, target - self.center, self.bank)
        rows = torch.arange(self.pointer, self.pointer + len(z), device=z.device) % Q
        self.bank.index_copy_(0, rows, target.detach())
        self.center = losses.update_center(self.center, target)
        self.pointer = (self.pointer + len(z)) % Q
        self.seen[0] += 1
        return loss


def _closure(z: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that encloses a queue and rebinds it, as loops do."""
    queue, calls = _queue(z), 0

    def contrast(z: Tensor, target: Tensor) -> Tensor:
        nonlocal queue, calls
        loss = losses.info_nce(z, target, queue)
        queue, calls = torch.cat([queue, target.detach()])[-Q:], calls + 1
        return loss

    return contrast


def _queue(like: Tensor) -> Tensor:
    return F.normalize(torch.linspace(-1, 1, Q * C, device=like.device).view(Q, C).sin(), dim=1)


# Each is built for embeddings, on their device.
CRITERIA: dict[str, Callable[[Tensor], Any]] = {
    "InfoNCE, queue": lambda z: losses.InfoNCE(_queue(z)),
    "InfoNCE, current queue": lambda z: losses.InfoNCE(lambda: _queue(z), reduction="none"),
    "InfoNCE, batch": lambda _: losses.InfoNCE(gather_distributed=True),
    "NTXent": lambda _: losses.NTXent(gather_distributed=True),
    # Whose powers do not fit float32 without a maximum to subtract.
    "NTXent, low temperature": lambda _: losses.NTXent(0.01),
    "NTXent, one way": lambda _: losses.NTXent(one_directional=True, gather_distributed=True),
    "NegativeCosine": lambda _: losses.NegativeCosine(reduction="none"),
    "BarlowTwins": lambda _: losses.BarlowTwins(gather_distributed=True),
    "BarlowTwins, synchronised": lambda _: losses.BarlowTwins(sync_statistics=True),
    "MatchedBarlowTwins": lambda _: losses.MatchedBarlowTwins(gather_distributed=True),
    "VICReg": lambda _: losses.VICReg(gather_distributed=True),
    "SwAV": lambda _: losses.SwAV(),
    "DINO": lambda z: losses.DINO(_queue(z)[0]),
    "DINO, current center": lambda z: losses.DINO(lambda: _queue(z)[0]),
    "mse_loss": lambda _: F.mse_loss,
    "CrossEntropyLoss": lambda _: nn.CrossEntropyLoss(reduction="none"),
    "KLDivLoss": lambda _: nn.KLDivLoss(reduction="batchmean"),
    "a bank": lambda z: Bank(z.device).to(z.device),
    "a closure": _closure,
}
# Those that take distributions as their targets.
_SOFT = ("SwAV", "CrossEntropyLoss", "KLDivLoss")
# A statistic of the batch has no value per sample.
_SCALAR = (
    "BarlowTwins",
    "BarlowTwins, synchronised",
    "mse_loss",
    "KLDivLoss",
    "a bank",
    "a closure",
)
every_criterion = pytest.mark.parametrize("name", CRITERIA)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with pretend() as accelerator:
        yield accelerator


def _batches(count: int = 1) -> list[Tensor]:
    return [torch.rand(N, 3, 8, 8).to(DEVICE) for _ in range(count)]


def _step(name: str, device: torch.device, *, per_sample: bool) -> Callable[..., Tensor]:
    """Return a step on one device: clean and mixed terms and their gradient."""
    torch.manual_seed(1)
    z, z_mixed, target = (F.normalize(torch.randn(N, C), dim=1) for _ in range(3))
    images, masks = torch.rand(N, 3, 8, 8).to(device), MASKS(N) if per_sample else MASKS()
    z, z_mixed, target = (rows.to(device) for rows in (z, z_mixed, target))
    if name in _SOFT:
        target = losses.sinkhorn(target, gather_distributed=True)
    if name == "KLDivLoss":
        z, z_mixed = z.log_softmax(dim=1), z_mixed.log_softmax(dim=1)
    kept = CRITERIA[name](z)
    kept_whole = LambdaWeightedLoss(kept)

    def step(*, anew: bool = False) -> Tensor:
        criterion = copy.deepcopy(kept) if anew else kept
        whole = LambdaWeightedLoss(criterion) if anew else kept_whole
        rows = [one.detach().requires_grad_() for one in (z, z_mixed)]
        mixed = mix_batch(images, masks)
        total = whole(rows[0], target, rows[1], mixed)
        if not hasattr(criterion, "matched"):
            total = total + weigh(criterion, rows[1], target, mixed)
            total = total + weigh(criterion, rows[1], target, mixed, switch=False)
        total.backward()
        assert rows[1].grad is not None
        return torch.cat([total.detach().view(1), rows[1].grad.flatten()])

    return step


def test_no_criterion_is_left_out() -> None:
    classes = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    helpers = {"Criterion", "SharingCriterion", "MatchingCriterion", "LambdaWeightedLoss"}
    assert {name.partition(",")[0] for name in CRITERIA} >= classes - helpers


@pytest.mark.parametrize("per_sample", [False, True])
@every_criterion
def test_a_loss_never_waits_and_is_what_the_cpu_finds(
    name: str, per_sample: bool, accelerator: Accelerator
) -> None:
    if per_sample and name in _SCALAR:
        per_sample = False
    expected = _step(name, torch.device("cpu"), per_sample=per_sample)
    step = _step(name, DEVICE, per_sample=per_sample)
    # What is checked once may wait.
    torch.testing.assert_close(step().cpu(), expected())
    with accelerator.watched():
        found = step()
    torch.testing.assert_close(found.cpu(), expected())


@every_criterion
def test_a_criterion_that_is_built_in_each_step(name: str, accelerator: Accelerator) -> None:
    step = _step(name, DEVICE, per_sample=False)
    step(anew=True)
    with accelerator.watched(*NEW_CRITERIA.get(name, ())):
        step(anew=True)


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_two_processes(monkeypatch)


@pytest.mark.usefixtures("two_processes")
@every_criterion
def test_a_loss_over_two_ranks(name: str, accelerator: Accelerator) -> None:
    step = _step(name, DEVICE, per_sample=False)
    step()
    with accelerator.watched():
        step()


@pytest.mark.usefixtures("two_processes")
def test_codes_over_two_ranks(accelerator: Accelerator) -> None:
    scores = torch.randn(N, C).to(DEVICE)
    losses.sinkhorn(scores, gather_distributed=True)
    with accelerator.watched():
        losses.sinkhorn(scores, gather_distributed=True)


def test_terms_one_by_one_and_in_both_directions(accelerator: Accelerator) -> None:
    encode = nn.Sequential(nn.Flatten(), nn.Linear(192, C)).to(DEVICE)
    (x1, x2), criterion = _batches(2), LambdaWeightedLoss(losses.NegativeCosine())
    with torch.no_grad():
        t1, t2 = encode(x1), encode(x2)
    for watched in (False, True):
        mixed = [mix_batch(x, MASKS) for x in (x1, x2)]
        with accelerator.watched() if watched else torch.enable_grad():
            for term in criterion.terms(encode, (x1, x2), (t2, t1), mixed):
                term.backward()
            z_mixed = [encode(record.images) for record in mixed]
            criterion((encode(x1), encode(x2)), (t2, t1), z_mixed, mixed).backward()


class Builder(nn.Module):
    """MoCo as its family writes it, but for a pointer that is read on the host."""

    queue: Tensor
    T = 0.2

    def __init__(self, *, symmetric: bool) -> None:
        super().__init__()
        self.encoder_q = nn.Sequential(nn.Flatten(), nn.Linear(192, C))
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.symmetric = symmetric
        self.register_buffer("queue", F.normalize(torch.randn(C, Q), dim=0))

    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        self.queue = torch.cat([keys.T, self.queue], dim=1)[:, :Q]

    def contrast(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        k = F.normalize(self.encoder_k(im_k), dim=1).detach()
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue], dim=1)
        labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return F.cross_entropy(logits / self.T, labels), k

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        loss, keys = self.contrast(im_q, im_k)
        if self.symmetric:
            other, more = self.contrast(im_k, im_q)
            loss, keys = loss + other, torch.cat([more, keys])
        self._dequeue_and_enqueue(keys)
        return loss


@pytest.mark.parametrize(
    "options",
    [{}, {"per_sample": True, "partner": "random"}, {"symmetric": True}, {"switch": False}],
    ids=str,
)
def test_a_wrapped_builder(options: dict[str, Any], accelerator: Accelerator) -> None:
    generator = torch.Generator().manual_seed(1)
    builder = Builder(symmetric=options.get("symmetric", False)).to(DEVICE)
    model = wrap(builder, MASKS, generator=generator, **options)

    batches = _batches(2)
    for watched in (False, True):  # Its first step is compared with ours.
        with accelerator.watched() if watched else torch.enable_grad():
            loss = model(*batches)
            (loss + mixed_loss(model)).backward()


class SimSiam(nn.Module):
    """A model that makes its views and computes its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, C))
        self.augment: Any = RecordingView(nn.Identity(), calls=2)
        self.criterion: Any = RecordingCriterion(Bank(DEVICE), calls=2)

    def forward(self, images: Tensor) -> Tensor:
        z1, z2 = self.encoder(self.augment(images)), self.encoder(self.augment(images.flip(0)))
        loss: Tensor = self.criterion(z1, z2.detach()) + self.criterion(z2, z1.detach())
        return loss


def test_a_recorded_criterion_and_view(accelerator: Accelerator) -> None:
    model, (images,) = SimSiam().to(DEVICE), _batches()
    for watched in (False, True):
        with accelerator.watched() if watched else torch.enable_grad():
            loss = model(images)
            mixed = mix_batch(model.augment.take(0), MASKS)
            (loss + model.criterion.mixed_loss(model.encoder, mixed)).backward()


def test_recorded_embeddings(accelerator: Accelerator) -> None:
    projector = nn.Sequential(nn.Flatten(), nn.Linear(192, C)).to(DEVICE)
    criterion, (x1, x2) = record_embeddings(projector, losses.BarlowTwins()), _batches(2)
    for watched in (False, True):
        with accelerator.watched() if watched else torch.enable_grad():
            loss = losses.barlow_twins(projector(x1), projector(x2))
            (loss + criterion.mixed_loss(projector, mix_batch(x1, MASKS))).backward()


KORNIA: dict[str, dict[str, Any]] = {
    "shared": {},
    "per sample": {"per_sample": True, "partner": "random"},
    "half": {"p": 0.5},
}


@pytest.mark.parametrize("name", KORNIA)
def test_an_augmentation_of_kornia(name: str, accelerator: Accelerator) -> None:
    mix = RandomMixMask(4, data_keys=["input", "class"], **KORNIA[name])
    (images,), labels = _batches(), torch.arange(N).to(DEVICE)
    with accelerator.watched():
        mix.mixed_batch(mix(images, labels)[0])


def test_a_container_of_kornia(accelerator: Accelerator) -> None:
    mix = RandomMixMask(4, data_keys=["input", "class"])
    container: Any = K.AugmentationSequential
    views = take_labels(container(mix, data_keys=["input", "class"]))
    (images,), labels = _batches(), torch.arange(N).to(DEVICE)
    with accelerator.watched():
        views(images, labels)
