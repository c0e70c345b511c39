"""Three steps of codebases that compute their loss inside `forward`, beside an oracle.

As `test_codebases.py`, by `RecordingCriterion` and `record_embeddings`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import codebases
import pytest
import torch
import torch.nn.functional as F
from codebases import Row, Run, Step
from torch import Tensor, nn

N, STEPS = 8, 3


@pytest.fixture
def batches() -> list[Any]:
    return codebases.photograph_pairs(STEPS, N)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of the test: the scripts write checkpoints where they stand."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class SlowLARS:
    """LARS as You et al. give it, with momentum; vectors are neither decayed nor adapted."""

    weight_decay: float
    momentum: float = 0.9
    trust: float = 0.001
    velocity: dict[str, Tensor] = field(default_factory=dict)

    def step(
        self,
        weights: Mapping[str, nn.Parameter],
        gradients: Mapping[str, Tensor],
        rates: tuple[float, float],
    ) -> None:
        """Move the weights; `rates` are those of matrices and of vectors."""
        for name, gradient in gradients.items():
            weight = weights[name].data
            rise = gradient.clone()
            if weight.ndim > 1:
                rise = rise + self.weight_decay * weight
                lengths = float(weight.square().sum()) ** 0.5, float(rise.square().sum()) ** 0.5
                if min(lengths) > 0:
                    rise = rise * (self.trust * lengths[0] / lengths[1])
            self.velocity[name] = self.momentum * self.velocity.get(name, 0.0) + rise
            weight.sub_(rates[weight.ndim == 1] * self.velocity[name])


Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _twins_slowly(
    run: Run,
    batches: Sequence[Any],
    loss_of: Loss,
    weight_decay: float,
    rates: Callable[[int], tuple[float, float]],
    also: Callable[[Any, Tensor, Tensor], None] = lambda *_: None,
) -> tuple[list[Step], dict[str, Tensor]]:
    """Train backbone and projector on two views and a mixture of the first."""
    model = copy.deepcopy(run.initial)
    weights, steps, optimizer = dict(model.named_parameters()), [], SlowLARS(weight_decay)
    for step, (((x_1, x_2), _), cells) in enumerate(zip(batches, run.masks, strict=True)):
        z_1, z_2 = (model.projector(model.backbone(x)) for x in (x_1, x_2))
        x_mixed, lam = codebases.mixed_slowly(x_1, cells)
        loss = loss_of(z_1, z_2, model.projector(model.backbone(x_mixed)), lam)
        also(model, z_1, z_2)
        gradients = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))
        optimizer.step(weights, gradients, rates(step))
        steps.append(Step(loss.detach(), gradients))
    return steps, model.state_dict()


def _correlation_loss(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Barlow Twins, eq. 1 and 2, feature by feature."""
    scaled = [(z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (first, second)]
    loss = torch.zeros(())
    for i in range(first.shape[1]):
        for j in range(first.shape[1]):
            c = (scaled[0][:, i] * scaled[1][:, j]).sum() / len(first)
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


def test_barlow_twins(batches: list[Any], folder: Path) -> None:
    name = "facebookresearch/barlowtwins"
    source, lines = codebases.patched("barlowtwins", name, folder)
    args = SimpleNamespace(
        batch_size=N,
        checkpoint_dir=folder / "checkpoints",
        data=folder,
        dist_url="",
        epochs=1,
        lambd=0.0051,
        learning_rate_biases=0.0048,
        learning_rate_weights=0.2,
        print_freq=1,
        projector="24-24-12",
        rank=0,
        weight_decay=1e-6,
        workers=0,
        world_size=1,
    )
    # Their rate warms up over ten epochs.
    warmed = N / 256 / (10 * STEPS)

    def loss_of(z_1: Tensor, z_2: Tensor, z_mixed: Tensor, lam: float) -> Tensor:
        loss = _correlation_loss(z_1, z_2, args.lambd)
        loss = loss + lam * _correlation_loss(z_mixed, z_2, args.lambd)
        return loss + (1 - lam) * _correlation_loss(z_mixed, z_2.flip(0), args.lambd)

    def move_statistics(model: Any, z_1: Tensor, z_2: Tensor) -> None:
        """Their last batch norm sees the clean views alone."""
        model.bn(z_1)
        model.bn(z_2)

    def rates(step: int) -> tuple[float, float]:
        return (
            step * warmed * args.learning_rate_weights,
            step * warmed * args.learning_rate_biases,
        )

    with codebases.on_cpu(batches) as run, codebases.loaded(folder / "main.py") as script:
        script.main_worker(0, args)
        slow = _twins_slowly(run, batches, loss_of, args.weight_decay, rates, move_statistics)
        errors = run.errors(*slow)
    Row(name, codebases.commit(source), lines, *errors).check(3)


def _spread(z: Tensor) -> Tensor:
    """VICReg's variance and covariance terms of one view, eq. 1-4, weighted 25 and 1."""
    n, features = z.shape
    centred = z - z.mean(0)
    loss = torch.zeros(())
    for i in range(features):
        deviation = ((centred[:, i] ** 2).sum() / (n - 1) + 1e-4).sqrt()
        loss = loss + 25 * torch.relu(1 - deviation) / features / 2
        for j in range(features):
            if i != j:
                covariance = (centred[:, i] * centred[:, j]).sum() / (n - 1)
                loss = loss + covariance**2 / features
    return loss


def test_vicreg(batches: list[Any], folder: Path) -> None:
    name = "facebookresearch/vicreg"
    source, lines = codebases.patched("vicreg", name, folder)
    args = SimpleNamespace(
        arch="resnet34",
        base_lr=0.2,
        batch_size=N,
        cov_coeff=1.0,
        data_dir=folder,
        device="cpu",
        epochs=1,
        exp_dir=folder / "experiment",
        log_freq_time=0,
        mlp="24-24-12",
        num_workers=0,
        rank=0,
        sim_coeff=25.0,
        std_coeff=25.0,
        wd=1e-6,
        world_size=1,
    )

    def loss_of(z_1: Tensor, z_2: Tensor, z_mixed: Tensor, lam: float) -> Tensor:
        loss = _spread(z_1) + _spread(z_2) + _spread(z_mixed)
        for i in range(N):
            loss = loss + 25 * ((z_1[i] - z_2[i]) ** 2).mean() / N
            loss = loss + 25 * lam * ((z_mixed[i] - z_2[i]) ** 2).mean() / N
            loss = loss + 25 * (1 - lam) * ((z_mixed[i] - z_2[N - 1 - i]) ** 2).mean() / N
        return loss

    def rates(step: int) -> tuple[float, float]:
        return (args.base_lr * N / 256 * step / (10 * STEPS),) * 2

    with codebases.on_cpu(batches) as run, codebases.loaded(folder / "main_vicreg.py") as script:
        script.main(args)
        errors = run.errors(*_twins_slowly(run, batches, loss_of, args.wd, rates))
    Row(name, codebases.commit(source), lines, *errors).check(3)


def test_moco_v3(batches: list[Any], folder: Path) -> None:
    name = "facebookresearch/moco-v3"
    source, lines = codebases.patched("moco-v3", name, folder)
    args = SimpleNamespace(
        arch="resnet18",
        batch_size=N,
        crop_min=0.08,
        data=str(folder),
        dist_backend="gloo",
        dist_url="",
        distributed=True,
        epochs=1,
        gpu=0,
        lr=0.6,
        moco_dim=12,
        moco_m=0.9,
        moco_m_cos=False,
        moco_mlp_dim=24,
        moco_t=0.7,
        momentum=0.9,
        multiprocessing_distributed=True,
        optimizer="lars",
        print_freq=1,
        rank=0,
        resume="",
        start_epoch=0,
        warmup_epochs=0,
        weight_decay=1e-6,
        workers=0,
        world_size=1,
    )
    with (
        codebases.on_cpu(batches, pretend=True) as run,
        codebases.loaded(
            folder / "main_moco.py", stubs=("vits", "torch.utils.tensorboard")
        ) as script,
    ):
        script.main_worker(0, 1, copy.copy(args))
        errors = run.errors(*_moco_v3_slowly(run, batches, args))
    Row(name, codebases.commit(source), lines, *errors).check(3)


def _moco_v3_slowly(
    run: Run, batches: Sequence[Any], args: Any
) -> tuple[list[Step], dict[str, Tensor]]:
    """MoCo v3, algorithm 1, plus MixMask's eq. 4 of the first view."""
    model = copy.deepcopy(run.initial)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    steps, optimizer = [], SlowLARS(args.weight_decay)

    def contrast(q: Tensor, key: Tensor, keys: Tensor) -> Tensor:
        near = torch.stack([F.cosine_similarity(q, k, dim=0) for k in (key, *keys)]) / args.moco_t
        loss: Tensor = 2 * args.moco_t * (near[1:].logsumexp(dim=0) - near[0])
        return loss

    for step, (((x_1, x_2), _), cells) in enumerate(zip(batches, run.masks, strict=True)):
        q_1, q_2 = (model.predictor(model.base_encoder(x)) for x in (x_1, x_2))
        for name, weight in model.momentum_encoder.named_parameters():
            online = model.base_encoder.get_parameter(name)
            weight.data = args.moco_m * weight.data + (1 - args.moco_m) * online.data
        k_1, k_2 = (model.momentum_encoder(x).detach() for x in (x_1, x_2))
        x_mixed, lam = codebases.mixed_slowly(x_1, cells)
        q_mixed = model.predictor(model.base_encoder(x_mixed))
        loss = torch.zeros(())
        for i in range(N):
            loss = loss + contrast(q_1[i], k_2[i], k_2) + contrast(q_2[i], k_1[i], k_1)
            loss = loss + lam * contrast(q_mixed[i], k_2[i], k_2)
            loss = loss + (1 - lam) * contrast(q_mixed[i], k_2[N - 1 - i], k_2)
        loss = loss / N
        gradients = dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))
        rate = args.lr * N / 256 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.step(trained, gradients, (rate, rate))
        steps.append(Step(loss.detach(), gradients))
    return steps, model.state_dict()


@pytest.mark.parametrize(
    ("number", "kind", "most"), [(0, "", 3), (1, ", in its model", 2)], ids=["trainer", "model"]
)
def test_byol_pytorch(batches: list[Any], folder: Path, number: int, kind: str, most: int) -> None:
    pytest.importorskip("accelerate", reason="byol-pytorch's trainer needs accelerate")
    from accelerate.state import AcceleratorState

    # beartype checks types only.
    repairs = [
        ("from beartype import beartype\n", "beartype = lambda function: function\n"),
        ("from beartype.typing", "from typing"),
    ]
    name = "lucidrains/byol-pytorch"
    source, lines = codebases.patched("byol-pytorch", name, folder, repairs, number=number)
    (folder / "train.py").write_text("from byol_pytorch.trainer import BYOLTrainer\n")
    images = torch.cat([views[0] for views, _ in batches])
    seen: list[Tensor] = []
    with codebases.on_cpu() as run, codebases.loaded(folder / "train.py") as script:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Identity()
        )
        trainer = script.BYOLTrainer(
            net,
            image_size=32,
            hidden_layer=-1,
            learning_rate=0.05,
            dataset=images,
            num_train_steps=STEPS,
            batch_size=N,
            optimizer_klass=torch.optim.SGD,
            byol_kwargs={
                "augment_fn": _Mirror(),
                "augment_fn2": _Shift(),
                "moving_average_decay": 0.9,
                "projection_hidden_size": 24,
                "projection_size": 12,
                "sem_num_simplices": 4,
                "sem_simplex_dim": 4,
            },
            accelerator_kwargs={"cpu": True},
        )
        run.start(trainer.byol)
        trainer.byol.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        trainer()
        errors = run.errors(*_byol_slowly(run, seen))
    AcceleratorState._reset_state(reset_partial_state=True)
    Row(name + kind, codebases.commit(source), lines, *errors).check(most)


class _Mirror(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flip(3) * 0.9


class _Shift(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.roll((2, -1), (2, 3))


def _byol_slowly(run: Run, batches: Sequence[Tensor]) -> tuple[list[Step], dict[str, Tensor]]:
    """BYOL, eq. 2, on both views at once as theirs, plus MixMask's eq. 4 of the first."""
    model = copy.deepcopy(run.initial)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    steps = []

    def distance(p: Tensor, z: Tensor) -> Tensor:
        return 2 - 2 * F.cosine_similarity(p, z, dim=0)

    for images, cells in zip(batches, run.masks, strict=True):
        x_1, x_2 = _Mirror()(images), _Shift()(images)
        both = torch.cat([x_1, x_2])
        p = model.online_predictor(model.online_encoder(both)[0])
        z = model.target_encoder(both)[0].detach()
        x_mixed, lam = codebases.mixed_slowly(x_1, cells)
        p_mixed = model.online_predictor(model.online_encoder(x_mixed)[0])
        loss = torch.zeros(())
        for i in range(N):
            loss = loss + distance(p[i], z[N + i]) + distance(p[N + i], z[i])
            loss = loss + lam * distance(p_mixed[i], z[N + i])
            loss = loss + (1 - lam) * distance(p_mixed[i], z[N + N - 1 - i])
        loss = loss / N
        gradients = dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))
        for name, gradient in gradients.items():
            trained[name].data -= 0.05 * gradient
        for online, target in zip(
            model.online_encoder.parameters(), model.target_encoder.parameters(), strict=True
        ):
            target.data = 0.9 * target.data + 0.1 * online.data
        steps.append(Step(loss.detach(), gradients))
    return steps, model.state_dict()
