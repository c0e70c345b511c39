"""Three steps of public codebases' own training code, with our lines in it, beside an oracle.

Runs where `MIXMASK_CODEBASES` names a folder of checkouts, and is skipped elsewhere. Each run is
theirs from `main_worker` on: model, DistributedDataParallel, optimizer and loop. The oracle shares
with it the network's layers and the masks that were drawn, nothing else; it follows the papers in
plain loops.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import codebases
import pytest
import torch
import torch.nn.functional as F
from codebases import Row, Run, SlowSGD, Step
from torch import Tensor

N, STEPS = 8, 3

MOCO_ARGS = {
    "arch": "resnet18",
    "batch_size": N,
    "cos": False,
    "data": ".",
    "dist_backend": "gloo",
    "dist_url": "",
    "distributed": True,
    "aug_plus": False,
    "epochs": 1,
    "gpu": 0,
    "lr": 0.03,
    "mlp": True,
    "moco_dim": 16,
    "moco_k": 4 * N,
    "moco_m": 0.9,
    "moco_t": 0.2,
    "momentum": 0.9,
    "multiprocessing_distributed": True,
    "print_freq": 10,
    "rank": 0,
    "resume": "",
    "schedule": [],
    "start_epoch": 0,
    "weight_decay": 1e-4,
    "workers": 0,
    "world_size": 1,
}


@pytest.fixture
def batches() -> list[Any]:
    return codebases.photograph_pairs(STEPS, N)


def _contrast(q: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """-log of a softmax, for one query (C,), one key (C,) and a queue (C, K)."""
    logits = torch.stack([q @ key, *(q @ queue[:, j] for j in range(queue.shape[1]))])
    return -(logits / temperature).log_softmax(dim=0)[0]


def moco_slowly(
    run: Run, batches: Sequence[Any], args: Any
) -> tuple[list[Step], dict[str, Tensor]]:
    """MoCo, eq. 1 and 2 with its queue as a ring, plus MixMask, eq. 4."""
    online, momentum = (
        copy.deepcopy(run.initial.get_submodule(n)) for n in ("encoder_q", "encoder_k")
    )
    queue, pointer = run.initial.queue.clone(), 0
    weights = {f"encoder_q.{name}": weight for name, weight in online.named_parameters()}
    optimizer, steps = SlowSGD(args.lr, args.momentum, args.weight_decay), []
    for (x_q, x_k), cells in zip((views for views, _ in batches), run.masks, strict=True):
        for of_q, of_k in zip(online.parameters(), momentum.parameters(), strict=True):
            of_k.data = args.moco_m * of_k.data + (1 - args.moco_m) * of_q.data
        q = F.normalize(online(x_q), dim=1)
        k = F.normalize(momentum(x_k), dim=1).detach()
        x_mixed, lam = codebases.mixed_slowly(x_q, cells)
        q_mixed = F.normalize(online(x_mixed), dim=1)
        loss = torch.zeros(())
        for i in range(N):
            loss = loss + _contrast(q[i], k[i], queue, args.moco_t)
            loss = loss + lam * _contrast(q_mixed[i], k[i], queue, args.moco_t)
            loss = loss + (1 - lam) * _contrast(q_mixed[i], k[N - 1 - i], queue, args.moco_t)
        loss = loss / N
        gradients = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))
        optimizer.step(weights, gradients)
        for key in k:
            queue[:, pointer] = key
            pointer = (pointer + 1) % args.moco_k
        steps.append(Step(loss.detach(), gradients))
    state = {"queue": queue, "queue_ptr": torch.tensor([pointer])}
    for prefix, encoder in (("encoder_q", online), ("encoder_k", momentum)):
        state |= {f"{prefix}.{name}": value for name, value in encoder.state_dict().items()}
    return steps, state


# What torch refuses since 1.7.
VIEW = ("correct[:k].view(-1)", "correct[:k].reshape(-1)")
IMPORT = (
    "import torch.utils.data.distributed\n",
    """import torch.utils.data.distributed
import mixmask
from mixmask.integrations.moco import mixed_loss, wrap
""",
)
WRAP = (
    "    print(model)\n",
    "    model = wrap(model, mixmask.BlockMaskGenerator(4, 0.4))\n    print(model)\n",
)


def test_moco(batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = codebases.checkout("moco")
    lines = codebases.patched(
        source,
        tmp_path,
        {
            "main_moco.py": [
                IMPORT,
                WRAP,
                (
                    "loss = criterion(output, target)",
                    "loss = criterion(output, target) + mixed_loss(model)",
                ),
            ]
        },
        repairs=[("deeplearning.cross_image_ssl.moco", "moco"), VIEW],
    )
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(**MOCO_ARGS)
    with (
        codebases.on_cpu(batches) as run,
        codebases.loaded(tmp_path / "main_moco.py") as script,
    ):
        script.main_worker(0, 1, args)
        errors = run.errors(*moco_slowly(run, batches, args))
    Row("facebookresearch/moco", codebases.commit(source), lines, *errors).check(2)
