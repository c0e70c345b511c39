"""The order and the algebra of MoCo's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import build_tiny, note_mixes, seeded
from torch import Tensor

from mixmask.trainers.methods import build_method, make_config
from mixmask.trainers.methods.moco import MoCo, MoCoConfig

TINY: dict[str, Any] = {"batch_size": 8, "queue_size": 13, "dim": 16, "epochs": 2}


def build(**options: Any) -> tuple[MoCo, Tensor, Tensor]:
    torch.manual_seed(0)
    model: MoCo = build_method(make_config(**(TINY | options)))  # type: ignore[assignment]
    return model, torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)


def collect_gradients(model: MoCo) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_terms_equal_the_formula() -> None:
    model, x_q, x_k = build(mix="mixmask")
    clean, mixed = [t.loss for t in model.terms(x_q, x_k, torch.Generator().manual_seed(3))]

    def nce(z: Tensor, target: Tensor) -> Tensor:
        positive = (z * target).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, z @ model.queue.keys.T], dim=1) / model.config.temperature
        return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long))

    generator = torch.Generator().manual_seed(3)
    k = model.encode_keys(x_k, generator)
    m = model.mixtures[0](x_q, generator)
    z = model.encode(m.images)
    torch.testing.assert_close(clean, nce(model.encode(x_q), k))
    torch.testing.assert_close(mixed, m.lam * nce(z, k) + (1 - m.lam) * nce(z, k[m.partner]))


@pytest.mark.parametrize("switch", [True, False])
def test_symmetric_terms_are_cross_entropies_of_each_view(switch: bool) -> None:
    model, x1, x2 = build_tiny("moco-v2", symmetric=True, mix="both", switch=switch)
    model.eval()
    with torch.no_grad():
        model.key_head[-1].weight.add_(0.1 * torch.randn_like(model.key_head[-1].weight))
    drawn = note_mixes(model)
    first, second, *mixed_terms = model.terms(x1, x2, seeded())

    def nce(z: Tensor, target: Tensor) -> Tensor:
        positive = (z * target).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, z @ model.queue.keys.T], dim=1) / model.config.temperature
        return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long))

    k1, k2 = (F.normalize(model.key_head(model.key_backbone(x)), dim=1) for x in (x1, x2))
    torch.testing.assert_close(first.loss, nce(model.encode(x1), k2))
    torch.testing.assert_close(second.loss, nce(model.encode(x2), k1))
    assert len(drawn) == 4
    for term, mixed, keys in zip(mixed_terms, drawn, [k2, k2, k1, k1], strict=True):
        z = model.encode(mixed.images)
        expected = mixed.lam * nce(z, keys)
        if switch:
            expected = expected + (1 - mixed.lam) * nce(z, keys[mixed.partner])
        torch.testing.assert_close(term.loss, expected)


def test_symmetric_enqueues_the_keys_of_both_views_once() -> None:
    model, x1, x2 = build_tiny("moco-v2", symmetric=True, mix="both", encoder_momentum=1.0)
    model.eval()
    queue = model.queue.keys.clone()
    list(model.terms(x1, x2, seeded()))
    assert torch.equal(model.queue.keys, queue)
    start = int(model.queue.position)
    model.after_step(0.5)
    assert int(model.queue.position) == start + 16
    keys = F.normalize(model.key_head(model.key_backbone(torch.cat([x1, x2]))), dim=1)
    torch.testing.assert_close(model.queue.keys[start : start + 16], keys)
    assert torch.equal(model.queue.keys[start + 16 :], queue[start + 16 :])


def test_backward_term_by_term_equals_one_backward() -> None:
    model, x_q, x_k = build(mix="both")
    model.eval()  # Running statistics would differ by the number of passes.
    for term in model.terms(x_q, x_k, torch.Generator().manual_seed(1)):
        term.loss.backward()
    one_by_one = collect_gradients(model)
    model.zero_grad()
    terms = list(model.terms(x_q, x_k, torch.Generator().manual_seed(1)))
    torch.stack([term.loss for term in terms]).sum().backward()
    for ours, reference in zip(one_by_one, collect_gradients(model), strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_step_enqueues_once_and_moves_the_key_encoder_once() -> None:
    model, x_q, x_k = build(mix="both", encoder_momentum=0.9)
    queue = model.queue.keys.clone()
    for term in model.terms(x_q, x_k, torch.Generator()):
        term.loss.backward()
        assert torch.equal(model.queue.keys, queue)
    keys = torch.cat(model.new_keys)
    assert keys is not None
    with torch.no_grad():
        model.head[0].weight.add_(1)  # type: ignore[index]
    before = model.key_head[0].weight.clone()  # type: ignore[index]
    model.after_step(0.5)
    assert torch.equal(model.queue.keys[:8], keys)
    assert torch.equal(model.queue.keys[8:], queue[8:])
    after = model.key_head[0].weight  # type: ignore[index]
    torch.testing.assert_close(after, before + 0.1)


def test_after_step_refuses_to_run_twice() -> None:
    model, x_q, x_k = build(mix="none")
    list(model.terms(x_q, x_k, torch.Generator()))
    model.after_step(0.5)
    with pytest.raises(AssertionError, match="needs all terms of the step first"):
        model.after_step(0.5)


def test_keys_get_no_gradient() -> None:
    model, x_q, x_k = build()
    for term in model.terms(x_q, x_k, torch.Generator()):
        term.loss.backward()
    assert all(p.grad is None for p in model.key_backbone.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_shuffled_keys_come_back_in_order() -> None:
    model, _, x_k = build(bn_splits=4)
    model.eval()  # Then statistics do not depend on the order.
    shuffled = model.encode_keys(x_k, torch.Generator().manual_seed(0))
    plain = F.normalize(model.key_head(model.key_backbone(x_k)), dim=1)
    torch.testing.assert_close(shuffled, plain)


def test_shuffling_hides_which_images_share_statistics() -> None:
    model, _, x_k = build(bn_splits=4)
    first = model.encode_keys(x_k, torch.Generator().manual_seed(0))
    second = model.encode_keys(x_k, torch.Generator().manual_seed(1))
    assert not torch.allclose(first, second)


def test_no_switch_drops_the_partner() -> None:
    losses = []
    for switch in (True, False):
        model, x_q, x_k = build(mix="mixmask", switch=switch)
        losses.append(list(model.terms(x_q, x_k, torch.Generator().manual_seed(0)))[1].loss)
    assert losses[1] < 0.7 * losses[0]


def test_version_one_has_a_linear_head() -> None:
    config: MoCoConfig = make_config(method="moco-v1", **TINY)
    assert isinstance(build_method(config).head, torch.nn.Linear)
    assert (config.temperature, config.schedule) == (0.07, "step")


@pytest.mark.parametrize("mix", ["none", "mixmask", "unmix", "both", "erase"])
def test_steps_lower_the_loss(mix: str) -> None:
    model, x_q, x_k = build(mix=mix)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):  # The same views and keys each time, so the loss has to fall.
        total = 0.0
        for term in model.terms(x_q, x_k, torch.Generator().manual_seed(0)):
            term.loss.backward()
            total += float(term.loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses[-1] < 0.8 * losses[0]
