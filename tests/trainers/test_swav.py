"""SwAV: each view predicts the other's code, and prototypes rest at the start."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import (
    assert_same,
    build_tiny,
    interrupt_at,
    note_mixes,
    run,
    seeded,
    tiny_config,
    tiny_images,
)
from torch import Tensor

from mixmask.trainers.methods import make_config
from mixmask.trainers.methods.swav import SwAV


def paper_codes(scores: Tensor, epsilon: float) -> Tensor:
    """Three rounds of Sinkhorn-Knopp on exp(scores / ε) (SwAV, eq. 3-5), (N, K) float64."""
    q = (scores.detach().double() / epsilon).exp()
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def paper_rows(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each prediction (SwAV, eq. 2), (N,) float64."""
    exponentials = (scores.double() / temperature).exp()
    return -(codes * (exponentials / exponentials.sum(dim=1, keepdim=True)).log()).sum(dim=1)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("switch", [True, False])
def test_terms_are_the_papers_formula(switch: bool, per_sample: bool) -> None:
    tau, epsilon = 0.2, 0.1
    model, x1, x2 = build_tiny(
        "swav", mix="both", switch=switch, per_sample=per_sample, temperature=tau,
        epsilon=epsilon, ratio=(0.2, 0.8),
    )  # fmt: skip
    model.eval()
    drawn = note_mixes(model)
    clean, *mixed_terms = model.terms(x1, x2, seeded())

    def score(x: Tensor) -> Tensor:
        z = F.normalize(model.projector(model.backbone(x)), dim=1)
        return z @ F.normalize(model.prototypes, dim=1).T

    s1, s2 = score(x1), score(x2)
    codes1, codes2 = paper_codes(s1, epsilon), paper_codes(s2, epsilon)
    expected = paper_rows(s1, codes2, tau).mean() + paper_rows(s2, codes1, tau).mean()
    torch.testing.assert_close(clean.loss.double(), expected / 2, rtol=1e-5, atol=0)
    for term, mixed in zip(mixed_terms, drawn, strict=True):
        s, lam = score(mixed.images), mixed.lam.double()
        expected = lam * paper_rows(s, codes2, tau)
        if switch:
            expected = expected + (1 - lam) * paper_rows(s, codes2[mixed.partner], tau)
        torch.testing.assert_close(term.loss.double(), expected.mean(), rtol=1e-5, atol=0)


def test_the_clean_term_is_lightlys() -> None:
    loss = pytest.importorskip(
        "lightly.loss", reason="lightly is not installed; pip install '.[lightly]'"
    )
    model, x1, x2 = build_tiny("swav", mix="none")
    model.eval()
    (clean,) = model.terms(x1, x2, seeded())
    expected = loss.SwaVLoss()([model.encode(x1), model.encode(x2)], [])
    torch.testing.assert_close(clean.loss, expected.squeeze())


def test_resting_prototypes_get_no_gradient_and_all_else_does() -> None:
    for frozen in (0.0, 0.5):
        model, x1, x2 = build_tiny("swav", frozen=frozen)
        for term in model.terms(x1, x2, seeded()):
            term.loss.backward()
        moved = {name for name, p in model.named_parameters() if (p.grad != 0).any()}
        everything = {name for name, _ in model.named_parameters()}
        assert everything - moved == ({"prototypes"} if frozen else set())


@pytest.mark.parametrize("frozen, steps_at_rest", [(0.0, 0), (0.01, 1), (0.5, 2), (1.0, 4)])
def test_prototypes_rest_for_their_share_of_the_run_and_then_move(
    frozen: float, steps_at_rest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    after_step = SwAV.after_step

    def noting(self: SwAV, done: float) -> None:
        seen.append(F.normalize(self.prototypes.detach(), dim=1))
        after_step(self, done)

    monkeypatch.setattr(SwAV, "after_step", noting)
    config = tiny_config("swav", frozen=frozen, epochs=2, warmup=0.0, lr=1.0)
    run(config, tiny_images(16), tmp_path)
    assert len(seen) == 4
    moves = [float((b - a).abs().max()) for a, b in pairwise(seen)]
    # The first step's move is not among them.
    expected = [step + 1 > steps_at_rest for step in range(1, 4)]
    # Weight decay shortens prototypes also at rest, which rounds their direction.
    assert [move > 1e-6 for move in moves] == expected


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_resumed_around_the_waking_ends_in_the_same_weights(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tiny_images(16)
    config = tiny_config("swav", frozen=0.5, epochs=2, lr=1.0)
    whole = run(config, images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(step, SwAV, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, images, tmp_path / "parts")
    assert_same(run(config, images, tmp_path / "parts", resume=True), whole)
    assert float(whole.awake) == 1


def test_codes_get_no_gradient() -> None:
    model, x1, x2 = build_tiny("swav", mix="mixmask", frozen=0.0)
    x2.requires_grad_()
    _, mixed = model.terms(x1, x2, seeded())
    found: tuple[Any, ...] = torch.autograd.grad(mixed.loss, x2, allow_unused=True)
    assert found == (None,)


def test_defaults_are_those_of_the_paper_on_imagenet() -> None:
    config = make_config(method="swav", data="photographs")
    assert (config.batch_size, config.lr, config.optimizer) == (4096, 4.8, "lars")
    assert (config.prototypes, config.temperature, config.epsilon) == (3000, 0.1, 0.05)
    assert (config.dim, config.hidden) == (128, 2048)
