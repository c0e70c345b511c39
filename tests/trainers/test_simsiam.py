"""SimSiam: the other view's projection as a constant, and a predictor that learns steadily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import build_tiny, gradients, note_mixes, run, seeded, tiny_config, tiny_images
from torch import Tensor, nn

from mixmask import MixedBatch
from mixmask.trainers import run as run_module
from mixmask.trainers.methods import make_config
from mixmask.trainers.methods.simsiam import SimSiam


def formula(
    model: SimSiam, views: tuple[Tensor, Tensor, Tensor], mixed: MixedBatch, *, stop: bool
) -> Tensor:
    """Eq. 2 and the λ-weighted mixed term, with or without the stop-gradient."""
    z1, z2, z = (model.projector(model.backbone(x)) for x in views)
    p1, p2, p = (model.predictor(rows) for rows in (z1, z2, z))
    if stop:
        z1, z2 = z1.detach(), z2.detach()

    def distance(p: Tensor, z: Tensor) -> Tensor:
        return -F.cosine_similarity(p, z, dim=1)

    clean = (distance(p1, z2) / 2 + distance(p2, z1) / 2).mean()
    lam, others = mixed.lam, z2[mixed.partner]
    return clean + (lam * distance(p, z2) + (1 - lam) * distance(p, others)).mean()


@pytest.mark.parametrize("switch", [True, False])
def test_terms_are_lightlys_cosine(switch: bool) -> None:
    loss = pytest.importorskip(
        "lightly.loss", reason="lightly is not installed; pip install '.[lightly]'"
    )
    model, x1, x2 = build_tiny("simsiam", mix="both", switch=switch)
    model.eval()
    drawn = note_mixes(model)
    clean, *mixed_terms = model.terms(x1, x2, seeded())
    cosine = loss.NegativeCosineSimilarity()
    z1, z2 = model.project(x1), model.project(x2)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    torch.testing.assert_close(clean.loss, (cosine(p1, z2) + cosine(p2, z1)) / 2)
    assert len(drawn) == 2
    for term, mixed in zip(mixed_terms, drawn, strict=True):
        p = model.predictor(model.project(mixed.images))
        expected = mixed.lam * cosine(p, z2)
        if switch:
            expected = expected + (1 - mixed.lam) * cosine(p, z2[mixed.partner])
        torch.testing.assert_close(term.loss, expected)


@pytest.mark.parametrize("per_sample", [True, False])
def test_no_gradient_flows_through_the_targets(per_sample: bool) -> None:
    model, x1, x2 = build_tiny("simsiam", per_sample=per_sample, ratio=(0.2, 0.8))
    model.eval()
    drawn = note_mixes(model)
    for term in model.terms(x1, x2, seeded()):
        term.loss.backward()
    ours, (mixed,) = gradients(model), drawn
    found: dict[str, dict[str, Tensor]] = {}
    for stop in (True, False):
        model.zero_grad()
        loss = formula(model, (x1, x2, mixed.images), mixed, stop=stop)
        torch.autograd.backward(loss)
        found["stopped" if stop else "through"] = gradients(model)
    torch.testing.assert_close(ours, found["stopped"], rtol=1e-4, atol=1e-6)
    weight = "projector.0.weight"
    assert (ours[weight] - found["through"][weight]).abs().max() > 1e-2 * ours[weight].abs().max()


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_the_predictor_keeps_its_learning_rate_through_a_run(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[dict[int, float]] = []
    built: list[torch.optim.Optimizer] = []
    build, after_step = run_module.build_optimizer, SimSiam.after_step

    def keeping(model: nn.Module, config: Any) -> torch.optim.Optimizer:
        built.append(build(model, config))
        return built[-1]

    def noting(self: SimSiam, done: float) -> None:
        groups = built[-1].param_groups
        rates.append({id(p): group["lr"] for group in groups for p in group["params"]})
        after_step(self, done)

    monkeypatch.setattr(run_module, "build_optimizer", keeping)
    monkeypatch.setattr(SimSiam, "after_step", noting)
    config = tiny_config("simsiam", epochs=2, lr=0.01, warmup=0.0, optimizer=optimizer)
    model = run(config, tiny_images(16), tmp_path)
    predictor = {id(p) for p in model.predictor.parameters()}
    assert len(rates) == 4
    assert set(rates[0]) == {id(p) for p in model.parameters()}
    cosine = [0.01, 0.01 * (2 + 2**0.5) / 4, 0.005, 0.01 * (2 - 2**0.5) / 4]
    for step, by_parameter in enumerate(rates):
        constant = {rate for p, rate in by_parameter.items() if p in predictor}
        others = {rate for p, rate in by_parameter.items() if p not in predictor}
        assert constant == {0.01}
        assert list(others) == pytest.approx([cosine[step]])


def test_the_projector_ends_in_a_norm_without_weights() -> None:
    model, x1, _ = build_tiny("simsiam")
    assert isinstance(model.projector[-1], nn.BatchNorm1d)
    assert not model.projector[-1].affine
    z = model.train().project(x1)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(16), atol=1e-5, rtol=0)


def test_defaults_are_those_of_the_paper_on_imagenet() -> None:
    config = make_config(method="simsiam", data="photographs")
    assert (config.batch_size, config.lr, config.optimizer) == (512, 0.05 * 512 / 256, "sgd")
    assert (config.dim, config.hidden, config.weight_decay, config.epochs) == (2048, 512, 1e-4, 100)
