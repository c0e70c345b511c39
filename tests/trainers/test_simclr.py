"""SimCLR: both views in one batch, each image against all others of both."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_runs import build_tiny, note_mixes, seeded
from torch import Tensor, nn

from mixmask.trainers.methods import make_config


def paper_rows(z: Tensor, target: Tensor, temperature: float) -> list[float]:
    """Loss of each image (SimCLR, eq. 1), averaged over both of its views."""
    rows = torch.nn.functional.normalize(torch.cat([z, target]).detach().double(), dim=1)
    n = len(z)

    def one(i: int, j: int) -> float:
        others = [math.exp(rows[i] @ rows[k] / temperature) for k in range(2 * n) if k != i]
        return -math.log(math.exp(rows[i] @ rows[j] / temperature) / sum(others))

    return [(one(i, i + n) + one(i + n, i)) / 2 for i in range(n)]


def imix_rows(z: Tensor, target: Tensor, temperature: float) -> list[float]:
    """Loss of each image against the other view's images alone (i-Mix, eq. 3)."""
    z, target = (nn.functional.normalize(x.detach().double(), dim=1) for x in (z, target))
    exponentials = (z @ target.T / temperature).exp()
    return [-math.log(exponentials[i, i] / exponentials[i].sum()) for i in range(len(z))]


@pytest.mark.parametrize("switch", [True, False])
def test_terms_are_lightlys_nt_xent(switch: bool) -> None:
    loss = pytest.importorskip(
        "lightly.loss", reason="lightly is not installed; pip install '.[lightly]'"
    )
    model, x1, x2 = build_tiny("simclr", mix="both", switch=switch, temperature=0.3)
    model.eval()
    drawn = note_mixes(model)
    clean, *mixed_terms = model.terms(x1, x2, seeded())
    nt_xent = loss.NTXentLoss(temperature=0.3)
    z1, z2 = model.encode(x1), model.encode(x2)
    torch.testing.assert_close(clean.loss, nt_xent(z1, z2))
    assert len(drawn) == 2
    for term, mixed in zip(mixed_terms, drawn, strict=True):
        z = model.encode(mixed.images)
        expected = mixed.lam * nt_xent(z, z2)
        if switch:
            expected = expected + (1 - mixed.lam) * nt_xent(z, z2[mixed.partner])
        torch.testing.assert_close(term.loss, expected)


@pytest.mark.parametrize("one_directional", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_terms_are_the_papers_formula(per_sample: bool, one_directional: bool) -> None:
    model, x1, x2 = build_tiny(
        "simclr", per_sample=per_sample, ratio=(0.2, 0.8), one_directional=one_directional
    )
    model.eval()
    (drawn, terms) = note_mixes(model), list(model.terms(x1, x2, seeded()))
    (mixed,), tau = drawn, model.config.temperature
    z1, z2, z = (model.encode(x) for x in (x1, x2, mixed.images))
    clean = paper_rows(z1, z2, tau)
    assert terms[0].loss.item() == pytest.approx(sum(clean) / 8, rel=1e-5)
    rows = imix_rows if one_directional else paper_rows
    shares = mixed.lam.expand(8).tolist()
    own, partners = rows(z, z2, tau), rows(z, z2[mixed.partner], tau)
    expected = [lam * a + (1 - lam) * b for lam, a, b in zip(shares, own, partners, strict=True)]
    assert terms[1].loss.item() == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_both_views_share_their_statistics_in_one_batch() -> None:
    model, x1, x2 = build_tiny("simclr", mix="none")
    x2 = 3 * x2 + 1  # Statistics of its own would hide the difference.
    together, apart = copy.deepcopy(model), copy.deepcopy(model)
    before = int(model.backbone.bn1.num_batches_tracked)
    (clean,) = model.terms(x1, x2, seeded())
    assert int(model.backbone.bn1.num_batches_tracked) == before + 1
    z = together.encode(torch.cat([x1, x2]))
    expected = sum(paper_rows(z[:8], z[8:], model.config.temperature)) / 8
    assert clean.loss.item() == pytest.approx(expected, rel=1e-5)
    of_their_own = sum(paper_rows(apart.encode(x1), apart.encode(x2), model.config.temperature)) / 8
    assert abs(clean.loss.item() - of_their_own) > 1e-2


def test_no_gradient_reaches_the_targets_of_a_mixed_term() -> None:
    model, x1, x2 = build_tiny("simclr", mix="mixmask")
    x2.requires_grad_()
    clean, mixed = model.terms(x1, x2, seeded())
    (of_mixed,) = torch.autograd.grad(mixed.loss, x2, retain_graph=True, allow_unused=True)
    (of_clean,) = torch.autograd.grad(clean.loss, x2)
    assert of_mixed is None
    assert of_clean.abs().sum() > 0


def test_defaults_are_those_of_the_paper_on_imagenet() -> None:
    config = make_config(method="simclr", data="photographs")
    assert (config.batch_size, config.lr, config.optimizer) == (4096, 0.3 * 4096 / 256, "lars")
    assert (config.temperature, config.dim, config.weight_decay) == (0.1, 128, 1e-6)
    assert (config.jitter, config.hue, config.min_scale) == (0.8, 0.2, 0.08)
    assert config.warmup * config.epochs == 10
