from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from mixmask import LambdaWeightedLoss, MixedBatch

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install 'mixmask[lightly]' for these tests"
)

import lightly
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.loss.swav_loss import sinkhorn

from mixmask.integrations.lightly import (
    WrappedDINO,
    WrappedNTXent,
    WrappedPair,
    WrappedSwaV,
    wrap,
)

VERSION = tuple(int(part) for part in lightly.__version__.split(".")[:2])
# A bank of 17 wraps around at every third batch of 7, and loses four keys by it.
N, C, K, BANK = 7, 5, 6, 17
TAU = 0.2


class Margin(NTXentLoss):  # type: ignore[misc]
    """One of lightly's, with a `forward` of its own."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        loss: Tensor = super().forward(out0, out1)
        return F.softplus(loss - 1)


class Renamed(NTXentLoss):  # type: ignore[misc]
    """One of lightly's under another name."""


CRITERIA: dict[str, Callable[[], Any]] = {
    "ntxent": lambda: NTXentLoss(TAU),
    "bank": lambda: NTXentLoss(TAU, memory_bank_size=(BANK, C)),
    "renamed": lambda: Renamed(TAU, memory_bank_size=(BANK, C)),
    "own forward": lambda: Margin(TAU, memory_bank_size=(BANK, C)),
    "cosine": NegativeCosineSimilarity,
    "barlow": lambda: BarlowTwinsLoss(0.02),
    "vicreg": lambda: VICRegLoss(10.0, 5.0, 2.0, eps=1e-3),
    "dcl": lambda: DCLLoss(TAU),
    "dclw": lambda: DCLWLoss(TAU, sigma=0.7),
}
BY_SAMPLE = ("ntxent", "bank", "renamed", "cosine", "vicreg")
WITH_BANK = ("bank", "renamed", "own forward")

every = pytest.mark.parametrize("name", CRITERIA)
# lightly's DCLWLoss copies a tensor with torch.tensor.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


def _mixed(
    n: int = N, *, per_sample: bool = False, halves: int = 1, seed: int | None = None
) -> MixedBatch:
    """Any permutation within each of the parts of a batch, any shares."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    part = n // halves
    partner = torch.cat(
        [torch.randperm(part, generator=generator) + part * half for half in range(halves)]
    )
    lam = torch.rand((n,) if per_sample else (), generator=generator)
    return MixedBatch(torch.empty(n, 1, 1, 1), lam, partner)


def _embeddings(count: int, n: int = N, c: int = C, dtype: torch.dtype = torch.float64) -> Any:
    return [torch.randn(n, c, dtype=dtype, requires_grad=True) for _ in range(count)]


def _buffers(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    assert len(ours) == len(theirs)
    return all(map(torch.equal, ours, theirs))


def _called(criterion: Any, *arguments: Any, **more: Any) -> Tensor:
    """What lightly's criterion says as it is now; it stays so."""
    loss: Tensor = copy.deepcopy(criterion)(*arguments, **more)
    return loss


def _rows(criterion: Any, z: Tensor, target: Tensor) -> Tensor:
    """lightly's loss of each image, (N,)."""
    if isinstance(criterion, NTXentLoss):
        criterion = copy.deepcopy(criterion)
        criterion.cross_entropy = nn.CrossEntropyLoss(reduction="none")
        # Without a bank there is a row for either direction.
        rows: Tensor = criterion(z, target).view(-1, len(z)).mean(dim=0)
        return rows
    pairs = zip(z.split(1), target.split(1), strict=True)
    return torch.stack([_called(criterion, row, other) for row, other in pairs])


def _spread(criterion: Any, z: Tensor) -> Tensor:
    """VICReg's variance and covariance of one view: half of those of it and itself."""
    criterion = copy.deepcopy(criterion)
    criterion.lambda_param = 0.0
    loss: Tensor = criterion(z, z) / 2
    return loss


def _term(
    criterion: Any, z: Tensor, target: Tensor, mixed: MixedBatch, *, switch: bool = True
) -> Tensor:
    """The mixed term by eq. 4, on a snapshot of the criterion."""
    other = target[mixed.partner]
    lam = mixed.lam.to(z.dtype)
    if isinstance(criterion, VICRegLoss):
        total = torch.zeros((), dtype=z.dtype)
        for i in range(len(z)):
            share = lam[i] if lam.ndim else lam
            total = total + share * ((z[i] - target[i]) ** 2).mean()
            if switch:
                total = total + (1 - share) * ((z[i] - other[i]) ** 2).mean()
        return float(criterion.lambda_param) * total / len(z) + _spread(criterion, z)
    if lam.ndim:
        own, rest = _rows(criterion, z, target), _rows(criterion, z, other)
    else:
        own, rest = _called(criterion, z, target), _called(criterion, z, other)
    return (lam * own + (1 - lam) * rest if switch else lam * own).mean()


def _agree(ours: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    """The same loss and the same gradients."""
    torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), inputs),
        torch.autograd.grad(slow.sum(), inputs),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ntxent", WrappedNTXent),
        ("bank", WrappedNTXent),
        ("renamed", WrappedNTXent),
        ("own forward", LambdaWeightedLoss),
        ("cosine", WrappedPair),
        ("barlow", WrappedPair),
        ("vicreg", WrappedPair),
        ("dcl", WrappedPair),
        ("dclw", WrappedPair),
    ],
)
def test_each_criterion_finds_its_wrapper(name: str, expected: type) -> None:
    assert type(wrap(CRITERIA[name]())) is expected
    assert type(wrap(SwaVLoss())) is WrappedSwaV
    assert type(wrap(DINOLoss(K))) is WrappedDINO


@pytest.mark.parametrize(
    "name, per_sample", [(name, each) for name in CRITERIA for each in (False, name in BY_SAMPLE)]
)
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("views", [1, 3])
def test_the_loss_is_that_of_equation_4(
    name: str, per_sample: bool, switch: bool, views: int
) -> None:
    criterion = CRITERIA[name]().double()
    z, target, *z_mixed = _embeddings(2 + views)
    mixed = [_mixed(per_sample=per_sample) for _ in range(views)]
    slow = _called(criterion, z, target)
    for one, record in zip(z_mixed, mixed, strict=True):
        slow = slow + _term(criterion, one, target, record, switch=switch)
    wrapped = wrap(criterion, switch=switch)
    if views == 1:
        ours = wrapped(z, target, z_mixed[0], mixed[0])
    else:
        ours = wrapped(z, target, z_mixed, mixed)
    _agree(ours, slow, [z, target, *z_mixed])


@every
@pytest.mark.parametrize("switch", [True, False])
def test_mixed_terms_alone_leave_the_state_alone(name: str, switch: bool) -> None:
    criterion = CRITERIA[name]().double()
    before = _buffers(criterion)
    target, *z_mixed = _embeddings(3)
    mixed = [_mixed(), _mixed()]
    wrapped: Any = wrap(criterion, switch=switch)
    ours = wrapped.mixed_loss(z_mixed, target, mixed)
    slow = sum(
        _term(criterion, one, target, record, switch=switch)
        for one, record in zip(z_mixed, mixed, strict=True)
    )
    assert isinstance(slow, Tensor)
    assert _same(_buffers(criterion), before)
    _agree(ours, slow, [target, *z_mixed])


@every
def test_without_a_mixed_view_it_is_the_criterion(name: str) -> None:
    criterion = CRITERIA[name]().double()
    untouched = copy.deepcopy(criterion)
    z, target = _embeddings(2)
    _agree(wrap(criterion)(z, target), untouched(z, target), [z, target])
    assert _same(_buffers(criterion), _buffers(untouched))


@pytest.mark.parametrize("name", WITH_BANK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [N, BANK, BANK + 3])
def test_the_bank_moves_once_a_step(name: str, dtype: torch.dtype, n: int) -> None:
    criterion = CRITERIA[name]().to(dtype)
    untouched = copy.deepcopy(criterion)
    wrapped = wrap(criterion)
    pointers = []
    for _ in range(7):
        z, target, *z_mixed = _embeddings(4, n, dtype=dtype)
        mixed = [_mixed(n), _mixed(n)]
        torch.autograd.backward(wrapped(z, target, z_mixed, mixed))
        untouched(z, target)
        assert _same(_buffers(criterion), _buffers(untouched))
        pointers.append(int(criterion.memory_bank.bank_ptr))
    assert pointers == ([7, 14, 0, 7, 14, 0, 7] if n == N else [0] * 7)


@pytest.mark.parametrize("name", WITH_BANK)
@pytest.mark.parametrize("how", ["no_grad", "detached", "frozen query", "frozen key", "eval"])
def test_the_bank_moves_where_lightlys_would(name: str, how: str) -> None:
    criterion = CRITERIA[name]()
    before = _buffers(criterion)
    untouched = copy.deepcopy(criterion)
    wrapped = wrap(criterion).train(how != "eval")
    untouched.train(how != "eval")
    z, target, z_mixed = _embeddings(3, dtype=torch.float32)
    if how in ("detached", "frozen query"):
        z = z.detach()
    if how in ("detached", "frozen key"):
        target = target.detach()
    if how == "detached":
        z_mixed = z_mixed.detach()
    with torch.set_grad_enabled(how != "no_grad"):
        wrapped(z, target, z_mixed, _mixed())
        untouched(z, target)
    assert _same(_buffers(criterion), _buffers(untouched))
    moves = how in ("frozen key", "eval")
    assert _same(_buffers(criterion), before) == (not moves)


@pytest.mark.parametrize("name", WITH_BANK)
def test_three_calls_are_a_trap(name: str) -> None:
    """What eq. 4 looks like in code, around a criterion that enqueues: why there is `wrap`."""
    criterion = CRITERIA[name]().double()
    clean, naive = copy.deepcopy(criterion), copy.deepcopy(criterion)
    (target,) = _embeddings(1)
    # Of an encoder that knows its images.
    z, z_mixed = target * 2, target + 0.1
    mixed = _mixed()
    lam, other = mixed.lam.double(), target[mixed.partner]
    wrong = naive(z, target) + lam * naive(z_mixed, target) + (1 - lam) * naive(z_mixed, other)
    ours = wrap(criterion)(z, target, z_mixed, mixed)
    clean(z, target)
    assert _same(_buffers(criterion), _buffers(clean))
    assert not _same(_buffers(naive), _buffers(clean))
    assert int(clean.memory_bank.bank_ptr) == N
    assert int(naive.memory_bank.bank_ptr) == 0
    # The second and third calls meet the keys that the first has enqueued as negatives.
    assert wrong.item() > ours.item() + 1e-3


@pytest.mark.parametrize("name", ["ntxent", "bank", "cosine", "barlow", "dcl"])
@pytest.mark.parametrize("switch", [True, False])
def test_the_generic_wrapper_does_the_same(name: str, switch: bool) -> None:
    criterion = CRITERIA[name]().double()
    generic = LambdaWeightedLoss(copy.deepcopy(criterion), switch=switch)
    wrapped = wrap(criterion, switch=switch)
    for _ in range(4):
        z, target, *z_mixed = _embeddings(4)
        mixed = [_mixed(), _mixed()]
        ours, theirs = (loss(z, target, z_mixed, mixed) for loss in (wrapped, generic))
        _agree(ours, theirs, [z, target, *z_mixed])
        assert _same(_buffers(wrapped), _buffers(generic))


def test_a_cosine_along_another_axis_is_of_every_row() -> None:
    criterion = NegativeCosineSimilarity(dim=-1, eps=1e-3)
    z, target, z_mixed = (torch.randn(N, 3, C, dtype=torch.float64) for _ in range(3))
    z_mixed.requires_grad_()
    mixed = _mixed(per_sample=True)
    slow = criterion(z, target) + _term(criterion, z_mixed, target, mixed)
    _agree(wrap(criterion)(z, target, z_mixed, mixed), slow, [z_mixed])


def _largest_saved(forward: Callable[[], Tensor]) -> int:
    """Elements of the largest tensor that is saved for the backward pass."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.autograd.backward(forward())
    return max(sizes)


class _Outputs(TorchDispatchMode):
    """Notes the elements of every tensor that is made, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        taken = {tensor.data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        if isinstance(out, Tensor) and out.data_ptr() not in taken:
            self.sizes.append(out.numel())
        return out


def test_neither_the_bank_nor_its_logits_are_copied() -> None:
    n, size, c = 64, 65_536, 16
    z, target, z_mixed = _embeddings(3, n, c, torch.float32)
    mixed = _mixed(n)

    def build() -> Any:
        return NTXentLoss(TAU, memory_bank_size=(size, c))

    assert _largest_saved(lambda: _called(build(), z, target)) >= n * size
    wrapped = wrap(build())
    assert _largest_saved(lambda: wrapped(z, target, z_mixed, mixed)) <= n * c

    with _Outputs() as theirs:
        build()(z, target)
    assert max(theirs.sizes) >= size * c
    with _Outputs() as ours:
        torch.autograd.backward(wrapped(z, target, z_mixed, mixed))
    assert max(ours.sizes) < size * c


def test_the_bank_may_move_before_backward_is_called() -> None:
    criterion = NTXentLoss(TAU, memory_bank_size=(BANK, C))
    z, target, z_mixed = _embeddings(3, dtype=torch.float32)
    mixed = _mixed()
    slow = _called(criterion, z, target) + _term(criterion, z_mixed, target, mixed)
    wrapped = wrap(criterion)
    loss = wrapped(z, target, z_mixed, mixed)
    wrapped(*_embeddings(3, dtype=torch.float32), _mixed())
    _agree(loss, slow, [z, target, z_mixed])


@pytest.mark.parametrize("save_bank", [True, False])
def test_the_bank_is_saved_where_it_is_asked_for(save_bank: bool) -> None:
    wrapped: Any = wrap(NTXentLoss(memory_bank_size=(BANK, C)), save_bank=save_bank)
    wrapped(*_embeddings(3, dtype=torch.float32), _mixed())
    state = wrapped.state_dict()
    names = ["criterion.memory_bank.bank", "criterion.memory_bank.bank_ptr"]
    assert list(state) == (names if save_bank else [])

    fresh: Any = wrap(NTXentLoss(memory_bank_size=(BANK, C)), save_bank=save_bank)
    assert not _same(_buffers(fresh), _buffers(wrapped))
    fresh.load_state_dict(state)
    assert _same(_buffers(fresh), _buffers(wrapped)) == save_bank
    assert isinstance(fresh.criterion.memory_bank.bank, Tensor)
    assert len(list(fresh.buffers())) == 2


@every
def test_copies_go_on_alike(name: str) -> None:
    wrapped: Any = wrap(CRITERIA[name](), switch=False)
    step = (*_embeddings(3, dtype=torch.float32), _mixed())
    wrapped(*step)
    twins = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
    expected = wrapped(*step)
    for twin in twins:
        assert torch.equal(twin(*step), expected)
        assert _same(_buffers(twin), _buffers(wrapped))
        assert twin.state_dict().keys() == wrapped.state_dict().keys()


def test_criteria_without_a_bank_save_nothing() -> None:
    assert not wrap(NTXentLoss()).state_dict()
    assert not wrap(NegativeCosineSimilarity()).state_dict()
    assert list(wrap(DINOLoss(K)).state_dict()) == ["criterion.center"]


def test_checkpoints_from_before_are_read_without_the_bank() -> None:
    # lightly leaves the bank out, so a module that was saved before holds none.
    before = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": NTXentLoss(memory_bank_size=(4, 2))})
    state = before.state_dict()
    for save_bank in (True, False):
        loss = wrap(NTXentLoss(memory_bank_size=(4, 2)), save_bank=save_bank)
        after = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": loss})
        if save_bank:
            with pytest.raises(RuntimeError, match=r"Missing key.*memory_bank\.bank"):
                after.load_state_dict(state)
        else:
            after.load_state_dict(state)


class _Run:
    """A tiny loop of MoCo, each of whose steps follows from its number."""

    def __init__(self, size: Any, *, seed: int, save_bank: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(8, C)
        self.criterion = wrap(NTXentLoss(TAU, memory_bank_size=size), save_bank=save_bank)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(3, N, 8, generator=generator)
            q, q_mixed = self.model(x[0]), self.model(x[1])
            with torch.no_grad():
                k = self.model(x[2])
            loss = self.criterion(q, k, q_mixed, _mixed(seed=step))
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def save(self) -> bytes:
        parts = (self.model, self.criterion, self.optimizer)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        parts = (self.model, self.criterion, self.optimizer)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("save_bank", [True, False])
def test_a_resumed_run_ends_in_the_same_loss(save_bank: bool) -> None:
    run = _Run((BANK, C), seed=1, save_bank=save_bank)
    run.steps(0, 4)
    saved = run.save()
    expected = run.steps(4, 9)
    resumed = _Run((BANK, C), seed=2, save_bank=save_bank)
    resumed.load(saved)
    assert (resumed.steps(4, 9) == expected) == save_bank


@pytest.mark.skipif(VERSION >= (1, 6), reason="lightly refuses a bank without a width from 1.6 on")
@pytest.mark.filterwarnings("ignore:Memory bank size 'size=17' does not specify:UserWarning")
def test_a_bank_may_learn_its_width() -> None:
    criterion = NTXentLoss(TAU, memory_bank_size=BANK)
    untouched = copy.deepcopy(criterion)
    wrapped = wrap(criterion)
    for seed in range(5):
        z, target, z_mixed = _embeddings(3, dtype=torch.float32)
        mixed = _mixed()
        torch.manual_seed(seed)
        snapshot = copy.deepcopy(untouched)
        expected = untouched(z, target)
        if seed > 0:
            expected = expected + _term(snapshot, z_mixed, target, mixed)
        torch.manual_seed(seed)
        loss = wrapped(z, target, z_mixed, mixed)
        if seed > 0:
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        assert _same(_buffers(criterion), _buffers(untouched))
    assert criterion.memory_bank.bank.shape == (BANK, C)


@pytest.mark.skipif(VERSION >= (1, 6), reason="lightly refuses a bank without a width from 1.6 on")
@pytest.mark.filterwarnings("ignore:Memory bank size 'size=17' does not specify:UserWarning")
@pytest.mark.parametrize("stop", [0, 4])
def test_a_bank_that_learnt_its_width_is_resumed(stop: int) -> None:
    run = _Run(BANK, seed=1)
    run.steps(0, stop)
    saved = run.save()
    torch.manual_seed(3)
    expected = run.steps(stop, 9)
    resumed = _Run(BANK, seed=2)
    resumed.load(saved)
    torch.manual_seed(3)
    assert resumed.steps(stop, 9) == expected


@pytest.mark.skipif(VERSION < (1, 6), reason="lightly 1.5 guesses the width of a bank")
def test_a_bank_without_a_width_is_lightlys_to_refuse() -> None:
    with pytest.raises(ValueError, match="does not specify the feature dimension"):
        wrap(NTXentLoss(memory_bank_size=BANK))


# SwAV and DINO take lists of crops.

VIEWS: list[tuple[int | list[int], int]] = [(0, 1), (1, 1), (3, 1), ([0], 1), ([1, 0, 4], 3)]


def _crops(large: int, small: int, *, needs_grad: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    crops = [
        torch.randn(N, K, dtype=torch.float64, requires_grad=needs_grad)
        for _ in range(large + small)
    ]
    return crops[:large], crops[large:]


def _as_list(view: int | list[int]) -> list[int]:
    return [view] if isinstance(view, int) else view


def _mixed_views(count: int, *, per_sample: bool) -> tuple[list[Tensor], list[MixedBatch]]:
    scores = [torch.randn(N, K, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    return scores, [_mixed(per_sample=per_sample) for _ in range(count)]


def _eq_4(
    loss: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    targets: list[Tensor],
    mixed: MixedBatch,
    *,
    switch: bool,
) -> Tensor:
    """Eq. 4 image by image, then its mean over the targets of several crops."""
    total = torch.zeros((), dtype=z.dtype)
    for target in targets:
        for i in range(len(z)):
            share = (mixed.lam[i] if mixed.lam.ndim else mixed.lam).to(z.dtype)
            total = total + share * loss(z[i : i + 1], target[i : i + 1])
            if switch:
                j = int(mixed.partner[i])
                total = total + (1 - share) * loss(z[i : i + 1], target[j : j + 1])
    return total / len(z) / len(targets)


@pytest.mark.parametrize("queue", [0, 9])
@pytest.mark.parametrize("view, count", VIEWS)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("switch", [True, False])
def test_swav_is_that_of_equation_4(
    queue: int, view: int | list[int], count: int, per_sample: bool, switch: bool
) -> None:
    criterion = SwaVLoss(temperature=0.3, sinkhorn_iterations=4, sinkhorn_epsilon=0.2)
    large, small = _crops(2, 3)
    queued = [torch.randn(queue, K, dtype=torch.float64) for _ in large] if queue else None
    scores, mixed = _mixed_views(count, per_sample=per_sample)
    slow = criterion(large, small, queued)
    codes = [
        sinkhorn(
            torch.cat([crop.detach(), queued[index]]) if queued else crop.detach(),
            iterations=4,
            epsilon=0.2,
        )[:N]
        for index, crop in enumerate(large)
    ]
    for z, record, crop in zip(scores, mixed, _as_list(view), strict=True):
        targets = [code for index, code in enumerate(codes) if index != crop]
        slow = slow + _eq_4(criterion.subloss, z, targets, record, switch=switch)
    wrapped = wrap(criterion, switch=switch)
    given: dict[str, Any] = {"z_mixed": scores, "mixed": mixed}
    if isinstance(view, int):
        given = {"z_mixed": scores[0], "mixed": mixed[0]}
    ours = wrapped(large, small, queued, view=view, **given)
    assert ours.shape == slow.shape == (1,)
    _agree(ours, slow, [*large, *small, *scores])


def test_swav_without_a_mixed_view_is_lightlys() -> None:
    large, small = _crops(2, 2)
    wrapped = wrap(SwaVLoss())
    assert torch.equal(wrapped(large, small), SwaVLoss()(large, small))
    assert torch.equal(wrapped(large, []), SwaVLoss()(large, []))
    assert not wrapped.state_dict()


TEMPERATURES: dict[str, dict[str, Any]] = {
    "own": {},
    "given": {"teacher_temp": 0.11},
    "warming up": {"epoch": 2},
    "warm": {"epoch": 5},
    "long warm": {"epoch": 9},
    "given in an epoch": {"teacher_temp": 0.11, "epoch": 2},
}


def _dino() -> Any:
    criterion = DINOLoss(
        K,
        warmup_teacher_temp=0.2,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=5,
        student_temp=0.3,
        center_momentum=0.6,
    ).double()
    # Some steps in, so that the center is not zero.
    criterion([_crops(1, 0)[0][0].detach() + 1] * 2, _crops(2, 0)[0])
    assert float(criterion.center.abs().max()) > 0.1
    return criterion


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("view, count", VIEWS)
@pytest.mark.parametrize("per_sample, switch", [(True, True), (False, True), (True, False)])
def test_dino_is_that_of_equation_4(
    temperature: str, view: int | list[int], count: int, per_sample: bool, switch: bool
) -> None:
    criterion = _dino()
    untouched = copy.deepcopy(criterion)
    options = TEMPERATURES[temperature]
    teacher, _ = _crops(2, 0, needs_grad=False)
    student = list(itertools.chain(*_crops(2, 3)))
    scores, mixed = _mixed_views(count, per_sample=per_sample)

    def loss(z: Tensor, target: Tensor) -> Tensor:
        # lightly leaves out pairs of one index, so the mixed crop comes second.
        return _called(untouched, [target], [torch.zeros_like(z), z], **options)

    slow = _called(untouched, teacher, student, **options)
    for z, record, crop in zip(scores, mixed, _as_list(view), strict=True):
        targets = [logits for index, logits in enumerate(teacher) if index != crop]
        slow = slow + _eq_4(loss, z, targets, record, switch=switch)
    wrapped = wrap(criterion, switch=switch)
    given: dict[str, Any] = {"z_mixed": scores, "mixed": mixed}
    if isinstance(view, int):
        given = {"z_mixed": scores[0], "mixed": mixed[0]}
    ours = wrapped(teacher, student, view=view, **options, **given)
    _agree(ours, slow, [*student, *scores])
    untouched(teacher, student, **options)
    assert _same(_buffers(criterion), _buffers(untouched))


def test_dinos_center_moves_once_a_step() -> None:
    criterion = DINOLoss(K)
    untouched = copy.deepcopy(criterion)
    naive = copy.deepcopy(criterion)
    wrapped = wrap(criterion)
    for step in range(4):
        teacher = [torch.randn(N, K) for _ in range(2)]
        student = [torch.randn(N, K, requires_grad=True) for _ in range(4)]
        z_mixed, mixed = torch.randn(N, K, requires_grad=True), _mixed()
        with torch.set_grad_enabled(step != 3):
            ours = wrapped(teacher, student, z_mixed=z_mixed, mixed=mixed)
            untouched(teacher, student)
        assert _same(_buffers(criterion), _buffers(untouched))
        if step == 0:
            continue
        # As eq. 4 looks in code: by the second and third calls the center has moved.
        partners = [logits[mixed.partner] for logits in teacher]
        crops = [z_mixed, *student[1:]]
        wrong = naive(teacher, student)
        wrong = wrong + mixed.lam * naive(teacher, crops)
        wrong = wrong + (1 - mixed.lam) * naive(partners, crops)
        assert not _same(_buffers(naive), _buffers(untouched))
        assert wrong.item() != pytest.approx(ours.item(), abs=1e-3)


def test_dino_without_a_mixed_view_is_lightlys() -> None:
    criterion = _dino()
    untouched = copy.deepcopy(criterion)
    teacher, student = _crops(2, 0, needs_grad=False)[0], _crops(4, 0)[0]
    ours, theirs = wrap(criterion)(teacher, student, 0.1), untouched(teacher, student, 0.1)
    assert torch.equal(ours, theirs)
    assert _same(_buffers(criterion), _buffers(untouched))


# What is refused.

ROWS = torch.randn(4, C)
SHARED = MixedBatch(torch.empty(4, 1, 1, 1), torch.tensor(0.5), torch.arange(3, -1, -1))
EACH = MixedBatch(torch.empty(4, 1, 1, 1), torch.full((4,), 0.5), torch.arange(3, -1, -1))
FEW = MixedBatch(torch.empty(3, 1, 1, 1), torch.tensor(0.5), torch.arange(2, -1, -1))


@pytest.mark.parametrize("name", ["bank", "ntxent", "own forward", "cosine", "vicreg"])
@pytest.mark.parametrize(
    "arguments, text",
    [
        ((ROWS, ROWS[:3], ROWS, SHARED), r"target must hold one row .* 4 .* got \(3, 5\); pass"),
        ((ROWS, ROWS, ROWS[:3], SHARED), r"z_mixed must hold one row .* 4 .* got \(3, 5\); pass"),
        ((ROWS, ROWS, ROWS, FEW), r"must hold one row for each of the 3 mixed .* got \(4, 5\)"),
        ((ROWS, ROWS, ROWS[:3], FEW), r"must hold one row for each of the 3 .* got \(4, 5\)"),
        ((ROWS, ROWS, ROWS), r"z_mixed and mixed belong together, got only one"),
        ((ROWS, ROWS, None, SHARED), r"z_mixed and mixed belong together, got only one"),
        ((ROWS, ROWS, [ROWS], [SHARED, SHARED]), r"must be as many, .* got 1 and 2; pass one"),
        ((ROWS, ROWS, [ROWS, ROWS[:2]], [SHARED] * 2), r"z_mixed must hold .* got \(2, 5\)"),
        ((ROWS, ROWS, [], []), r"must be as many, at least one, got 0 and 0"),
    ],
)
def test_nothing_is_enqueued_when_an_argument_is_refused(
    name: str, arguments: tuple[Any, ...], text: str
) -> None:
    criterion = CRITERIA[name]()
    before = _buffers(criterion)
    z, *rest = arguments
    with pytest.raises(ValueError, match=text):
        wrap(criterion)(z.clone().requires_grad_(), *rest)
    assert _same(_buffers(criterion), before)


@pytest.mark.parametrize("name", ["barlow", "dcl", "dclw", "own forward"])
def test_one_share_a_sample_needs_a_loss_of_a_sample(name: str) -> None:
    criterion = CRITERIA[name]()
    before = _buffers(criterion)
    with pytest.raises(ValueError, match=r"one λ per sample needs .* \(N,\), got a scalar; .*mask"):
        wrap(criterion)(ROWS.clone().requires_grad_(), ROWS, ROWS, EACH)
    assert _same(_buffers(criterion), before)


@pytest.mark.parametrize("name", ["swav", "dino"])
@pytest.mark.parametrize(
    "large, given, text",
    [
        (2, {"view": 3}, r"view must name a crop from 0 to 2 for each of the 1 .* got 3; pass"),
        (2, {"view": -1}, r"view must name a crop from 0 to 2 .* got -1; pass for instance view=0"),
        (2, {"view": [0, 1]}, r"for each of the 1 mixed views, got \[0, 1\]; pass"),
        (1, {}, r"compared with the other large crops, got none; pass at least two"),
        (2, {"mixed": None}, r"z_mixed and mixed belong together, got only one"),
        (2, {"mixed": FEW}, r"must hold one row for each of the 3 mixed images, got \(4, 5\)"),
        (2, {"z_mixed": ROWS[:2]}, r"z_mixed must hold .* 4 mixed images, got \(2, 5\)"),
        (
            2,
            {"z_mixed": [ROWS] * 2, "mixed": [SHARED] * 2},
            r"for each of the 2 mixed views, got 0; pass .* view=\[0, 1\] for two",
        ),
        (
            2,
            {"z_mixed": [ROWS] * 2, "mixed": [SHARED] * 2, "view": [0, 7]},
            r"from 0 to 2 for each of the 2 mixed views, got \[0, 7\]",
        ),
    ],
)
def test_crops_that_do_not_fit_are_refused(
    name: str, large: int, given: dict[str, Any], text: str
) -> None:
    criterion = SwaVLoss() if name == "swav" else DINOLoss(C)
    before = _buffers(criterion)
    crops, small = [ROWS] * large, [ROWS] * (3 - large)
    lists = (crops, small) if name == "swav" else (crops, crops + small)
    with pytest.raises(ValueError, match=text):
        wrap(criterion)(*lists, **{"z_mixed": ROWS, "mixed": SHARED, **given})
    assert _same(_buffers(criterion), before)


def test_a_small_crop_meets_a_single_large_one() -> None:
    assert wrap(SwaVLoss())([ROWS], [ROWS], z_mixed=ROWS, mixed=SHARED, view=1).shape == (1,)
    assert wrap(DINOLoss(C))([ROWS], [ROWS] * 2, z_mixed=ROWS, mixed=SHARED, view=1).shape == ()


@pytest.mark.parametrize("bad", [F.mse_loss, None, NTXentLoss])
def test_only_modules_are_wrapped(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"criterion must be one of lightly's modules, got \w+; pa"):
        wrap(bad)


# Importing.


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_lightly_the_extra_is_named() -> None:
    _python(
        "import sys\n"
        "sys.modules['lightly'] = None\n"
        "import mixmask.integrations\n"
        "try:\n"
        "    import mixmask.integrations.lightly\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'mixmask[lightly]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )


def test_importing_mixmask_leaves_lightly_alone() -> None:
    _python(
        "import sys, mixmask, mixmask.losses, mixmask.integrations\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'lightly', 'pytorch_lightning', 'torchvision'}, loaded\n"
    )


# Two processes. The reference in each is lightly's criterion for one process, on both batches.

HALF = 4
GATHERED: dict[str, Callable[[bool], Any]] = {
    "ntxent": lambda gather: NTXentLoss(TAU, gather_distributed=gather),
    "bank": lambda gather: NTXentLoss(TAU, (BANK, C), gather_distributed=gather),
    "vicreg": lambda gather: VICRegLoss(10.0, 5.0, 2.0, gather_distributed=gather),
    "dcl": lambda gather: DCLLoss(TAU, gather_distributed=gather),
}


def _halves(whole: list[Tensor], rank: int) -> list[Tensor]:
    rows = slice(rank * HALF, (rank + 1) * HALF)
    return [tensor.detach()[rows].clone().requires_grad_() for tensor in whole]


def _own(mixed: MixedBatch, rank: int) -> MixedBatch:
    rows = slice(rank * HALF, (rank + 1) * HALF)
    lam = mixed.lam[rows] if mixed.lam.ndim else mixed.lam
    return MixedBatch(mixed.images[rows], lam, mixed.partner[rows] - rank * HALF)


def _meet(ours: Tensor, own: list[Tensor], slow: Tensor, whole: list[Tensor]) -> None:
    """Averaged over the processes, as DDP does, loss and gradients are those of one process."""
    total = ours.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, slow.detach(), rtol=1e-6, atol=1e-6)
    rows = slice(dist.get_rank() * HALF, (dist.get_rank() + 1) * HALF)
    mine = torch.autograd.grad(ours.sum(), own)
    for grad, expected in zip(mine, torch.autograd.grad(slow.sum(), whole), strict=True):
        torch.testing.assert_close(grad / 2, expected[rows], rtol=1e-6, atol=1e-6)


def _check_pairs(rank: int) -> None:
    for name, build in GATHERED.items():
        for per_sample in (False, name in BY_SAMPLE):
            alone, gathering = build(False).double(), build(True).double()
            for buffer, other in zip(alone.buffers(), gathering.buffers(), strict=True):
                buffer.copy_(other)
            wrapped = wrap(gathering)
            for _ in range(3):
                whole = _embeddings(3, 2 * HALF)
                mixed = _mixed(2 * HALF, per_sample=per_sample, halves=2)
                z, target, z_mixed = whole
                slow = _term(alone, z_mixed, target, mixed) + alone(z, target)
                own = _halves(whole, rank)
                _meet(wrapped(*own, _own(mixed, rank)), own, slow, whole)
                assert _same(_buffers(gathering), _buffers(alone))


def _check_crops(rank: int) -> None:
    whole = _embeddings(4, 2 * HALF, K)
    mixed = _mixed(2 * HALF, per_sample=True, halves=2)
    own = _halves(whole, rank)
    given = {"z_mixed": whole[3], "mixed": mixed}
    slow = wrap(SwaVLoss())(whole[:2], [whole[2]], **given)
    ours = wrap(SwaVLoss(sinkhorn_gather_distributed=True))(
        own[:2], [own[2]], z_mixed=own[3], mixed=_own(mixed, rank)
    )
    _meet(ours, own, slow, whole)

    alone, split = DINOLoss(K).double(), DINOLoss(K).double()
    for _ in range(2):
        teacher = [logits.detach() + 1 for logits in whole[:2]]
        slow = wrap(alone)(teacher, whole[:3], **given)
        ours = wrap(split)(
            [logits.detach() + 1 for logits in own[:2]],
            own[:3],
            z_mixed=own[3],
            mixed=_own(mixed, rank),
        )
        _meet(ours, own, slow, whole)
        torch.testing.assert_close(split.center, alone.center)


def _check_uneven(rank: int) -> None:
    n = HALF - rank
    mixed = _mixed(n)
    text = r"every process must hold as many images, got \[4, 3\] by rank; use drop_last=True"
    for criterion in (
        *(build(True) for build in GATHERED.values()),
        BarlowTwinsLoss(gather_distributed=True),
    ):
        before = _buffers(criterion)
        z, target, z_mixed = _embeddings(3, n, dtype=torch.float32)
        with pytest.raises(ValueError, match=text):
            wrap(criterion)(z, target, z_mixed, mixed)
        wrapped: Any = wrap(criterion)
        with pytest.raises(ValueError, match=text):
            wrapped.mixed_loss(z_mixed, target, mixed)
        assert _same(_buffers(criterion), before)
    large = [torch.randn(n, K) for _ in range(2)]
    with pytest.raises(ValueError, match=text):
        wrap(SwaVLoss(sinkhorn_gather_distributed=True))(large, [], z_mixed=large[0], mixed=mixed)


def _process(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for check in (_check_pairs, _check_crops, _check_uneven):
            torch.manual_seed(0)
            check(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    spawn(_process, (str(tmp_path / "meeting"),), nprocs=2)
