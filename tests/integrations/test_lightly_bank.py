"""lightly's NTXentLoss with a memory bank, wrapped."""

from __future__ import annotations

import pytest

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install '.[lightly]' for these tests"
)

import copy
import io
from collections.abc import Callable
from typing import Any

import lightly
import torch
from lightly.loss import (
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
)
from lightly_criteria import (
    BANK,
    CRITERIA,
    TAU,
    WITH_BANK,
    C,
    K,
    N,
    are_same,
    assert_same_loss,
    call_copy,
    copy_buffers,
    draw_embeddings,
    draw_mixed,
    mixed_term,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixmask.integrations.lightly import (
    wrap,
)

# lightly's DCLWLoss copies a tensor with torch.tensor.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


VERSION = tuple(int(part) for part in lightly.__version__.split(".")[:2])


@pytest.mark.parametrize("name", WITH_BANK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [N, BANK, BANK + 3])
def test_the_bank_moves_once_a_step(name: str, dtype: torch.dtype, n: int) -> None:
    criterion = CRITERIA[name]().to(dtype)
    untouched = copy.deepcopy(criterion)
    wrapped = wrap(criterion)
    pointers = []
    for _ in range(7):
        z, target, *z_mixed = draw_embeddings(4, n, dtype=dtype)
        mixed = [draw_mixed(n), draw_mixed(n)]
        torch.autograd.backward(wrapped(z, target, z_mixed, mixed))
        untouched(z, target)
        assert are_same(copy_buffers(criterion), copy_buffers(untouched))
        pointers.append(int(criterion.memory_bank.bank_ptr))
    assert pointers == ([7, 14, 0, 7, 14, 0, 7] if n == N else [0] * 7)


@pytest.mark.parametrize("name", WITH_BANK)
@pytest.mark.parametrize("how", ["no_grad", "detached", "frozen query", "frozen key", "eval"])
def test_the_bank_moves_where_lightlys_would(name: str, how: str) -> None:
    criterion = CRITERIA[name]()
    before = copy_buffers(criterion)
    untouched = copy.deepcopy(criterion)
    wrapped = wrap(criterion).train(how != "eval")
    untouched.train(how != "eval")
    z, target, z_mixed = draw_embeddings(3, dtype=torch.float32)
    if how in ("detached", "frozen query"):
        z = z.detach()
    if how in ("detached", "frozen key"):
        target = target.detach()
    if how == "detached":
        z_mixed = z_mixed.detach()
    with torch.set_grad_enabled(how != "no_grad"):
        wrapped(z, target, z_mixed, draw_mixed())
        untouched(z, target)
    assert are_same(copy_buffers(criterion), copy_buffers(untouched))
    moves = how in ("frozen key", "eval")
    assert are_same(copy_buffers(criterion), before) == (not moves)


@pytest.mark.parametrize("name", WITH_BANK)
def test_three_calls_are_a_trap(name: str) -> None:
    """What eq. 4 looks like in code, around a criterion that enqueues: why there is `wrap`."""
    criterion = CRITERIA[name]().double()
    clean, naive = copy.deepcopy(criterion), copy.deepcopy(criterion)
    (target,) = draw_embeddings(1)
    # Of an encoder that knows its images.
    z, z_mixed = target * 2, target + 0.1
    mixed = draw_mixed()
    lam, other = mixed.lam.double(), target[mixed.partner]
    wrong = naive(z, target) + lam * naive(z_mixed, target) + (1 - lam) * naive(z_mixed, other)
    ours = wrap(criterion)(z, target, z_mixed, mixed)
    clean(z, target)
    assert are_same(copy_buffers(criterion), copy_buffers(clean))
    assert not are_same(copy_buffers(naive), copy_buffers(clean))
    assert int(clean.memory_bank.bank_ptr) == N
    assert int(naive.memory_bank.bank_ptr) == 0
    # The second and third calls meet the keys that the first has enqueued as negatives.
    assert wrong.item() > ours.item() + 1e-3


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
    z, target, z_mixed = draw_embeddings(3, n, c, torch.float32)
    mixed = draw_mixed(n)

    def build() -> Any:
        return NTXentLoss(TAU, memory_bank_size=(size, c))

    assert _largest_saved(lambda: call_copy(build(), z, target)) >= n * size
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
    z, target, z_mixed = draw_embeddings(3, dtype=torch.float32)
    mixed = draw_mixed()
    slow = call_copy(criterion, z, target) + mixed_term(criterion, z_mixed, target, mixed)
    wrapped = wrap(criterion)
    loss = wrapped(z, target, z_mixed, mixed)
    wrapped(*draw_embeddings(3, dtype=torch.float32), draw_mixed())
    assert_same_loss(loss, slow, [z, target, z_mixed])


@pytest.mark.parametrize("save_bank", [True, False])
def test_the_bank_is_saved_where_it_is_asked_for(save_bank: bool) -> None:
    wrapped: Any = wrap(NTXentLoss(memory_bank_size=(BANK, C)), save_bank=save_bank)
    wrapped(*draw_embeddings(3, dtype=torch.float32), draw_mixed())
    state = wrapped.state_dict()
    names = ["criterion.memory_bank.bank", "criterion.memory_bank.bank_ptr"]
    assert list(state) == (names if save_bank else [])

    fresh: Any = wrap(NTXentLoss(memory_bank_size=(BANK, C)), save_bank=save_bank)
    assert not are_same(copy_buffers(fresh), copy_buffers(wrapped))
    fresh.load_state_dict(state)
    assert are_same(copy_buffers(fresh), copy_buffers(wrapped)) == save_bank
    assert isinstance(fresh.criterion.memory_bank.bank, Tensor)
    assert len(list(fresh.buffers())) == 2


def test_criteria_without_a_bank_save_nothing() -> None:
    assert not wrap(NTXentLoss()).state_dict()
    assert not wrap(NegativeCosineSimilarity()).state_dict()
    assert list(wrap(DINOLoss(K)).state_dict()) == ["criterion.center"]


def test_checkpoints_from_before_are_read_without_the_bank() -> None:
    # lightly leaves the bank out, so a module that was saved before holds none.
    before = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": NTXentLoss(memory_bank_size=(4, 2))})
    state = before.state_dict()
    for save_bank in (True, False):
        loss: Any = wrap(NTXentLoss(memory_bank_size=(4, 2)), save_bank=save_bank)
        after: Any = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": loss})
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
            loss = self.criterion(q, k, q_mixed, draw_mixed(seed=step))
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
            part.load_state_dict(state)  # type: ignore[attr-defined]


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
        z, target, z_mixed = draw_embeddings(3, dtype=torch.float32)
        mixed = draw_mixed()
        torch.manual_seed(seed)
        snapshot = copy.deepcopy(untouched)
        expected = untouched(z, target)
        if seed > 0:
            expected = expected + mixed_term(snapshot, z_mixed, target, mixed)
        torch.manual_seed(seed)
        loss = wrapped(z, target, z_mixed, mixed)
        if seed > 0:
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        assert are_same(copy_buffers(criterion), copy_buffers(untouched))
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
