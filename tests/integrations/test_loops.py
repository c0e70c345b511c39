"""Three steps of public training loops with our lines in them, beside an oracle.

Codebases run where `MIXMASK_CODEBASES` names a folder of checkouts, packages where they are
installed; both are skipped elsewhere. The oracle shares with each run the network's layers and
the masks that were drawn, nothing else; it follows the papers in plain loops.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import codebases
import pytest
import torch
import torch.nn.functional as F
from codebases import Row, SlowSGD
from slow_loops import STEPS, N, nt_xent, slowly, toward
from torch import Tensor, nn


@pytest.fixture
def batches() -> list[Any]:
    return codebases.photograph_pairs(STEPS, N)


def _cosine(p: Tensor, z: Tensor) -> Tensor:
    return F.cosine_similarity(p, z.detach(), dim=0).neg()


def _simsiam(model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
    """SimSiam, algorithm 1."""
    z = [model.encoder(x) for x in views]
    p = [model.predictor(one) for one in z]
    p_mixed = model.predictor(model.encoder(x_mixed))
    total = torch.zeros(())
    for i in range(N):
        total = total + _cosine(p[0][i], z[1][i]) / 2 + _cosine(p[1][i], z[0][i]) / 2
    return total / N + toward(p_mixed, z[1], lam, _cosine)


SIMSIAM_ARGS = {
    "arch": "resnet18",
    "batch_size": N,
    "data": ".",
    "dim": 32,
    "pred_dim": 16,
    "epochs": 1,
    "dist_backend": "gloo",
    "dist_url": "",
    "distributed": True,
    "world_size": 1,
    "rank": 0,
    "multiprocessing_distributed": True,
    "gpu": 0,
    "workers": 0,
    "print_freq": 10,
    "lr": 1.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "fix_pred_lr": True,
    "resume": "",
    "start_epoch": 0,
}


def test_simsiam(batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "facebookresearch/simsiam"
    source, lines = codebases.patched("simsiam", name, tmp_path)
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(**SIMSIAM_ARGS)
    with codebases.on_cpu(batches) as run, codebases.loaded(tmp_path / "main_simsiam.py") as script:
        script.main_worker(0, 1, args)
        optimizer = SlowSGD(1.0 * N / 256, args.momentum, args.weight_decay)
        errors = run.errors(*slowly(run, batches, _simsiam, optimizer))
    Row(name, codebases.commit(source), lines, *errors).check(4)


def test_simclr(batches: list[Any], tmp_path: Path) -> None:
    name = "sthalles/SimCLR"
    source, lines = codebases.patched("SimCLR", name, tmp_path)
    args: Any = SimpleNamespace(
        device="cpu",
        epochs=1,
        temperature=0.1,
        fp16_precision=False,
        batch_size=N,
        n_views=2,
        log_every_n_steps=1,
        disable_cuda=True,
        arch="resnet18",
    )

    def slow_loss(model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
        z1, z2 = model(torch.cat([*views])).chunk(2)
        z_mixed = model(x_mixed)
        total = nt_xent(z1, z2, args.temperature)
        total = total + lam * nt_xent(z_mixed, z2, args.temperature)
        return total + (1 - lam) * nt_xent(z_mixed, z2.flip(0), args.temperature)

    with (
        codebases.on_cpu(batches) as run,
        codebases.loaded(tmp_path / "simclr.py", stubs=["torch.utils.tensorboard"]) as module,
    ):
        script: Any = module
        writer = SimpleNamespace(log_dir=str(tmp_path / "log"), add_scalar=lambda *_, **__: None)
        script.SummaryWriter = lambda: writer
        script.GradScaler = lambda **_: codebases._NoScaler()
        from models.resnet_simclr import ResNetSimCLR  # type: ignore[import-not-found]

        torch.manual_seed(0)
        with mock.patch("torchvision.models.resnet50"):
            model = ResNetSimCLR("resnet18", 16)
        run.start(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9, weight_decay=1e-4)
        scheduler = SimpleNamespace(get_lr=lambda: [0.0])
        script.SimCLR(args=args, model=model, optimizer=optimizer, scheduler=scheduler).train(
            batches
        )
        errors = run.errors(*slowly(run, batches, slow_loss, SlowSGD(0.03, 0.9, 1e-4)))
    Row(name, codebases.commit(source), lines, *errors).check(4)


def _soft(target: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of one row, -sum_k t_k log softmax(logits)_k."""
    return -(target * (logits - logits.exp().sum().log())).sum()


def _codes(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """SwAV's codes by Sinkhorn-Knopp, algorithm 1: (B, K) scores, rows of the result sum to 1."""
    q = (scores.detach() / epsilon).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = torch.stack([column / column.sum() / q.shape[1] for column in q.T]).T
        q = torch.stack([row / row.sum() / q.shape[0] for row in q])
    return q * q.shape[0]


class SlowSwAV:
    """SwAV with its queue of embeddings, eq. 2-5 and section 3.1, for large and small crops."""

    def __init__(self, args: Any, queue: Tensor) -> None:
        self.args, self.queue, self.filled = args, queue, 0

    def __call__(self, model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
        args, crops = self.args, len(views)
        weight = model.prototypes.weight.data
        weight.copy_(torch.stack([row / row.norm() for row in weight]))
        embeddings, scores = model(list(views))
        embeddings, scores = embeddings.detach().split(N), scores.split(N)
        total, codes = torch.zeros(()), []
        for crop in range(2):
            known = self.queue[crop, : self.filled] if self.filled == self.queue.shape[1] else None
            pool = [scores[crop].detach()]
            if known is not None:
                pool.insert(0, known @ weight.T)
            codes.append(_codes(torch.cat(pool), args.epsilon, args.sinkhorn_iterations)[-N:])
            for view in range(crops):
                if view != crop:
                    rows = zip(codes[crop], scores[view] / args.temperature, strict=True)
                    each = torch.stack([_soft(code, row) for code, row in rows])
                    total = total + each.mean() / (crops - 1) / 2
            self.queue[crop] = torch.cat([embeddings[crop], self.queue[crop]])[
                : self.queue.shape[1]
            ]
        self.filled = min(self.filled + N, self.queue.shape[1])
        mixed = model(x_mixed)[1] / args.temperature
        return total + toward(mixed, codes[1], lam, lambda row, code: _soft(code, row))


def test_swav(batches: list[Any], tmp_path: Path) -> None:
    name = "facebookresearch/swav"
    source, lines = codebases.patched("swav", name, tmp_path)
    small = [F.interpolate(views[0], size=24) for views, _ in batches]
    crops = [[*views, less] for (views, _), less in zip(batches, small, strict=True)]
    args = SimpleNamespace(
        crops_for_assign=[0, 1],
        nmb_crops=[2, 1],
        temperature=0.1,
        rank=1,
        epsilon=0.05,
        sinkhorn_iterations=3,
        world_size=1,
        use_fp16=False,
        freeze_prototypes_niters=0,
    )
    stubs = ["src.logger", "apex", "apex.parallel", "apex.parallel.LARC"]
    with (
        codebases.on_cpu() as run,
        codebases.loaded(tmp_path / "main_swav.py", stubs=stubs) as module,
    ):
        script: Any = module
        torch.manual_seed(0)
        from src.resnet50 import BasicBlock, ResNet  # type: ignore[import-not-found]

        net = ResNet(
            BasicBlock, [1, 1, 1, 1], normalize=True, output_dim=8, hidden_mlp=16, nmb_prototypes=12
        )
        model = nn.parallel.DistributedDataParallel(net)
        script.args, queue = args, torch.zeros(2, 2 * N, 8)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
        script.train(crops, model, optimizer, 0, [0.1] * STEPS, queue)
        slow = SlowSwAV(args, torch.zeros(2, 2 * N, 8))
        steps = slowly(run, [(views, None) for views in crops], slow, SlowSGD(0.1, 0.9, 1e-4))
        loss, gradients, state = run.errors(*steps)
        state = max(state, codebases.worst({"queue": queue}, {"queue": slow.queue}))
    Row(name, codebases.commit(source), lines, loss, gradients, state).check(4)


class SlowDINO:
    """DINO, algorithm 1, eq. 2-4, for large and small crops."""

    def __init__(self, teacher: Any, center: Tensor, momentum: float) -> None:
        self.teacher, self.center, self.momentum = teacher, center, momentum

    def __call__(self, model: Any, views: Sequence[Tensor], x_mixed: Tensor, lam: float) -> Tensor:
        if self.calls:
            self.follow(model)
        self.calls += 1
        outputs = self.teacher(list(views[:2])).detach()
        targets = [((t - self.center) / 0.05).softmax(dim=1) for t in outputs.split(N)]
        students = (model(list(views)) / 0.1).split(N)
        total, pairs = torch.zeros(()), 0
        for i, target in enumerate(targets):
            for j, student in enumerate(students):
                if i != j:
                    rows = zip(target, student, strict=True)
                    total = total + torch.stack([_soft(t, s) for t, s in rows]).mean()
                    pairs += 1
        self.center = 0.9 * self.center + 0.1 * outputs.sum(dim=0) / len(outputs)
        mixed = model(x_mixed) / 0.1
        return total / pairs + toward(mixed, targets[1], lam, lambda s, t: _soft(t, s))

    calls = 0

    def follow(self, model: Any) -> None:
        """Move the teacher towards the student, after its step."""
        for of_t, of_s in zip(self.teacher.parameters(), model.parameters(), strict=True):
            of_t.data = self.momentum * of_t.data + (1 - self.momentum) * of_s.data


def test_dino(batches: list[Any], tmp_path: Path) -> None:
    name = "facebookresearch/dino"
    source, lines = codebases.patched("dino", name, tmp_path)
    crops = [([*views, views[1][..., 8:24, 8:24]], None) for views, _ in batches]
    args = SimpleNamespace(epochs=1, clip_grad=None, freeze_last_layer=0)
    with (
        codebases.on_cpu() as run,
        codebases.loaded(tmp_path / "main_dino.py") as script,
        mock.patch("torch.cuda.synchronize"),
        mock.patch.object(script.utils.MetricLogger, "synchronize_between_processes"),
    ):
        torch.manual_seed(0)
        nets = []
        for _ in range(2):
            vit = script.vits.VisionTransformer(
                img_size=[32], patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
            )
            head = script.DINOHead(24, 16, hidden_dim=32, bottleneck_dim=8)
            # Computed anew at each call; with a gradient it could not be copied.
            head.last_layer.weight = head.last_layer.weight.detach()
            nets.append(script.utils.MultiCropWrapper(vit, head))
        net, teacher = nets
        teacher.requires_grad_(False)
        teacher.load_state_dict(net.state_dict())
        student: Any = nn.parallel.DistributedDataParallel(net)
        slow = SlowDINO(copy.deepcopy(teacher), torch.zeros(16), 0.9)
        criterion = script.DINOLoss(16, 3, 0.05, 0.05, 0, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.03, 0.9)
        script.train_one_epoch(
            *(student, teacher, teacher, criterion, crops, optimizer),
            *([0.03] * STEPS, [1e-4] * STEPS, [0.9] * STEPS, 0, None, args),
        )
        model = copy.deepcopy(run.initial)
        steps, state = slowly(run, crops, slow, SlowSGD(0.03, 0.9, 1e-4))
        loss, gradients, end = run.errors(steps, state)
        model.load_state_dict(state)
        slow.follow(model)
        end = max(
            end,
            codebases.worst({"center": criterion.center[0]}, {"center": slow.center}),
            codebases.worst(teacher.state_dict(), slow.teacher.state_dict()),
        )
    Row(name, codebases.commit(source), lines, loss, gradients, end).check(4)
