"""Symmetric methods: both directions at once, each with its own targets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from weighed import SHARED, Bank, C, Criterion, N, as_record, squares

from mixmask import (
    BlockMaskGenerator,
    LambdaWeightedLoss,
    MixedBatch,
    mix_batch,
)
from mixmask.losses import (
    DINO,
    InfoNCE,
    MatchedBarlowTwins,
    NegativeCosine,
    SwAV,
)

# Both directions of a symmetric method in one call.


def _cosine(p: Tensor, target: Tensor) -> Tensor:
    """-cos, row by row."""
    return torch.stack([-(a @ b) / a.norm() / b.norm() for a, b in zip(p, target, strict=True)])


def _cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """SwAV's, row by row."""
    rows = zip(z, target, strict=True)
    return torch.stack([-(t * (s / 0.1 - (s / 0.1).logsumexp(0))).sum() for s, t in rows])


def _centred(z: Tensor, target: Tensor) -> Tensor:
    """DINO's, row by row."""
    return _cross_entropy(z, ((target - CENTRE) / 0.04).softmax(dim=1))


def _contrastive(z: Tensor, target: Tensor) -> Tensor:
    """MoCo v3's, row by row, without its factor of 2 tau."""
    logits = [torch.stack([q @ k / 0.2 for k in target]) for q in z]
    return torch.stack([row.logsumexp(0) - row[i] for i, row in enumerate(logits)])


CENTRE = torch.linspace(-1, 1, C, dtype=torch.float64)
SYMMETRIC: dict[str, tuple[Criterion, Criterion, str]] = {
    "BYOL": (NegativeCosine(), _cosine, "sum"),
    "SimSiam": (NegativeCosine(), _cosine, "mean"),
    "SwAV": (SwAV(), _cross_entropy, "sum"),
    "DINO": (DINO(CENTRE), _centred, "mean"),
    "MoCo v3": (InfoNCE(), _contrastive, "sum"),
    "a criterion of one's own": (squares, squares, "mean"),
}
symmetric = pytest.mark.parametrize(
    "criterion, slow, directions", SYMMETRIC.values(), ids=SYMMETRIC
)


def _views(name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Online, target and mixed embeddings of two views, in float64."""
    online, mixed = (list(torch.randn(2, N, C, dtype=torch.float64)) for _ in range(2))
    targets = list(torch.randn(2, N, C, dtype=torch.float64))
    if name == "sharpened":
        targets = [t.softmax(dim=1) for t in targets]
    return [z.requires_grad_() for z in online], targets, [z.requires_grad_() for z in mixed]


def _slow_symmetric(
    slow: Criterion,
    directions: str,
    pairs: list[tuple[Tensor, Tensor]],
    mixed: list[tuple[Tensor, Tensor, MixedBatch]],
) -> Tensor:
    """Original terms and those of eq. 4, sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    for z, target in pairs:
        share = 1 / len(pairs) if directions == "mean" else 1
        total = total + share * slow(z, target).mean()
    for z, target, record in mixed:
        own, other = slow(z, target), slow(z, target[record.partner])
        for i in range(N):
            lam = record.lam[i] if record.lam.ndim else record.lam
            total = total + (lam.double() * own[i] + (1 - lam.double()) * other[i]) / N
    return total


@symmetric
@pytest.mark.parametrize("views", [1, 2])
def test_both_directions_are_met_by_their_own_targets(
    criterion: Criterion, slow: Criterion, directions: str, views: int
) -> None:
    online, targets, z_mixed = _views("sharpened" if criterion == SwAV() else "")
    if not isinstance(criterion, NegativeCosine | SwAV | DINO):
        targets = [t.requires_grad_() for t in targets]
    crossed = targets[1], targets[0]
    per_sample = isinstance(criterion, InfoNCE) or criterion is squares
    lams = torch.rand(2, N) if per_sample else torch.rand(2)
    records = [as_record(torch.randperm(N), lam) for lam in lams]
    whole = LambdaWeightedLoss(criterion, directions=directions)
    given = (z_mixed[0], records[0]) if views == 1 else (z_mixed, records)
    loss = whole(tuple(online), crossed, *given)
    triples = list(zip(z_mixed, crossed, records, strict=True))[:views]
    expected = _slow_symmetric(slow, directions, list(zip(online, crossed, strict=True)), triples)
    torch.testing.assert_close(loss, expected)
    leaves = [leaf for leaf in (*online, *targets, *z_mixed[:views]) if leaf.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves, retain_graph=True),
        torch.autograd.grad(expected, leaves, retain_graph=True),
    )
    torch.testing.assert_close(
        whole.mixed_loss(given[0], crossed, given[1]),
        _slow_symmetric(slow, directions, [], triples),
    )


@symmetric
@pytest.mark.parametrize("views", [1, 2])
def test_both_directions_term_by_term(
    criterion: Criterion, slow: Criterion, directions: str, views: int
) -> None:
    del slow
    encode = nn.Linear(12, C).double()
    alive: list[int] = []

    def counting(images: Tensor) -> Tensor:
        alive.append(len(images))
        z: Tensor = encode(images.flatten(1))
        return z

    x = list(torch.rand(2, N, 3, 2, 2, dtype=torch.float64))
    crossed = tuple(torch.rand(2, N, C, dtype=torch.float64).softmax(dim=2))
    records = [mix_batch(one, BlockMaskGenerator(2)) for one in x][:views]
    whole = LambdaWeightedLoss(criterion, directions=directions)
    loss = whole(
        [counting(one) for one in x], crossed, [counting(one.images) for one in records], records
    )
    expected = torch.autograd.grad(loss, list(encode.parameters()))

    alive.clear()
    total = 0.0
    given = records if views == 2 else records[0]
    for number, term in enumerate(whole.terms(counting, tuple(x), crossed, given), start=1):
        assert len(alive) == number  # No view is embedded before its turn.
        term.backward()
        total += float(term.detach())
    assert number == 2 + views
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    for parameter, gradient in zip(encode.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("by_term", [True, False])
def test_both_directions_move_the_state_as_two_plain_calls_do(by_term: bool) -> None:
    whole = LambdaWeightedLoss(Bank())
    criterion = whole.criterion
    assert isinstance(criterion, Bank)
    plain = copy.deepcopy(criterion)
    for _ in range(3):
        z1, z2, t1, t2, zm1, zm2 = torch.randn(6, 4, 5)
        before = copy.deepcopy(plain)
        expected = torch.zeros(())
        for z_mixed, target in ((zm1, t2), (zm2, t1)):
            for lam, its_target in ((0.5, target), (0.5, target[SHARED.partner])):
                expected = expected + lam * copy.deepcopy(before)(z_mixed, its_target)
        expected = expected + plain(z1, t2) + plain(z2, t1)
        if by_term:
            images, records = _encoded([z1, z2]), [_encoded_record(zm) for zm in (zm1, zm2)]
            terms = whole.terms(lambda x: x.flatten(1), images, (t2, t1), records)
            loss = torch.stack(list(terms)).sum()
        else:
            loss = whole((z1, z2), (t2, t1), (zm1, zm2), (SHARED, SHARED))
        torch.testing.assert_close(loss, expected)
        assert torch.equal(criterion.keys, plain.keys)


def _encoded(rows: list[Tensor]) -> list[Tensor]:
    return [row.view(4, 5, 1, 1) for row in rows]


def _encoded_record(rows: Tensor) -> MixedBatch:
    return MixedBatch(rows.view(4, 5, 1, 1), SHARED.lam, SHARED.partner)


def test_matching_criteria_are_given_the_clean_embeddings_of_their_direction() -> None:
    criterion = MatchedBarlowTwins(0.1)
    z1, z2, m1, m2 = torch.randn(4, N, C, dtype=torch.float64)
    records = [as_record(torch.randperm(N), torch.rand(N)) for _ in range(2)]
    whole = LambdaWeightedLoss(criterion)
    expected = criterion(z1, z2) + criterion(z2, z1)
    for mixed, target, z, record in ((m1, z2, z1, records[0]), (m2, z1, z2, records[1])):
        expected = expected + criterion.matched(mixed, target, z, z[record.partner], record.lam)
    torch.testing.assert_close(whole((z1, z2), (z2, z1), (m1, m2), records), expected)


def test_directions_are_checked_where_terms_are_taken_one_by_one() -> None:
    images = torch.rand(4, 3, 2, 2)
    mixed = mix_batch(images, BlockMaskGenerator(2))
    rows = torch.randn(4, C)
    whole = LambdaWeightedLoss(InfoNCE())

    def encode(images: Tensor) -> Tensor:
        raise AssertionError(f"{len(images)} images were embedded before the check")

    with pytest.raises(TypeError, match=r"^images and target must both be tensors"):
        whole.terms(encode, [images, images], rows, mixed)
    with pytest.raises(ValueError, match="one mixed view, or one per direction, got 3 for 2"):
        whole.terms(encode, (images, images), (rows, rows), [mixed] * 3)
    with pytest.raises(ValueError, match=r"no gradient where terms .* pass target.detach\(\)"):
        whole.terms(encode, (images, images), (rows, rows.clone().requires_grad_()), mixed)
    with pytest.raises(TypeError, match=r"^z_mixed must be a tensor .* got tuple"):
        next(whole.terms(lambda x: (x, x), images, rows, mixed))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="directions must be one of 'sum', 'mean', got 'both'"):
        LambdaWeightedLoss(InfoNCE(), directions="both")
    assert "directions='mean'" in repr(LambdaWeightedLoss(InfoNCE(), directions="mean"))
