"""Properties that hold for any shape, format, partner and λ.

200 examples each; `--hypothesis-profile=thorough` takes 10,000.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import mixmask
from mixmask import MixedBatch, lambda_weighted_loss, losses
from mixmask._blocks import LARGEST_GRID

Criterion = Callable[[Tensor, Tensor], Tensor]

SEEDS = st.integers(0, 2**31)
# Shares whose number of cells is neither none nor all of them at any grid size.
SHARES = st.floats(0.02, 0.98)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8])


@st.composite
def ratios(draw: st.DrawFn) -> float | tuple[float, float]:
    low, high = sorted((draw(SHARES), draw(SHARES)))
    return low if draw(st.booleans()) else (low, high)


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Images of any dtype and memory format, whose pixels all differ in uint8's range."""
    shape = [draw(st.integers(low, high)) for low, high in ((2, 9), (1, 4), (6, 19), (6, 19))]
    images = torch.rand(shape, generator=_seeded(draw(SEEDS))).mul(255).to(draw(DTYPES))
    layout = draw(st.sampled_from(["contiguous", "channels last", "strided"]))
    if layout == "channels last":
        return images.contiguous(memory_format=torch.channels_last)
    return images.transpose(2, 3) if layout == "strided" else images


@st.composite
def partners(draw: st.DrawFn, n: int) -> str | Tensor:
    kind = draw(st.sampled_from(["reverse", "random", "any"]))
    return kind if kind != "any" else torch.randint(n, (n,), generator=_seeded(draw(SEEDS)))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(2, LARGEST_GRID), ratios(), st.integers(1, 5), st.booleans(), SEEDS)
@example(55, 0.02, 1, False, 0)  # 60.5 cells, which round to 60 in a batch.
def test_block_masks_keep_exactly_the_asked_share(
    grid: int, ratio: float | tuple[float, float], n: int, roll: bool, seed: int
) -> None:
    masks = mixmask.block_masks(n, grid, ratio, roll=roll, generator=_seeded(seed))
    _check_share(masks, ratio, n, grid)


@given(st.integers(2, 64), ratios(), st.integers(1, 5), SEEDS)
def test_discrete_masks_keep_exactly_the_asked_share(
    grid: int, ratio: float | tuple[float, float], n: int, seed: int
) -> None:
    masks = mixmask.discrete_masks(n, grid, ratio, generator=_seeded(seed))
    _check_share(masks, ratio, n, grid)


def _check_share(masks: Tensor, ratio: float | tuple[float, float], n: int, grid: int) -> None:
    """Compare the kept cells with the ratio, to the cell, and never none or all."""
    assert masks.shape == (n, grid, grid)
    assert masks.dtype == torch.bool
    low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    cells = grid * grid
    kept = masks.sum(dim=(1, 2))
    fewest, most = (min(max(round(share * cells), 1), cells - 1) for share in (low, high))
    assert (kept >= fewest).all()
    assert (kept <= most).all()


@given(batches(), st.integers(2, 6), ratios(), st.booleans(), st.data())
def test_mixing_takes_each_pixel_from_one_of_both_images(
    images: Tensor,
    grid: int,
    ratio: float | tuple[float, float],
    per_sample: bool,
    data: st.DataObject,
) -> None:
    n, _, height, width = images.shape
    before = images.clone()
    generator = _seeded(data.draw(SEEDS))
    masks = mixmask.block_masks(n if per_sample else 1, grid, ratio, generator=generator)
    mixed = mixmask.mix_batch(
        images,
        masks if per_sample else masks[0],
        partner=data.draw(partners(n)),
        generator=generator,
    )
    pixels = mixmask.cells_to_pixels(masks, height, width).expand(n, height, width)
    own, other = images, images[mixed.partner]
    assert torch.equal(mixed.images, torch.where(pixels[:, None], own, other))
    assert mixed.images.dtype == images.dtype
    shares = pixels.double().mean(dim=(1, 2))
    lam = mixed.lam.expand(n).double()
    torch.testing.assert_close(lam, shares, rtol=1e-6, atol=1e-6)
    assert torch.equal(images, before)


@given(st.integers(2, 12), st.integers(12, 40), st.integers(12, 40), SEEDS)
def test_cells_go_to_pixels_as_nearest_neighbour(
    grid: int, height: int, width: int, seed: int
) -> None:
    masks = torch.rand(3, grid, grid, generator=_seeded(seed)) > 0.5
    rows = torch.arange(height) * grid // height
    columns = torch.arange(width) * grid // width
    expected = masks[:, rows[:, None], columns]
    assert torch.equal(mixmask.cells_to_pixels(masks, height, width), expected)


@given(batches(), st.sampled_from(["mixup", "cutmix", "erase"]), st.booleans(), st.data())
def test_other_mixtures_record_what_they_did(
    images: Tensor, kind: str, per_sample: bool, data: st.DataObject
) -> None:
    n = len(images)
    images = images.float()
    generator = _seeded(data.draw(SEEDS))
    if kind == "erase":
        masks = mixmask.block_masks(n if per_sample else 1, 3, generator=generator)
        mixed = mixmask.erase_batch(images, masks if per_sample else masks[0], generator=generator)
    else:
        mix = {"mixup": mixmask.mixup_batch, "cutmix": mixmask.cutmix_batch}[kind]
        partner = data.draw(partners(n))
        mixed = mix(images, per_sample=per_sample, partner=partner, generator=generator)
    lam = mixed.lam.expand(n)
    assert ((lam >= 0) & (lam <= 1)).all()
    if kind == "mixup":
        share = lam.view(n, 1, 1, 1)
        expected = share * images + (1 - share) * images[mixed.partner]
        torch.testing.assert_close(mixed.images, expected, rtol=1e-5, atol=1e-3)
        return
    assert mixed.mask is not None
    pixels = mixed.mask.expand(n, *images.shape[-2:])
    torch.testing.assert_close(lam, pixels.float().mean(dim=(1, 2)), rtol=1e-5, atol=1e-6)
    kept = pixels[:, None].expand_as(images)
    assert torch.equal(mixed.images[kept], images[kept])
    if kind == "cutmix":
        assert torch.equal(mixed.images[~kept], images[mixed.partner][~kept])


@dataclass(frozen=True)
class Loss:
    """A criterion, and whether targets must be distributions."""

    criterion: Criterion
    codes: bool = False
    scalar: bool = False


def _queue(dim: int) -> Tensor:
    return F.normalize(torch.randn(31, dim, generator=_seeded(7), dtype=torch.float64), dim=1)


def _losses(dim: int, dtype: torch.dtype = torch.float64) -> dict[str, Loss]:
    return {
        "InfoNCE, queue": Loss(losses.InfoNCE(_queue(dim).to(dtype), 0.3)),
        "InfoNCE, batch": Loss(losses.InfoNCE(temperature=0.3)),
        "NT-Xent": Loss(losses.NTXent(0.3)),
        "NT-Xent, one direction": Loss(losses.NTXent(0.3, one_directional=True)),
        "negative cosine": Loss(losses.NegativeCosine()),
        "Barlow Twins": Loss(losses.BarlowTwins(0.1), scalar=True),
        "Barlow Twins, matched": Loss(losses.MatchedBarlowTwins(0.1), scalar=True),
        "VICReg": Loss(losses.VICReg(25, 25, 1)),
        "SwAV": Loss(losses.SwAV(0.3), codes=True),
        "DINO": Loss(losses.DINO(torch.zeros(dim, dtype=dtype), 0.3, 0.2)),
        "mean squared error": Loss(F.mse_loss, scalar=True),
    }


NAMES = st.sampled_from(sorted(_losses(2)))


@st.composite
def terms(draw: st.DrawFn, *, involution: bool = False) -> tuple[Loss, Tensor, Tensor, MixedBatch]:
    """Return a criterion, mixed rows, targets and the record, all in float64."""
    n, dim = draw(st.integers(3, 9)), draw(st.integers(2, 8))
    loss = _losses(dim)[draw(NAMES)]
    generator = _seeded(draw(SEEDS))
    rows = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    z, target = F.normalize(rows, dim=2)
    if loss.codes:
        target = (target / 0.2).softmax(dim=1)
    kind = "reverse" if involution else draw(partners(n))
    partner = {
        "reverse": lambda: torch.arange(n).flip(0),
        "random": lambda: torch.randperm(n, generator=generator),
    }[kind]() if isinstance(kind, str) else kind  # fmt: skip
    shared = loss.scalar or draw(st.booleans())
    lam = torch.rand(() if shared else (n,), generator=generator, dtype=torch.float64)
    return loss, z, target, MixedBatch(torch.zeros(n, 1, 1, 1), lam, partner)


def _mixed_term(loss: Loss, z: Tensor, target: Tensor, clean: Tensor, mixed: MixedBatch) -> float:
    """Return eq. 4's sum alone; a criterion that matches takes it from the clean rows too."""
    if not isinstance(loss.criterion, losses.MatchedBarlowTwins):
        return float(lambda_weighted_loss(loss.criterion, z, target, mixed))
    whole = mixmask.LambdaWeightedLoss(loss.criterion)(clean, target, z, mixed)
    return float(whole - loss.criterion(clean, target))


def _with_lam(mixed: MixedBatch, lam: Tensor) -> MixedBatch:
    return MixedBatch(mixed.images, lam, mixed.partner)


@given(terms(), st.floats(0, 1), SEEDS)
def test_the_mixed_term_is_convex_in_lam_and_finite(
    case: tuple[Loss, Tensor, Tensor, MixedBatch], weight: float, seed: int
) -> None:
    loss, z, target, mixed = case

    def at(lam: Tensor) -> float:
        return _mixed_term(loss, z, target, z.flip(1), _with_lam(mixed, lam))

    # Two ends, shared or per sample, and a point on the way from one to the other.
    first = mixed.lam
    second = torch.rand(first.shape, generator=_seeded(seed), dtype=torch.float64)
    ends = at(first), at(second)
    between = at(weight * first + (1 - weight) * second)
    chord = weight * ends[0] + (1 - weight) * ends[1]
    assert between <= chord + 1e-9 * max(1.0, *map(abs, ends))
    if not isinstance(loss.criterion, losses.MatchedBarlowTwins):
        assert between == pytest.approx(chord, rel=1e-9, abs=1e-9)
    assert torch.tensor([between, *ends]).isfinite().all()


@given(
    terms(),
    NAMES,
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    st.booleans(),
)
def test_the_mixed_term_is_finite_in_every_format_where_the_criterion_is(
    case: tuple[Loss, Tensor, Tensor, MixedBatch],
    name: str,
    dtype: torch.dtype,
    scale: float,
    transposed: bool,
) -> None:
    _, z, target, mixed = case
    loss = _losses(z.shape[1], dtype)[name]
    z, target = z * scale, target.softmax(dim=1) if loss.codes else target * scale
    z, target = z.to(dtype).requires_grad_(), target.to(dtype)
    if transposed:
        z, target = z.detach().t().contiguous().t().requires_grad_(), target.t().contiguous().t()
    if loss.scalar and mixed.lam.ndim:
        mixed = _with_lam(mixed, mixed.lam.mean())
    plain = [loss.criterion(z, target), loss.criterion(z, target[mixed.partner])]
    found = (
        mixmask.LambdaWeightedLoss(loss.criterion)(z, target, z, mixed)
        if isinstance(loss.criterion, losses.MatchedBarlowTwins)
        else lambda_weighted_loss(loss.criterion, z, target, mixed)
    )
    if all(term.isfinite() for term in plain):
        assert found.isfinite()
        (gradient,) = torch.autograd.grad(found, z)
        own, other = (torch.autograd.grad(term, z)[0] for term in plain)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all() or not (own.isfinite() & other.isfinite()).all()


@given(terms(), SEEDS)
def test_the_order_of_the_batch_does_not_matter(
    case: tuple[Loss, Tensor, Tensor, MixedBatch], seed: int
) -> None:
    loss, z, target, mixed = case
    order = torch.randperm(len(z), generator=_seeded(seed))
    place = order.argsort()  # where each row went
    lam = mixed.lam[order] if mixed.lam.ndim else mixed.lam
    moved = MixedBatch(mixed.images, lam, place[mixed.partner[order]])
    clean = z.flip(1)
    before = _mixed_term(loss, z, target, clean, mixed)
    after = _mixed_term(loss, z[order], target[order], clean[order], moved)
    assert after == pytest.approx(before, rel=1e-9, abs=1e-9)


@given(terms(involution=True))
def test_flipping_the_queries_equals_permuting_the_targets(
    case: tuple[Loss, Tensor, Tensor, MixedBatch],
) -> None:
    loss, z, target, mixed = case
    # VICReg takes the targets' variance once, not in each of both terms; matching has one term.
    if isinstance(loss.criterion, losses.VICReg | losses.MatchedBarlowTwins):
        return
    lam = mixed.lam
    criterion = loss.criterion if lam.ndim == 0 else replace(loss.criterion, reduction="none")  # type: ignore[type-var]
    # Row i of the flipped queries is the image in which x_i fills: that image's λ counts.
    filled = 1 - (lam.flip(0) if lam.ndim else lam)
    expected = lam * criterion(z, target) + filled * criterion(z.flip(0), target)
    found = lambda_weighted_loss(loss.criterion, z, target, mixed)
    torch.testing.assert_close(found, expected.mean(), rtol=1e-9, atol=1e-9)
