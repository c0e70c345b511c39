from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask import MixedBatch, lambda_weighted_loss
from mixmask.losses import InfoNCE, _pair_sums, info_nce
from mixmask.losses.contrastive import _similarity

Golden = Callable[[str], dict[str, Tensor]]

N, K, C = 7, 509, 16


def _unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).to(dtype)


def _term(z: Tensor, target: Tensor, negatives: Tensor | None, tau: float) -> Tensor:
    """-log of the share of the positive, row by row: (N,)."""
    rows = []
    for i in range(len(z)):
        positive = (z[i] * target[i]).sum() / tau
        others = target[torch.arange(len(z)) != i] if negatives is None else negatives
        row = torch.cat([positive[None], (others * z[i]).sum(dim=1) / tau])
        rows.append(row.max() + (row - row.max()).exp().sum().log() - positive)
    return torch.stack(rows)


def _plain(z: Tensor, target: Tensor, negatives: Tensor | None, tau: float) -> Tensor:
    """The formula as everybody writes it, in the dtype of its inputs: (N,)."""
    if negatives is None:
        return F.cross_entropy(z @ target.T / tau, torch.arange(len(z)), reduction="none")
    logits = torch.cat([(z * target).sum(dim=1, keepdim=True), z @ negatives.T], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long), reduction="none")


def _mixed(partner: Tensor, lam: Tensor) -> MixedBatch:
    return MixedBatch(torch.empty(len(partner), 1, 1, 1), lam, partner)


@pytest.fixture(params=[256, 2**18], ids=["chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Split the queue: 256 rows are the smallest chunk, whatever the elements allowed."""
    rows: int = request.param
    elements = 1 if rows == 256 else rows
    monkeypatch.setattr(_pair_sums, "_CHUNK_ELEMENTS", {"cpu": elements, "device": elements})
    return rows


def _gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("k", [None, 1, 255, 256, 257, K, 1025])
@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_info_nce_agrees_with_a_loop(k: int | None, tau: float, chunk: int) -> None:
    assert chunk
    z, target = (_unit(N, C).requires_grad_() for _ in range(2))
    inputs = [z, target]
    negatives = None
    if k is not None:
        negatives = _unit(k, C).requires_grad_()
        inputs.append(negatives)
    weights = torch.rand(N, dtype=torch.float64)
    ours = info_nce(z, target, negatives, tau, reduction="none")
    slow = _term(z, target, negatives, tau)
    torch.testing.assert_close(ours, slow, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        _gradients(ours @ weights, inputs), _gradients(slow @ weights, inputs), rtol=1e-7, atol=1e-8
    )
    torch.testing.assert_close(info_nce(z, target, negatives, tau), slow.mean())


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sharing_agrees_with_equation_4(
    queue: bool, switch: bool, per_sample: bool, given: bool, reduction: str, chunk: int
) -> None:
    """The loss around InfoNCE against eq. 4 written out, in value and gradient."""
    assert chunk
    partner = torch.tensor([2, 0, 1, 6, 3, 4, 4]) if given else torch.randperm(N)
    lam = torch.rand(N) if per_sample else torch.rand(())
    z, target = (_unit(N, C).requires_grad_() for _ in range(2))
    inputs = [z, target]
    negatives = None
    if queue:
        negatives = _unit(K, C).requires_grad_()
        inputs.append(negatives)
    criterion = InfoNCE(negatives, 0.1, reduction=reduction)
    ours = lambda_weighted_loss(criterion, z, target, _mixed(partner, lam), switch=switch)
    assert ours.shape == ()

    own = _term(z, target, negatives, 0.1)
    # In a batch, the term of the partner has the same keys, in the order of partners.
    swapped = _term(z, target[partner], negatives, 0.1)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        share = lam[i] if per_sample else lam
        total = total + (share * own[i] + (1 - share) * swapped[i] if switch else share * own[i])
    torch.testing.assert_close(ours, total / N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        _gradients(ours, inputs), _gradients(total / N, inputs), rtol=1e-6, atol=1e-6
    )


def test_weighted_returns_a_row_an_image() -> None:
    z, target, other, negatives = _unit(N, C), _unit(N, C), _unit(N, C), _unit(K, C)
    lam = torch.rand(N)
    criterion = InfoNCE(negatives, reduction="none")
    own, rest = _term(z, target, negatives, 0.2), _term(z, other, negatives, 0.2)
    torch.testing.assert_close(
        criterion.weighted(z, target, other, lam), lam * own + (1 - lam) * rest
    )
    torch.testing.assert_close(criterion.weighted(z, target, None, lam), lam * own)


def test_gradients_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pair_sums, "_CHUNK_ELEMENTS", {"cpu": 1, "device": 1})
    z, target, negatives = (_unit(n, 2).requires_grad_() for n in (3, 3, 259))
    mixed = _mixed(torch.tensor([1, 2, 0]), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))

    def loss(z: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
        return lambda_weighted_loss(InfoNCE(negatives, 0.3), z, target, mixed)

    assert torch.autograd.gradcheck(loss, (z, target, negatives))
    detached = negatives.detach()
    assert torch.autograd.gradcheck(lambda z, t: loss(z, t, detached), (z, target))
    assert torch.autograd.gradcheck(lambda q: loss(z.detach(), target.detach(), q), (negatives,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_low_precision_stays_within_the_error_of_the_plain_formula(
    dtype: torch.dtype, queue: bool, tau: float
) -> None:
    """Errors against float64: ours at most the plain formula's, plus a step of resolution."""
    z, target = (_unit(64, 32, dtype=dtype).requires_grad_() for _ in range(2))
    negatives = _unit(K, 32, dtype=dtype).requires_grad_() if queue else None
    inputs = [z, target] + ([negatives] if negatives is not None else [])
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = _plain(wide[0], wide[1], wide[2] if queue else None, tau)
    plain = _plain(z, target, negatives, tau)
    ours = info_nce(z, target, negatives, tau, reduction="none")

    def error(value: Tensor, truth: Tensor) -> float:
        return float((value.double() - truth).detach().abs().max())

    step = torch.finfo(dtype).eps
    assert error(ours, exact) <= error(plain, exact) + step * float(exact.detach().abs().max())
    truths = _gradients(exact.sum(), wide)
    theirs = _gradients(plain.sum(), inputs)
    # In float32 both errors are a few roundings, in orders of their own.
    step *= 4 if dtype == torch.float32 else 1
    for mine, their, truth in zip(_gradients(ours.sum(), inputs), theirs, truths, strict=True):
        assert mine.dtype == dtype
        assert error(mine, truth) <= error(their, truth) + step * float(truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queue", [True, False])
def test_losses_are_at_least_float32(dtype: torch.dtype, queue: bool) -> None:
    z = _unit(N, C, dtype=dtype)
    assert info_nce(z, z, _unit(K, C, dtype=dtype) if queue else None).dtype == torch.float32


def test_mixed_dtypes_meet_in_the_wider_one() -> None:
    z, negatives = _unit(N, C, dtype=torch.float16), _unit(K, C, dtype=torch.float32)
    expected = _term(z.double(), z.double(), negatives.double(), 0.2)
    ours = info_nce(z, z, negatives, reduction="none")
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queue", [True, False])
def test_autocast_stays_within_the_error_of_the_plain_formula(queue: bool) -> None:
    z, target = (_unit(64, 32, dtype=torch.float32).requires_grad_() for _ in range(2))
    negatives = _unit(K, 32, dtype=torch.float32) if queue else None
    exact = _plain(
        z.double(), target.double(), None if negatives is None else negatives.double(), 0.1
    )
    with torch.autocast("cpu", torch.bfloat16):
        plain = _plain(z, target, negatives, 0.1)
        ours = info_nce(z, target, negatives, 0.1, reduction="none")
    assert ours.dtype == torch.float32
    step = torch.finfo(torch.bfloat16).eps
    assert (ours - exact).detach().abs().max() <= (plain - exact).detach().abs().max() + step
    truth = torch.autograd.grad(exact.sum(), z)[0]
    theirs, mine = (torch.autograd.grad(loss.sum(), z)[0] for loss in (plain, ours))
    assert mine.dtype == torch.float32
    assert (mine - truth).abs().max() <= (theirs - truth).abs().max() + step * truth.abs().max()


def test_autocast_leaves_positives_in_float32() -> None:
    z = _unit(64, 32, dtype=torch.float32)
    target = _unit(64, 32, dtype=torch.float32)
    expected = _similarity(z, target, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        similarity = _similarity(z, target, 0.2)
    torch.testing.assert_close(similarity, expected)


def test_autocast_leaves_float64_alone() -> None:
    z, target, negatives = _unit(N, C), _unit(N, C), _unit(K, C)
    expected = info_nce(z, target, negatives)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(z, target, negatives)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_huge_logits_do_not_overflow(queue: bool, scale: float) -> None:
    z = (_unit(N, C, dtype=torch.float32) * 1e3).requires_grad_()
    target = _unit(N, C, dtype=torch.float32) * 1e3 * scale
    negatives = _unit(K, C, dtype=torch.float32) * 1e3 if queue else None
    loss = info_nce(z, target, negatives, 0.05, reduction="none")
    exact = _term(
        z.double(), target.double(), None if negatives is None else negatives.double(), 0.05
    )
    assert float(exact.detach().max()) > 1e6
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=16.0)
    gradient = torch.autograd.grad(loss.sum(), z)[0]
    assert bool(torch.isfinite(gradient).all())


def _largest_saved(forward: Callable[[], Tensor]) -> int:
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.autograd.backward(forward())
    return max(sizes)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_no_matrix_of_queries_by_negatives_is_kept(needs_grad: bool) -> None:
    n, k = 64, 4096
    z, target = (_unit(n, C, dtype=torch.float32).requires_grad_() for _ in range(2))
    negatives = _unit(k, C, dtype=torch.float32).requires_grad_(needs_grad)
    mixed = _mixed(torch.randperm(n), torch.rand(n))
    criterion = InfoNCE(negatives)
    assert _largest_saved(lambda: _plain(z, target, negatives, 0.2).mean()) >= n * k
    ours = _largest_saved(lambda: lambda_weighted_loss(criterion, z, target, mixed))
    assert ours <= (k * C if needs_grad else n * C)


def test_a_queue_stored_the_other_way_is_passed_transposed(golden: Golden) -> None:
    numbers = golden("moco_mixmask")
    tau = float(numbers["temperature"])
    q, k, queue = numbers["q"], numbers["k"], numbers["queue"]
    loss = info_nce(q, k, queue.T, tau)
    torch.testing.assert_close(loss, numbers["loss_original"].float(), rtol=0, atol=1e-5)
    text = r"negatives must be \(K, 16\), got \(16, 64\); .* stored as \(C, K\) is passed as queue"
    with pytest.raises(ValueError, match=text):
        info_nce(q, k, queue, tau)


def test_the_order_of_negatives_does_not_matter() -> None:
    z, negatives = _unit(N, C), _unit(K, C)
    torch.testing.assert_close(
        info_nce(z, z, negatives), info_nce(z, z, negatives[torch.randperm(K)])
    )


@pytest.mark.parametrize("queue", [True, False])
def test_empty_batches_are_refused(queue: bool) -> None:
    z = torch.zeros(0, C)
    with pytest.raises(ValueError, match=r"z must not be empty, got \(0, .*skip empty batches"):
        info_nce(z, z, _unit(K, C, dtype=torch.float32) if queue else None)


def test_losses_on_a_device(device: torch.device) -> None:
    z, target, negatives = (_unit(n, C, dtype=torch.float32) for n in (N, N, K))
    expected = info_nce(z, target, negatives)
    ours = info_nce(z.to(device), target.to(device), negatives.to(device))
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


ROWS = torch.rand(4, 8)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: info_nce(ROWS, ROWS[:3]), ValueError, r"both be \(N, C\), got \(4, 8\) and \(3"),
        (lambda: info_nce(ROWS, ROWS[:, :5]), ValueError, r"and \(4, 5\); pass both from"),
        (lambda: info_nce(ROWS[0], ROWS[0]), ValueError, r"\(8,\) and \(8,\); flatten features"),
        (lambda: info_nce(ROWS.long(), ROWS.long()), TypeError, r"z must be floating, got torch"),
        (lambda: InfoNCE(ROWS[0]), ValueError, r"must be \(K, C\), got \(8,\); a queue that is"),
        (lambda: InfoNCE(ROWS[:0]), ValueError, r"must be \(K, C\), got \(0, 8\); a queue that"),
        (lambda: InfoNCE(temperature=0.0), ValueError, r"temperature must be positive .* got 0\.0"),
        (lambda: InfoNCE(temperature=-1), ValueError, r"temperature must be positive .* got -1"),
        (lambda: InfoNCE(temperature="1"), TypeError, r"temperature must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: InfoNCE(reduction="sum"), ValueError, r"one of 'mean', 'none', got 'sum'"),
        (
            lambda: info_nce(ROWS, ROWS, ROWS.to("meta")),
            ValueError,
            r"on the device of z, cpu, got meta; move it with \.to\(z\.device\)",
        ),
        (
            lambda: InfoNCE(ROWS).weighted(ROWS, ROWS[:2], None, torch.ones(())),
            ValueError,
            r"both be \(N, C\), got \(4, 8\) and \(2, 8\)",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_tensors_elsewhere_are_refused() -> None:
    z, elsewhere = _unit(N, C), torch.zeros(N, C, device="meta")
    with pytest.raises(ValueError, match="target must be on the device of z, cpu, got meta"):
        info_nce(z, elsewhere)
    with pytest.raises(ValueError, match="negatives must be on the device of z, cpu, got meta"):
        info_nce(z, z, elsewhere)


def test_a_function_is_asked_for_the_queue_at_every_call() -> None:
    """Loops rebind their queue; what was held at the start would be stale."""
    queue = _unit(K, C)

    def read() -> Tensor:
        return queue

    criterion, stale = InfoNCE(read, 0.1), InfoNCE(queue, 0.1)
    for _ in range(3):
        z, target, other = _unit(N, C), _unit(N, C), _unit(N, C)
        fresh = InfoNCE(queue, 0.1)
        lam = torch.rand(N, dtype=torch.float64)
        assert torch.equal(criterion(z, target), fresh(z, target))
        assert torch.equal(info_nce(z, target, read, 0.1), fresh(z, target))
        ours = criterion.weighted(z, target, other, lam)
        assert torch.equal(ours, fresh.weighted(z, target, other, lam))
        queue = torch.cat([queue, target])[N:]
    assert not torch.equal(criterion(z, target), stale(z, target))


def test_mixed_terms_of_one_call_read_the_queue_once() -> None:
    asked = []

    def queue() -> Tensor:
        asked.append(1)
        return _unit(K, C)

    z, target, other = _unit(N, C), _unit(N, C), _unit(N, C)
    InfoNCE(queue).weighted(z, target, other, torch.tensor(0.3))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "queue, error, text",
    [
        (None, TypeError, r"negatives must be a tensor \(K, C\) .*, got NoneType; .* a function"),
        (torch.zeros(C), ValueError, r"negatives must be \(K, C\), got \(16,\)"),
        (torch.zeros(C, K), ValueError, r"negatives must be \(K, 16\), got .* queue\.T"),
    ],
)
def test_what_the_function_returns_is_checked_at_the_call(
    queue: Any, error: type[Exception], text: str
) -> None:
    criterion = InfoNCE(lambda: queue)
    z, target = _unit(N, C), _unit(N, C)
    with pytest.raises(error, match=text):
        criterion(z, target)
    with pytest.raises(error, match=text):
        criterion.weighted(z, target, target, torch.tensor(0.5))


@pytest.mark.parametrize("stale", [True, False])
def test_a_queue_of_keys_that_were_not_detached_is_refused(stale: bool) -> None:
    z = F.normalize(torch.randn(4, 3), dim=1)
    encoder = torch.nn.Linear(3, 3)
    queue = torch.cat([torch.randn(8, 3), encoder(z)])
    with pytest.raises(ValueError, match=r"must carry no graph.*keys\.detach\(\)"):
        InfoNCE(queue) if stale else InfoNCE(lambda: queue)(z, z)
    with pytest.raises(ValueError, match=r"must carry no graph"):
        info_nce(z, z, queue)
    # What is trained itself, and is no key, stays possible.
    learned = torch.randn(8, 3, requires_grad=True)
    InfoNCE(learned)(z, z).backward()
    assert learned.grad is not None
