"""Barlow Twins: features that correlate across views, and not with each other."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import build_tiny, note_mixes, seeded
from torch import Tensor

from mixmask.trainers.methods import make_config


def paper_loss(z: Tensor, target: Tensor, weight: float) -> float:
    """Barlow Twins, eq. 1 and 2, feature by feature."""
    z, target = z.detach().double(), target.detach().double()
    z, target = (
        (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt() for x in (z, target)
    )
    total = 0.0
    for i, row in enumerate((z.T @ target / len(z)).tolist()):
        for j, c in enumerate(row):
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


@pytest.mark.parametrize("mix", ["both", "erase"])
@pytest.mark.parametrize("switch", [True, False])
def test_terms_are_the_papers_formula(switch: bool, mix: str) -> None:
    model, x1, x2 = build_tiny(
        "barlow-twins", mix=mix, switch=switch, scale=0.3, redundancy_weight=0.02
    )
    model.eval()
    drawn = note_mixes(model)
    clean, *mixed_terms = model.terms(x1, x2, seeded())
    z1, z2 = model.encode(x1), model.encode(x2)
    assert clean.loss.item() == pytest.approx(0.3 * paper_loss(z1, z2, 0.02), rel=1e-4)
    assert drawn
    for term, mixed in zip(mixed_terms, drawn, strict=True):
        z, lam = model.encode(mixed.images), float(mixed.lam)
        expected = lam * paper_loss(z, z2, 0.02)
        if switch:
            expected += (1 - lam) * paper_loss(z, z2[mixed.partner], 0.02)
        assert term.loss.item() == pytest.approx(0.3 * expected, rel=1e-4)


def test_terms_are_lightlys() -> None:
    loss = pytest.importorskip(
        "lightly.loss", reason="lightly is not installed; pip install '.[lightly]'"
    )
    model, x1, x2 = build_tiny("barlow-twins", mix="mixmask", scale=0.3)
    model.eval()
    drawn = note_mixes(model)
    clean, term = model.terms(x1, x2, seeded())
    (mixed,) = drawn
    lightlys = loss.BarlowTwinsLoss(model.config.redundancy_weight)
    z1, z2, z = (model.encode(x) for x in (x1, x2, mixed.images))
    torch.testing.assert_close(clean.loss, 0.3 * lightlys(z1, z2), rtol=1e-3, atol=0)
    expected = mixed.lam * lightlys(z, z2) + (1 - mixed.lam) * lightlys(z, z2[mixed.partner])
    torch.testing.assert_close(term.loss, 0.3 * expected, rtol=1e-3, atol=0)


def test_both_views_get_a_gradient() -> None:
    model, x1, x2 = build_tiny("barlow-twins", mix="none")
    x1.requires_grad_()
    x2.requires_grad_()
    (clean,) = model.terms(x1, x2, seeded())
    of_views = torch.autograd.grad(clean.loss, (x1, x2))
    assert all(gradient.abs().sum() > 0 for gradient in of_views)


def test_defaults_are_those_of_the_published_code_on_imagenet() -> None:
    config = make_config(method="barlow-twins", data="photographs")
    assert (config.batch_size, config.lr, config.optimizer) == (2048, 0.2 * 2048 / 256, "lars")
    assert (config.dim, config.redundancy_weight, config.weight_decay) == (8192, 0.0051, 1e-6)
    assert config.warmup * config.epochs == 10
