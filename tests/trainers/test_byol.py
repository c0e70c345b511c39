"""BYOL: a predictor online, and a target that follows ever more slowly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import build_tiny, gradients, note_mixes, run, seeded, tiny_config, tiny_images
from torch import Tensor

from mixmask.trainers.methods import make_config
from mixmask.trainers.methods.byol import BYOL


def build(**options: Any) -> tuple[BYOL, Tensor, Tensor]:
    """Build a model whose target has gone its own way, and two views."""
    model, x1, x2 = build_tiny("byol", **options)
    with torch.no_grad():
        for part in (model.target_backbone, model.target_projector):
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x1, x2


def target_parameters(model: BYOL) -> dict[str, Tensor]:
    return {
        name.removeprefix("target_"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.startswith("target_")
    }


def paper_rows(p: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the unit vectors (BYOL, eq. 2), (N,) float64."""
    p, target = p.double(), target.double()
    p, target = p / p.norm(dim=1, keepdim=True), target / target.norm(dim=1, keepdim=True)
    return ((p - target) ** 2).sum(dim=1)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("switch", [True, False])
def test_terms_are_the_papers_formula(switch: bool, per_sample: bool) -> None:
    model, x1, x2 = build(mix="both", switch=switch, per_sample=per_sample, ratio=(0.2, 0.8))
    model.eval()
    drawn = note_mixes(model)
    first, second, *mixed_terms = model.terms(x1, x2, seeded())

    def predict(x: Tensor) -> Tensor:
        p: Tensor = model.predictor(model.projector(model.backbone(x)))
        return p

    t1, t2 = (model.target_projector(model.target_backbone(x)) for x in (x1, x2))
    assert paper_rows(t2, model.projector(model.backbone(x2))).mean() > 1e-2
    torch.testing.assert_close(first.loss.double(), paper_rows(predict(x1), t2).mean())
    torch.testing.assert_close(second.loss.double(), paper_rows(predict(x2), t1).mean())
    for term, mixed in zip(mixed_terms, drawn, strict=True):
        p, lam = predict(mixed.images), mixed.lam.double()
        expected = lam * paper_rows(p, t2)
        if switch:
            expected = expected + (1 - lam) * paper_rows(p, t2[mixed.partner])
        torch.testing.assert_close(term.loss.double(), expected.mean())


def test_terms_are_lightlys_cosine() -> None:
    loss = pytest.importorskip(
        "lightly.loss", reason="lightly is not installed; pip install '.[lightly]'"
    )
    model, x1, x2 = build(mix="mixmask")
    model.eval()
    (mixed,), (first, second, third) = note_mixes_of(model, x1, x2)
    cosine = loss.NegativeCosineSimilarity()
    p1, p2, p = (model.encode(x) for x in (x1, x2, mixed.images))
    t1, t2 = model.encode_targets(x1), model.encode_targets(x2)
    torch.testing.assert_close(first.loss, 2 + 2 * cosine(p1, t2))
    torch.testing.assert_close(second.loss, 2 + 2 * cosine(p2, t1))
    of_both = mixed.lam * cosine(p, t2) + (1 - mixed.lam) * cosine(p, t2[mixed.partner])
    torch.testing.assert_close(third.loss, 2 + 2 * of_both)


def note_mixes_of(model: BYOL, x1: Tensor, x2: Tensor) -> tuple[list[Any], list[Any]]:
    drawn = note_mixes(model)
    terms = list(model.terms(x1, x2, seeded()))
    return drawn, terms


def test_the_target_gets_no_gradient_and_all_else_does() -> None:
    model, x1, x2 = build(mix="mixmask")
    x1.requires_grad_()
    for term in model.terms(x1, x2, seeded()):
        term.loss.backward()
    with_gradient = set(gradients(model))
    target = {name for name, _ in model.named_parameters() if name.startswith("target_")}
    assert target
    assert with_gradient == {name for name, _ in model.named_parameters()} - target
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in target)


def test_the_target_has_no_predictor() -> None:
    model, _, x2 = build(mix="none")
    model.eval()
    before = model.encode_targets(x2)
    with torch.no_grad():
        for parameter in model.predictor.parameters():
            parameter.add_(1)
    assert torch.equal(model.encode_targets(x2), before)
    predictor = {name: p.clone() for name, p in model.predictor.named_parameters()}
    model.after_step(0.5)
    assert all(torch.equal(p, predictor[name]) for name, p in model.predictor.named_parameters())


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_target_follows_with_a_momentum_that_rises_along_a_cosine(done: float) -> None:
    model, _, _ = build(encoder_momentum=0.9)
    before = target_parameters(model)
    model.after_step(done)
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * done) + 1) / 2
    online = dict(model.named_parameters())
    after = target_parameters(model)
    expected = {name: momentum * t + (1 - momentum) * online[name] for name, t in before.items()}
    torch.testing.assert_close(after, expected)
    moved = [not torch.equal(after[name], before[name]) for name in before]
    assert any(moved) == (done < 1)


def test_the_target_of_a_run_follows_by_the_share_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, dict[str, Tensor], dict[str, Tensor]]] = []
    after_step = BYOL.after_step

    def noting(self: BYOL, done: float) -> None:
        online = {name: p.detach().clone() for name, p in self.named_parameters()}
        before = target_parameters(self)
        after_step(self, done)
        steps = len(seen) + 1
        momentum = 1 - 0.1 * (math.cos(math.pi * steps / 4) + 1) / 2
        expected = {
            name: momentum * t + (1 - momentum) * online[name] for name, t in before.items()
        }
        seen.append((done, target_parameters(self), expected))

    monkeypatch.setattr(BYOL, "after_step", noting)
    run(tiny_config("byol", epochs=2, encoder_momentum=0.9), tiny_images(16), tmp_path)
    assert [done for done, _, _ in seen] == pytest.approx([0.25, 0.5, 0.75, 1])
    for _, found, expected in seen:
        torch.testing.assert_close(found, expected)


def test_the_targets_statistics_are_its_own() -> None:
    model, x1, x2 = build(mix="none")
    buffers = {name: b.clone() for name, b in model.named_buffers() if "running_mean" in name}
    list(model.terms(x1, x2 + 1, seeded()))
    found = {name: b for name, b in model.named_buffers() if "running_mean" in name}
    assert all(not torch.equal(found[name], buffers[name]) for name in buffers)
    before = {name: b.clone() for name, b in found.items()}
    model.after_step(0.0)
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_defaults_are_those_of_the_paper_on_imagenet() -> None:
    config = make_config(method="byol", data="photographs")
    assert (config.batch_size, config.lr, config.optimizer) == (4096, 0.3 * 4096 / 256, "lars")
    assert (config.hidden, config.dim, config.encoder_momentum) == (4096, 256, 0.99)
    assert config.warmup * config.epochs == pytest.approx(10, rel=0.02)
