"""What every method promises, whichever it is; what sets one apart stands in its own file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    assert_same,
    build_tiny,
    gradients,
    interrupt_at,
    note_mixes,
    read_rows,
    run,
    seeded,
    tiny_config,
    tiny_images,
)
from torch import Tensor, nn

from mixmask import cli, mix_batch
from mixmask.runs.options import option
from mixmask.trainers.config import MIXTURES, RunConfig
from mixmask.trainers.files import load_config
from mixmask.trainers.methods import METHODS, Entry, make_config
from mixmask.trainers.mixtures import Method, Term, build_mixtures

# How many views each mixture makes of one.
VIEWS = {"none": 0, "both": 2}
# By name: the method, its options, its clean terms, and how many of the two views it mixes.
VARIANTS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "moco-v1": ("moco-v1", {}, 1, 1),
    "moco-v2": ("moco-v2", {}, 1, 1),
    "moco-v2 symmetric": ("moco-v2", {"symmetric": True}, 2, 2),
    "simclr": ("simclr", {}, 1, 1),
    "byol": ("byol", {}, 2, 1),
    "simsiam": ("simsiam", {}, 1, 1),
    "barlow-twins": ("barlow-twins", {}, 1, 1),
    "swav": ("swav", {"frozen": 0.0}, 1, 1),
}
# What lets twenty steps on a few photographs lower each loss.
_MOCO = {"lr": 0.01, "queue_size": 16, "encoder_momentum": 0.99}
LEARNING: dict[str, dict[str, Any]] = {
    "moco-v1": _MOCO,
    "moco-v2": _MOCO,
    "simclr": {"lr": 0.03},
    "byol": {"lr": 0.03},
    "simsiam": {"lr": 0.05},
    "barlow-twins": {"lr": 0.03},
    "swav": {"lr": 0.1},
}

every_method = pytest.mark.parametrize("method", METHODS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_mixture = pytest.mark.parametrize("mix", MIXTURES)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return tiny_images(16)


def build(variant: str, **options: Any) -> tuple[Any, Tensor, Tensor]:
    method, own, _, _ = VARIANTS[variant]
    return build_tiny(method, **own, **options)


def test_no_method_is_left_out_here() -> None:
    assert {method for method, *_ in VARIANTS.values()} == set(METHODS)


@every_mixture
@every_variant
def test_clean_terms_come_first_then_one_for_each_mixed_view(variant: str, mix: str) -> None:
    _, _, clean, mixed_views = VARIANTS[variant]
    model, x1, x2 = build(variant, mix=mix)
    drawn = note_mixes(model)
    terms = list(model.terms(x1, x2, seeded()))
    assert [term.lam is None for term in terms[:clean]] == [True] * clean
    assert len(terms) - clean == len(drawn) == mixed_views * VIEWS.get(mix, 1)
    for term, mixed in zip(terms[clean:], drawn, strict=True):
        assert term.lam is not None
        assert term.lam.shape == ()
        assert torch.equal(term.lam, mixed.lam.mean())
        assert 0 <= term.lam <= 1
    for term in terms:
        assert (term.loss.shape, term.loss.dtype) == ((), torch.float32)
        assert torch.isfinite(term.loss)
        assert term.loss.requires_grad


@every_mixture
@every_variant
def test_backward_term_by_term_equals_one_backward(variant: str, mix: str) -> None:
    model, x1, x2 = build(variant, mix=mix)
    model.eval()  # Running statistics would differ by the number of passes.
    for term in model.terms(x1, x2, seeded()):
        term.loss.backward()
    one_by_one = gradients(model)
    model.zero_grad()
    torch.stack([term.loss for term in model.terms(x1, x2, seeded())]).sum().backward()
    assert one_by_one
    torch.testing.assert_close(one_by_one, gradients(model), rtol=1e-4, atol=1e-6)


@every_variant
def test_a_term_is_computed_when_it_is_asked_for(variant: str) -> None:
    model, x1, x2 = build(variant, mix="both")
    passes = [0]
    model.backbone.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    counts = [passes[0] for _ in model.terms(x1, x2, seeded())]
    assert counts[-2] == counts[-1] - 1  # One pass more for the last mixed view.
    assert counts[0] < counts[-2]


@every_variant
def test_without_switch_the_partner_drops_out_of_the_mixed_term(variant: str) -> None:
    model, x1, x2 = build(variant, mix="mixmask")
    alone, _, _ = build(variant, mix="mixmask", switch=False)
    clean = VARIANTS[variant][2]
    both, one = (list(m.eval().terms(x1, x2, seeded())) for m in (model, alone))
    for with_partner, without in zip(both[:clean], one[:clean], strict=True):
        assert torch.equal(with_partner.loss, without.loss)
    for with_partner, without in zip(both[clean:], one[clean:], strict=True):
        assert torch.equal(with_partner.lam, without.lam)
        assert abs(with_partner.loss - without.loss) > 1e-2


@pytest.mark.parametrize("mix", ["mixmask", "both", "erase"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "barlow-twins"])
def test_masks_of_ones_own_give_each_image_its_own_share(variant: str, mix: str) -> None:
    ratio = (0.2, 0.8)
    model, x1, x2 = build(variant, mix=mix, per_sample=True, grid_size=8, ratio=ratio)
    drawn = note_mixes(model)
    terms = list(model.terms(x1, x2, seeded()))[VARIANTS[variant][2] :]
    masked = [(t, m) for t, m in zip(terms, drawn, strict=True) if m.lam.ndim]
    assert masked
    for term, mixed in masked:
        assert mixed.lam.shape == (8,)
        assert len(mixed.lam.unique()) > 1
        torch.testing.assert_close(term.lam, mixed.lam.mean())
        assert torch.isfinite(term.loss)


@pytest.mark.parametrize("mix", ["mixmask", "both", "erase"])
def test_barlow_twins_refuses_masks_of_ones_own(mix: str) -> None:
    with pytest.raises(ValueError, match="--per-sample is not supported by barlow-twins"):
        tiny_config("barlow-twins", mix=mix, per_sample=True)


@pytest.mark.parametrize("mix", ["none", "unmix", "mixup", "cutmix"])
def test_barlow_twins_takes_the_option_where_it_changes_nothing(mix: str) -> None:
    model, x1, x2 = build("barlow-twins", mix=mix, per_sample=True)
    assert len(list(model.terms(x1, x2, seeded()))) == (1 if mix == "none" else 2)


@every_variant
def test_the_generator_decides_what_is_mixed(variant: str) -> None:
    model, x1, x2 = build(variant, mix="mixmask", grid_size=8, ratio=(0.2, 0.8))
    model.eval()
    first, again, other = (
        [float(term.loss.detach()) for term in model.terms(x1, x2, seeded(seed))]
        for seed in (3, 3, 4)
    )
    clean = VARIANTS[variant][2]
    assert first == again
    assert first[:clean] == pytest.approx(other[:clean])
    assert first[clean:] != pytest.approx(other[clean:])


@every_variant
def test_further_crops_are_mixed_towards_the_same_targets(variant: str) -> None:
    model, x1, x2 = build(variant, mix="mixmask")
    drawn = note_mixes(model)
    extra = [x1.flip(3), x1.roll(5, dims=2)]
    terms = list(model.eval().terms(x1, x2, seeded(), extra=extra))
    _, _, clean, mixed = VARIANTS[variant]
    assert len(terms) == clean + mixed + 2
    sources = [x1, *extra, *[x2] * (mixed - 1)]
    for source, made in zip(sources, drawn, strict=True):
        assert torch.equal(made.images, mix_batch(source, made.mask, partner=made.partner).images)  # type: ignore[arg-type]
    # A crop that repeats the view under the same mask has the same loss.
    twin, x1, x2 = build(variant, mix="mixmask", grid_size=2)
    mask = torch.tensor([[True, False], [True, False]])
    twin.mixtures = [lambda images, _: mix_batch(images, mask)]
    losses = [term.loss for term in twin.eval().terms(x1, x2, seeded(), extra=[x1])][clean:]
    torch.testing.assert_close(losses[0], losses[1])


@every_variant
def test_mixed_views_have_a_size_of_their_own(variant: str) -> None:
    model, x1, x2 = build(variant, mix="both", mixed_size=24, grid_size=3)
    drawn = note_mixes(model)
    assert all(torch.isfinite(term.loss) for term in model.terms(x1, x2, seeded()))
    assert {made.images.shape for made in drawn} == {(8, 3, 24, 24)}


@every_variant
def test_mixed_views_may_replace_the_clean_queries(variant: str) -> None:
    model, x1, x2 = build(variant, mix="mixmask")
    alone, _, _ = build(variant, mix="mixmask", replace_clean=True)
    alone.load_state_dict(model.state_dict())
    clean = VARIANTS[variant][2]
    both, one = (list(m.eval().terms(x1, x2, seeded())) for m in (model, alone))
    assert len(one) == len(both) - clean
    for beside, instead in zip(both[clean:], one, strict=True):
        torch.testing.assert_close(beside.loss, instead.loss)
    # A run's health is still seen, by the mixed views.
    assert one[0].pair is not None
    z, target = one[0].pair
    assert z.shape == target.shape
    assert z.requires_grad
    assert not target.requires_grad
    for method in (model, alone):  # The queue and the teacher go on as ever.
        method.after_step(0.5)
    for name, tensor in alone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, model.state_dict()[name])
    step_without = list(alone.terms(x1, x2, seeded(), mix=False))
    assert len(step_without) == clean


def test_every_nth_step_has_mixed_views(images: Tensor, tmp_path: Path) -> None:
    config = tiny_config("moco-v2", mix_every=2, epochs=2, batch_size=16)
    steps: list[tuple[int, int]] = []
    terms = METHODS["moco-v2"].build.terms

    def noting(self: Any, *views: Any, extra: Sequence[Tensor], mix: bool) -> Iterator[Term]:
        listed = list(terms(self, *views, extra=extra, mix=mix))
        steps.append((len(listed), len(extra)))
        return iter(listed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS["moco-v2"].build, "terms", noting)
        run(config, images, tmp_path / "every")
        assert steps == [(2, 0), (1, 0)] * (len(steps) // 2)
        steps.clear()
        config = dataclasses.replace(config, extra_crops=2, mix_every=1, mix="erase")
        run(config, images, tmp_path / "extra")
    assert set(steps) == {(4, 2)}


def test_erasing_masks_channels_by_themselves_as_often_as_asked() -> None:
    images = torch.zeros(4, 3, 16, 16)
    for share, dims in ((0.0, {2}), (1.0, {4}), (0.5, {2, 4})):
        (erase,) = build_mixtures(tiny_config("moco-v2", mix="erase", channel_share=share))
        masks = [erase(images, seeded(seed)).mask for seed in range(12)]
        assert {mask.ndim for mask in masks if mask is not None} == dims
    (erase,) = build_mixtures(
        tiny_config("moco-v2", mix="erase", channel_share=1, per_sample=True, grid_size=8)
    )
    mask = erase(images, seeded()).mask
    assert mask is not None
    assert mask.shape == (4, 3, 16, 16)
    assert len(mask.flatten(2).flatten(0, 1).unique(dim=0)) > 6


@every_method
def test_interrupted_and_resumed_ends_in_the_same_weights(
    method: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(method, mix="both", epochs=2)
    whole = run(config, images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(3, METHODS[method].build, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, images, tmp_path / "parts")
    torch.manual_seed(12345)  # What another process would have drawn must not matter.
    config = load_config(tmp_path / "parts")
    assert_same(run(config, images, tmp_path / "parts", resume=True), whole)
    rows = [read_rows(tmp_path / name) for name in ("parts", "whole")]
    assert [row["epoch"] for row in rows[0]] == ["1", "2"]
    losses = [[float(row["loss"]) for row in part] for part in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_every_optimiser_resumes(
    optimizer: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("simsiam", optimizer=optimizer, epochs=2, lr=0.001)
    whole = run(config, images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(2, METHODS["simsiam"].build, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, images, tmp_path / "parts")
    assert_same(run(config, images, tmp_path / "parts", resume=True), whole)


@every_method
def test_a_few_epochs_lower_the_loss(method: str, tmp_path: Path) -> None:
    views = {"image_size": 16, "min_scale": 0.8, "jitter": 0.1, "hue": 0.0, "grey": 0.0}
    config = tiny_config(method, epochs=10, batch_size=16, **views, **LEARNING[method])
    run(config, tiny_images(32), tmp_path)
    # The first epoch fills MoCo's queue, which makes its task harder.
    losses = [float(row["loss"]) for row in read_rows(tmp_path)[1:]]
    assert sum(losses[-3:]) < sum(losses[:3])


@dataclass(frozen=True)
class ToyConfig(RunConfig):
    width: int = option(4, "size of the toy's embedding", low=1)


class Toy(Method):
    """Everything that a method needs to be."""

    def __init__(self, config: ToyConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.head = nn.Linear(self.features, config.width)
        self.told: list[float] = []

    def encode(self, images: Tensor) -> Tensor:
        z: Tensor = self.head(self.backbone(images))
        return z

    def terms(
        self,
        x1: Tensor,
        x2: Tensor,
        generator: torch.Generator,
        *,
        extra: Sequence[Tensor] = (),
        mix: bool = True,
    ) -> Iterator[Term]:
        target = self.encode(x2)
        yield Term(nn.functional.mse_loss(self.encode(x1), target))
        if mix:
            yield from self.mixed_terms([x1, *extra], nn.functional.mse_loss, target, generator)

    def after_step(self, done: float) -> None:
        self.told.append(done)


def test_a_new_method_is_a_class_and_a_line(
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    presets: dict[str, dict[str, Any]] = {"clothing64": {"lr": 0.07}}
    monkeypatch.setitem(METHODS, "toy", Entry(Toy, ToyConfig, {"hue": 0.0}, presets))
    config = make_config(method="toy", width=5, batch_size=8, epochs=2, mix="both")
    assert (config.lr, config.hue, config.arch) == (0.07, 0.0, "narrow")
    model = run(config, images, tmp_path)
    assert model.told == pytest.approx([0.25, 0.5, 0.75, 1])
    assert model.head.weight.shape == (5, 128)
    assert len(read_rows(tmp_path)) == 2
    # What is written says where the images were, too.
    assert load_config(tmp_path) == dataclasses.replace(config, stream="never")
    with pytest.raises(ValueError, match=r"--width is not supported by byol \(only by toy\);"):
        make_config(method="byol", width=5)
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(["pretrain", "--help"]) == 0
    assert "size of the toy's embedding [4] (toy)" in capsys.readouterr().out
