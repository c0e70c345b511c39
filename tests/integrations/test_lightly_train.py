"""lightly-train's own methods and its single command, against eq. 4 written out in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_methods import (
    DINO,
    N,
    SimCLR,
    Tiny,
    build,
    draw_batch,
    lightly_train,
    method_helpers,
)

import mixmask
from mixmask.checkpoints import load_backbone
from mixmask.integrations import lightly_train as integration

pytestmark = pytest.mark.filterwarnings("ignore")


STEPS, MIX = 3, mixmask.MixMask(grid_size=4, ratio=(0.3, 0.7))
EACH = mixmask.MixMask(grid_size=4, ratio=(0.3, 0.7), per_sample=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "one view": {"mixing": MIX},
    "both views": {"mixing": MIX, "symmetric": True},
    "without switch": {"mixing": MIX, "switch": False},
    "mask per sample": {"mixing": EACH},
}


@pytest.fixture
def patch() -> Iterator[Callable[..., None]]:
    """Patch, and take it back afterwards."""
    undo: list[Callable[[], None]] = []
    yield lambda mixing, **more: undo.append(integration.patch(mixing, **more))
    for each in undo:
        each()


def _nt_xent(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Each image's loss, (N,), row by row."""
    rows = F.normalize(torch.cat([z, target]), dim=1)
    losses = []
    for i in range(2 * N):
        logits = rows[i] @ rows.T / temperature
        rest = torch.cat([logits[:i], logits[i + 1 :]])
        losses.append(rest.logsumexp(dim=0) - logits[(i + N) % (2 * N)])
    return torch.stack(losses).view(2, N).mean(dim=0)


def _rows(method: Any, z: Tensor, target: Tensor, center: Tensor, temperature: float) -> Tensor:
    if isinstance(method, SimCLR):
        return _nt_xent(z, target, method.criterion.temperature)
    sharp = ((target - center) / temperature).softmax(dim=1)
    student: Tensor = (z / method.criterion.student_temp).log_softmax(dim=1)
    return -(sharp * student).sum(dim=1)


def _eq_4(method: Any, views: list[Tensor], options: dict[str, Any], **then: Any) -> Tensor:
    """Write the mixed term out: masks are drawn as they are to be drawn, the rest is by hand."""
    if isinstance(method, SimCLR):

        def embed(x: Tensor) -> Tensor:
            z: Tensor = method.projection_head(method.embedding_model(x).flatten(1))
            return z

        targets = list(embed(torch.cat(views)).chunk(2))
    else:
        embed = method._forward_student
        targets = list(method._forward_teacher(torch.cat(views[:2])).chunk(2))
    terms = []
    for view in range(1 + options.get("symmetric", False)):
        record = options["mixing"](views[view])
        own = record.mask.double().expand(N, 32, 32)
        images = own[:, None] * views[view]
        images = images + (1 - own)[:, None] * views[view][record.partner]
        z, target = embed(images), targets[1 - view]
        lam = own.mean(dim=(1, 2))
        loss = lam * _rows(method, z, target, **then)
        if options.get("switch", True):
            other = target[record.partner]
            loss = loss + (1 - lam) * _rows(method, z, other, **then)
        terms.append(loss.mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name, views", [("simclr", 2), ("dino", 2), ("dino", 4)])
def test_three_steps_are_theirs_plus_the_mixed_term(
    patch: Callable[..., None], name: str, views: int, option: str
) -> None:
    options = OPTIONS[option]
    plain = build(method_helpers.get_method_cls(name))
    patch(**options)
    ours = build(method_helpers.get_method_cls(name))
    assert type(ours) is not type(plain)
    assert isinstance(ours, type(plain))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (ours, plain)]
    for step in range(STEPS):
        batch = draw_batch(step, views)
        center = getattr(plain.criterion, "center", torch.zeros(())).flatten().clone()
        torch.manual_seed(step)
        result = ours.training_step_impl(batch, step)
        clean = plain.training_step_impl(batch, step)
        # Their loss rounds this one number to float32, and so does the oracle.
        temperature = float(torch.tensor((clean.log_dict or {}).get("schedule/teacher_temp", 0.0)))
        torch.manual_seed(step)
        term = _eq_4(plain, batch["views"], options, center=center, temperature=temperature)
        torch.testing.assert_close(result.loss, clean.loss + term, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.log_dict["mixmask/loss"], term.detach())
        for optimizer, loss in zip(optimizers, (result.loss, clean.loss + term), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    state = plain.state_dict()
    for key, value in ours.state_dict().items():
        # The pass of this oracle leaves its own trace in the student's batch norms.
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(value, state[key], rtol=1e-9, atol=1e-9)
    if name == "dino":
        assert float(plain.criterion.center.abs().max()) > 0


def test_their_classes_stay_as_they_are(patch: Callable[..., None]) -> None:
    look_up, before = method_helpers.get_method_cls, [dict(vars(SimCLR)), dict(vars(DINO))]
    undo = integration.patch(MIX)
    patched = method_helpers.get_method_cls("simclr")
    assert patched is not SimCLR
    assert patched.__name__ == "SimCLR"
    assert [dict(vars(SimCLR)), dict(vars(DINO))] == before
    undo()
    assert method_helpers.get_method_cls is look_up
    patch(MIX)
    patch(EACH, symmetric=True)
    again: Any = method_helpers.get_method_cls("simclr")
    assert again.symmetric
    assert len([cls for cls in again.__mro__ if cls.__module__ == integration.__name__]) == 2


@pytest.mark.parametrize("method", sorted({*method_helpers._list_methods()} - {"simclr", "dino"}))
def test_other_methods_are_refused_with_the_reason(patch: Callable[..., None], method: str) -> None:
    patch(MIX)
    with pytest.raises(ValueError, match=rf"method '{method}': (it|its|half) .*; use one of dino"):
        method_helpers.get_method_cls(method)


def test_untested_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = method_helpers.get_method_cls
    monkeypatch.setattr(integration, "version", lambda _: "0.19.0")
    with pytest.raises(ImportError, match=r"0\.18\.0, got 0\.19\.0; run pip install 'lightly-tr"):
        integration.patch(MIX)
    assert method_helpers.get_method_cls is look_up
    with pytest.raises(TypeError, match="mixing must be callable with images, got int"):
        integration.patch(4)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No event goes out, and no cache into the home folder."""
    monkeypatch.setenv("LIGHTLY_TRAIN_EVENTS_DISABLED", "1")
    monkeypatch.setenv("LIGHTLY_TRAIN_CACHE_DIR", str(tmp_path / "cache"))


def _pretrain(
    folder: Path, out: str, method: str = "simclr", model: Any = None
) -> list[dict[str, float]]:
    """Run their command for three steps, and return what it logged."""
    from PIL import Image

    images = folder / "images"
    images.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"{index}.png")
    torch.manual_seed(0)
    lightly_train.pretrain(
        out=folder / out,
        data=images,
        model=model or Tiny(),
        method=method,
        method_args={"hidden_dim": 16, "output_dim": 12},
        transform_args={"image_size": (32, 32)},
        epochs=1,
        batch_size=4,
        num_workers=0,
        accelerator="cpu",
        devices=1,
        precision="32-true",
        trainer_args={"log_every_n_steps": 1},
        loggers={"jsonl": {}, "tensorboard": None},
    )
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_their_command_mixes_after_the_call_and_not_without_it(
    patch: Callable[..., None], tmp_path: Path
) -> None:
    plain = [row for row in _pretrain(tmp_path, "plain") if "train_loss" in row]
    patch(mixmask.MixMask(grid_size=4, ratio=0.25))
    mixed = [row for row in _pretrain(tmp_path, "mixed") if "train_loss" in row]
    assert len(plain) == len(mixed) == STEPS
    assert not [key for key in plain[0] if "mixmask" in key]
    assert [row["mixmask/lambda"] for row in mixed] == [0.25] * STEPS
    # Their views come from a generator that no seed reaches, so losses differ from run to run.
    assert all(0 < row["mixmask/loss"] < row["train_loss"] for row in mixed)
    with pytest.raises(ValueError, match="'distillationv2': it mixes its images itself"):
        _pretrain(tmp_path, "refused", "distillationv2")


@pytest.mark.slow
def test_their_checkpoint_gives_their_features(patch: Callable[..., None], tmp_path: Path) -> None:
    patch(MIX)
    _pretrain(tmp_path, "run", model="torchvision/resnet18")
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    # As lightly-train opens its files: the model that users get is pickled in them.
    theirs: Any = torch.load(file, weights_only=False)["lightly_train"]["models"]["model"]
    theirs.fc = nn.Identity()
    loaded = load_backbone(file)
    assert (loaded.layout, loaded.arch) == ("lightly-train", "resnet18")
    images = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        ours, expected = (model.eval()(images) for model in (loaded.backbone, theirs))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
