"""stable-pretraining's own methods, against eq. 4 written out in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stable_methods import (
    METHODS,
    N,
    build,
    build_module,
    build_tiny,
    draw_views,
    run_step,
    spt,
    student_of,
    takes_batches,
)
from torch import Tensor, nn

import mixmask

pytestmark = pytest.mark.filterwarnings("ignore")
wrap = pytest.importorskip("mixmask.integrations.stable_pretraining").wrap

pytest.importorskip("loguru").logger.disable("stable_pretraining")


STEPS = 3
MIX = mixmask.MixMask(grid_size=4, ratio=(0.3, 0.7))
EACH = mixmask.MixMask(grid_size=4, ratio=(0.3, 0.7), per_sample=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "one view": {"mixing": MIX},
    "both views": {"mixing": MIX, "symmetric": True},
    "without switch": {"mixing": MIX, "switch": False},
    "mask per sample": {"mixing": EACH},
}


def _nt_xent_row(z: Tensor, target: Tensor, temperature: float, i: int) -> Tensor:
    rows = F.normalize(torch.cat([z, target]), dim=1)
    total = z.new_zeros(())
    for row, positive in ((i, N + i), (N + i, i)):
        logits = rows[row] @ rows.T / temperature
        rest = torch.cat([logits[:row], logits[row + 1 :]])
        total = total + (rest.logsumexp(dim=0) - logits[positive]) / 2
    return total


def _row(name: str, module: Any, z: Tensor, target: Tensor, i: int, negatives: Tensor) -> Tensor:
    """One image's loss, by hand."""
    if "imclr" in name or name in ("SimCLR", "both at once", "own class"):
        return _nt_xent_row(z, target, 0.3, i)
    cosine = (F.normalize(z[i], dim=0) * F.normalize(target[i], dim=0)).sum()
    if "byol" in name.lower():
        return 2 - 2 * cosine
    if name == "SimSiam":
        return -cosine
    if "vicreg" in name.lower():
        return 10 * (z[i] - target[i]).square().mean()
    query = F.normalize(z[i], dim=0)
    logits = torch.cat([(query @ target[i])[None], negatives @ query]) / module.temperature
    loss: Tensor = logits.logsumexp(dim=0) - logits[0]
    return loss


def _embed(module: Any, x: Tensor, part: Callable[[Any], Any] = student_of) -> Tensor:
    z: Tensor = part(module.projector)(part(module.backbone)(x))
    return z


def _targets(name: str, module: Any, views: list[Tensor]) -> list[Tensor]:
    if "byol" in name.lower():
        with torch.no_grad():
            return [_embed(module, x, lambda part: part.teacher) for x in reversed(views)]
    if name == "both at once":
        return list(reversed(_embed(module, torch.cat(views)).chunk(2)))
    targets = [_embed(module, x) for x in reversed(views)]
    return [target.detach() for target in targets] if name == "SimSiam" else targets


def _term(
    name: str, module: Any, z: Tensor, target: Tensor, share: Tensor, negatives: Tensor
) -> Tensor:
    """The losses of all images towards a target, by their shares."""
    if "arlow" in name:
        whole: Tensor = share[0] * module.barlow_loss(z, target)
        return whole
    total = z.new_zeros(())
    for i in range(N):
        total = total + share[i] * _row(name, module, z, target, i, negatives) / N
    return total


def _eq_4(
    name: str, module: Any, views: list[Tensor], keys: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Write the mixed term out: masks are drawn as they are to be drawn, the rest is by hand."""

    predicts = "byol" in name.lower() or name == "SimSiam"
    negatives = torch.zeros(0, 4)
    if keys is not None:
        # Theirs keeps keys in float32, and passes them through it where it keeps none.
        negatives = module.queue.get() if module.queue.max_length else keys.float()
        negatives = negatives.double()
    targets = [keys] if keys is not None else _targets(name, module, views)
    terms = []
    for view in range(1 + options.get("symmetric", False)):
        record = options["mixing"](views[view])
        own = record.mask.double().expand(N, 32, 32)
        images = own[:, None] * views[view]
        images = images + (1 - own)[:, None] * views[view][record.partner]
        z = _embed(module, images)
        z = module.predictor(z) if predicts else z
        lam, target = own.mean(dim=(1, 2)), targets[view]
        other = target[record.partner]
        term = _term(name, module, z, target, lam, negatives)
        if options.get("switch", True):
            term = term + _term(name, module, z, other, 1 - lam, negatives)
        if "vicreg" in name.lower():
            term = term + module.vicreg_loss.vcreg_loss(z)
        terms.append(term)
    return torch.stack(terms).mean()


CASES = [
    (name, option)
    for name in METHODS
    for option in OPTIONS
    if not ("arlow" in name and option == "mask per sample")
    and not ("MoCo" in name and option == "both views")
]


@pytest.mark.parametrize("name, option", CASES)
def test_three_steps_are_theirs_plus_the_mixed_term(name: str, option: str) -> None:
    options = OPTIONS[option]
    plain, module = build(name), build(name)
    assert wrap(module, **options) is module
    state = plain.state_dict()
    assert module.state_dict().keys() == state.keys()
    # With ten times this rate VICReg diverges, and what is zero but for rounding grows with it.
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (module, plain)]
    for step in range(STEPS):
        views = draw_views(step)
        torch.manual_seed(step)
        out = run_step(name, module, views)
        clean = run_step(name, plain, views)
        torch.manual_seed(step)
        term = _eq_4(name, plain, views, clean.get("keys"), options)
        torch.testing.assert_close(out["loss"], clean["loss"] + term, rtol=1e-9, atol=1e-9)
        # What probes and kNN callbacks read is that of the clean images.
        torch.testing.assert_close(out["embedding"], clean["embedding"], rtol=1e-9, atol=1e-9)
        assert ("label" in out) == ("label" in clean)
        if "label" in out:
            assert torch.equal(out["label"], clean["label"])
        if takes_batches(name):
            torch.testing.assert_close(out["mixmask_loss"], term.detach())
        for optimizer, loss in zip(optimizers, (out["loss"], clean["loss"] + term), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, value in module.state_dict().items():
        # The passes of this oracle leave traces of their own in batch norms.
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(value, state[key], rtol=1e-9, atol=1e-9)
    if "queue" in name or name == "MoCov2":
        torch.testing.assert_close(module.queue.get(), plain.queue.get())


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_and_copies(name: str) -> None:
    """Without a gradient or in evaluation nothing is mixed; copies go on alike."""
    plain, module = build(name), wrap(build(name), MIX)
    views = draw_views(0)
    for each in (plain, module):
        each.eval()
    one = views[0]
    call = {"image": one} if takes_batches(name) else one
    stage = {"stage": "validate"} if takes_batches(name) else {}
    assert torch.equal(module(call, **stage)["embedding"], plain(call, **stage)["embedding"])
    if not takes_batches(name):
        assert torch.equal(run_step(name, module, views).loss, run_step(name, plain, views).loss)
    module.train()
    plain.train()
    with torch.no_grad():
        assert torch.equal(
            run_step(name, module, views)["loss"], run_step(name, plain, views)["loss"]
        )
    twin = copy.deepcopy(module)
    losses = []
    for each in (module, twin):
        torch.manual_seed(1)
        losses.append(run_step(name, each, views)["loss"])
    assert torch.equal(*losses)
    assert twin.mixmask is not module.mixmask


@pytest.mark.parametrize("name", ["SimCLR", "MoCov2"])
def test_a_step_is_pickled_with_its_module(name: str) -> None:
    module = wrap(build(name), MIX)
    del module.log, module.log_dict
    twin = pickle.loads(pickle.dumps(module))
    losses = []
    for each in (module, twin):
        torch.manual_seed(1)
        losses.append(each(*draw_views(0)).loss)
    assert torch.equal(*losses)


class Views(torch.utils.data.Dataset[Any]):
    """Random images, in two views or in one."""

    def __init__(self, *, two: bool) -> None:
        self.two = two

    def __len__(self) -> int:
        return 3 * N

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        first, second = torch.rand(2, 3, 32, 32, generator=generator)
        if self.two:
            return {"views": [{"image": x, "label": index % 3} for x in (first, second)]}
        return {"image": first, "label": index % 3}


class Seen(nn.Linear):
    """A probe that notes what it is given in training."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize("name", ["forward.simclr", "forward.byol", "own class"])
def test_their_trainer_with_probe_and_knn(name: str, tmp_path: Path) -> None:
    import lightning
    import torchmetrics

    torch.manual_seed(0)
    module = wrap(METHODS[name](), mixmask.MixMask(grid_size=4, ratio=0.25))
    module.optim = {"optimizer": partial(torch.optim.SGD, lr=0.1), "scheduler": "ConstantLR"}
    accuracy = torchmetrics.classification.MulticlassAccuracy(3)
    callbacks = [
        spt.callbacks.OnlineKNN("knn", "embedding", "label", 3 * N, accuracy, input_dim=8, k=2),
        spt.callbacks.TeacherStudentCallback(),
    ]
    probe = Seen(8, 3)
    if name != "own class":
        options = {"metrics": accuracy.clone(), "loss": nn.CrossEntropyLoss()}
        callbacks.append(
            spt.callbacks.OnlineProbe(
                module, "probe", input="embedding", target="label", probe=probe, **options
            )
        )
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        default_root_dir=tmp_path,
    )
    before = {key: value.clone() for key, value in module.state_dict().items()}
    loaders = [torch.utils.data.DataLoader(Views(two=two), N) for two in (True, False)]
    trainer.fit(module, *loaders)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert trainer.global_step == STEPS
    assert metrics["mixmask_lambda"] == 0.25
    assert 0 < metrics["mixmask_loss"] < 10
    assert [key for key in metrics if "knn" in key]
    if name != "own class":
        # Two clean views in training, one in validation, and no mixed one.
        assert probe.rows == [2 * N] * STEPS + [N] * STEPS
    after = module.state_dict()
    moved = {key for key, value in before.items() if not value.equal(after[key])}
    assert [key for key in moved if key.startswith("projector.") and key.endswith("weight")]


@pytest.mark.parametrize(
    "build, options, error, text",
    [
        (
            lambda: nn.Linear(2, 2),
            {},
            TypeError,
            "must be a Module of stable-pretraining, got Line",
        ),
        (METHODS["SimCLR"], {"mixing": 4}, TypeError, "must be callable with images, got int"),
        (METHODS["MoCov2"], {"symmetric": True}, ValueError, "MoCov2, which has one direction"),
        (lambda: build_module(print), {}, ValueError, "expected SimCLR, .* got Module; write"),
        (
            lambda: spt.methods.TiCO(build_tiny(), (8, 4)),
            {},
            ValueError,
            "expected SimCLR, .* got TiCO; write the two lines",
        ),
        (lambda: wrap(METHODS["SimCLR"](), MIX), {}, ValueError, "is wrapped already; build a"),
    ],
)
def test_bad_input_is_refused_at_once(
    build: Callable[[], Any], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        wrap(build(), **{"mixing": MIX, **options})


def _by_another_name(self: Any, batch: Any, stage: str) -> dict[str, Tensor]:
    del stage
    rows = [self.projector(self.backbone(view["image"])) for view in batch["views"]]
    return {"loss": (rows[0] - rows[1]).square().mean()}


def _crops(self: Any, batch: Any, stage: str) -> dict[str, Tensor]:
    del stage
    views = batch["views"]
    rows = [self.projector(self.backbone(view["image"])) for view in [*views, views[0]]]
    return {"loss": self.simclr_loss(rows[0], rows[1])}


@pytest.mark.parametrize(
    "function, text",
    [
        (_by_another_name, "expected a call of simclr_loss in every training step, got none"),
        (_crops, "expected two views of 6 images, got 18 images at the backbone"),
    ],
)
def test_other_forwards_are_refused_at_their_first_step(
    function: Callable[..., Any], text: str
) -> None:
    module = build_module(function, simclr_loss=spt.losses.NTXEntLoss())
    with pytest.raises(ValueError, match=text):
        wrap(module.double(), MIX)({"views": [{"image": x} for x in draw_views(0)]}, stage="fit")


def test_one_mask_per_sample_needs_a_loss_per_sample() -> None:
    module = wrap(build("BarlowTwins"), EACH)
    with pytest.raises(ValueError, match="got a scalar"):
        module(*draw_views(0))
