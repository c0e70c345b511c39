"""Three steps of public codebases' own training code, with our lines in it, beside an oracle.

Runs where `MIXMASK_CODEBASES` names a folder of checkouts, and is skipped elsewhere. Each run is
theirs from `main_worker` on: model, DistributedDataParallel, optimizer and loop. The oracle shares
with it the network's layers and the masks that were drawn, nothing else; it follows the papers in
plain loops.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import codebases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from codebases import Row, Run, SlowSGD, Step
from torch import Tensor

import mixmask

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


Mixture = Callable[[Tensor], tuple[Tensor, float | None]]


def drawn(run: Run) -> Mixture:
    """Mix with the masks that were drawn, one per call."""
    masks = iter(run.masks)
    return lambda images: codebases.mixed_slowly(images, next(masks))


def moco_slowly(
    run: Run, batches: Sequence[Any], args: Any, mixtures: Sequence[Mixture]
) -> tuple[list[Step], dict[str, Tensor]]:
    """MoCo, eq. 1 and 2 with its queue as a ring, plus MixMask's eq. 4 once per mixture."""
    online, momentum = (
        copy.deepcopy(run.initial.get_submodule(name)) for name in ("encoder_q", "encoder_k")
    )
    queue, pointer = run.initial.queue.clone(), 0
    weights = {f"encoder_q.{name}": weight for name, weight in online.named_parameters()}
    optimizer, steps = SlowSGD(args.lr, args.momentum, args.weight_decay), []
    for (x_q, x_k), _ in batches:
        for of_q, of_k in zip(online.parameters(), momentum.parameters(), strict=True):
            of_k.data = args.moco_m * of_k.data + (1 - args.moco_m) * of_q.data
        q = F.normalize(_embedding(online(x_q)), dim=1)
        k = F.normalize(_embedding(momentum(x_k)), dim=1).detach()
        loss = torch.zeros(())
        for i in range(N):
            loss = loss + _contrast(q[i], k[i], queue, args.moco_t)
        for mix in mixtures:
            x_mixed, lam = mix(x_q)
            q_mixed = F.normalize(_embedding(online(x_mixed)), dim=1)
            if lam is None:
                # In no loss: it moves batch norm alone.
                continue
            for i, row in enumerate(q_mixed):
                loss = loss + lam * _contrast(row, k[i], queue, args.moco_t)
                loss = loss + (1 - lam) * _contrast(row, k[N - 1 - i], queue, args.moco_t)
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


def _embedding(output: Any) -> Tensor:
    """Return what an encoder embeds to; OpenMixup's return a list of one."""
    return output if isinstance(output, Tensor) else output[0]


# What torch refuses since 1.7, and NumPy since 1.24.
VIEW = ("correct[:k].view(-1)", "correct[:k].reshape(-1)")
NUMPY = [("np.int(", "int("), ("np.int)", "int)")]
SIZE = ("args.size = 224", "args.size = 32")


def _run_moco(
    script: Path, batches: Sequence[Any], mixtures: Callable[[Run], Sequence[Mixture]], **more: Any
) -> tuple[float, float, float]:
    """Run a script's `main_worker`, and return its errors."""
    args = SimpleNamespace(**MOCO_ARGS, **more)
    with (
        codebases.on_cpu(batches) as run,
        codebases.loaded(script, stubs=("wandb",)) as module,
    ):
        module.main_worker(0, 1, args)
        return run.errors(*moco_slowly(run, batches, args, mixtures(run)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of the test: the scripts write checkpoints where they stand."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_moco(batches: list[Any], folder: Path) -> None:
    name = "facebookresearch/moco"
    repairs = [("deeplearning.cross_image_ssl.moco", "moco"), VIEW]
    source, lines = codebases.patched("moco", name, folder, repairs)
    errors = _run_moco(folder / "main_moco.py", batches, lambda run: [drawn(run)])
    Row(name, codebases.commit(source), lines, *errors).check(2)


def test_unmix(batches: list[Any], folder: Path) -> None:
    """Un-Mix with MixMask on top, which the paper calls both."""
    name = "szq0214/Un-Mix"
    source, lines = codebases.patched("Un-Mix", name, folder, [*NUMPY, VIEW])

    def unmix() -> Mixture:
        """Un-Mix, section 3: mixup or a box, by a coin."""
        draws = np.random.RandomState(0)

        def mix(images: Tensor) -> tuple[Tensor, float]:
            coin, lam = draws.rand(1), draws.beta(1.0, 1.0)
            if coin < 0.5:
                return lam * images + (1 - lam) * images.flip(0), lam
            size = images.shape[-1]
            side = int(size * (1 - lam) ** 0.5) // 2
            middle = draws.randint(size), draws.randint(size)
            mixed, pasted = images.clone(), 0
            for i, j in itertools.product(range(size), repeat=2):
                if all(c - side <= at < c + side for c, at in zip(middle, (i, j), strict=True)):
                    mixed[:, :, i, j], pasted = images.flip(0)[:, :, i, j], pasted + 1
            return mixed, 1 - pasted / size**2

        return mix

    np.random.seed(0)  # noqa: NPY002 - Un-Mix draws from it.
    errors = _run_moco(
        folder / "UnMix_MoCo" / "for_ImageNet" / "main_moco_unmix.py",
        batches,
        lambda run: [unmix(), drawn(run)],
        moco_tm=0.2,
        beta=1.0,
        unmix_prob=0.5,
    )
    Row(name, codebases.commit(source), lines, *errors).check(2)


THEIR_MASKS = {
    "moco_tm": 0.2,
    "method": "mixmask",
    "mask_type": "block",
    "mask_lam": 0.4,
    "grid_size": 4,
    "exp_path": ".",
    "debug": True,
    "checkpoint_freq": 1,
}


def test_mixmask_with_our_masks(batches: list[Any], folder: Path) -> None:
    """The authors' own loss, which is eq. 4 for an even batch, around our masks."""
    name = "kirill-vish/MixMask"
    source, lines = codebases.patched("MixMask", name, folder, [SIZE, *NUMPY], number=1)
    script = folder / "main_moco_mixmask.py"
    errors = _run_moco(script, batches, lambda run: [drawn(run)], **THEIR_MASKS)
    Row(f"{name}, our masks alone", codebases.commit(source), lines, *errors).check(2)


def test_mixmask_wrapped(batches: list[Any], folder: Path) -> None:
    """Our term in place of theirs, whose forward pass goes on to move batch norm."""
    name = "kirill-vish/MixMask"
    kept = "output, target, output_m, output_m_flip = model(im_q=images[0]"
    keep = (kept, f"args.theirs.append(mixed_images); {kept}")
    source, lines = codebases.patched("MixMask", name, folder, [SIZE, *NUMPY, keep])
    theirs: list[Tensor] = []

    def unused(_: Tensor) -> tuple[Tensor, None]:
        return theirs.pop(0), None

    errors = _run_moco(
        folder / "main_moco_mixmask.py",
        batches,
        lambda run: [unused, drawn(run)],
        theirs=theirs,
        **THEIR_MASKS,
    )
    Row(name, codebases.commit(source), lines, *errors).check(2)


OPENMIXUP = """
from mmcv.runner import EpochBasedRunner, OptimizerHook

import mixmask
from mixmask.integrations.moco import wrap
from openmixup.models import build_model
"""


def test_openmixup(batches: list[Any], folder: Path) -> None:
    """Their model in mmcv's runner, which their tools/train.py starts."""
    pytest.importorskip("mmcv", reason="openmixup needs mmcv 1, which is not installed")
    name = "Westlake-AI/openmixup"
    source, lines = codebases.patched("openmixup", name, folder)
    (folder / "train.py").write_text(OPENMIXUP)
    args = SimpleNamespace(**MOCO_ARGS)
    config = {
        "type": "MOCO",
        "queue_len": args.moco_k,
        "feat_dim": args.moco_dim,
        "momentum": args.moco_m,
        "backbone": {"type": "ResNet", "depth": 18, "num_stages": 4, "out_indices": (3,)},
        "neck": {
            "type": "MoCoV2Neck",
            "in_channels": 512,
            "hid_channels": 32,
            "out_channels": args.moco_dim,
        },
        "head": {"type": "ContrastiveHead", "temperature": args.moco_t},
    }
    loader = [{"img": views} for views, _ in batches]
    with (
        codebases.on_cpu() as run,
        codebases.loaded(folder / "train.py", stubs=("seaborn",)) as script,
    ):
        model = script.wrap(script.build_model(config), mixmask.BlockMaskGenerator(4, 0.4))
        run.start(model)
        optimizer = torch.optim.SGD(
            model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
        )
        runner = script.EpochBasedRunner(
            model,
            optimizer=optimizer,
            work_dir=str(folder),
            logger=logging.getLogger(),
            max_epochs=1,
        )
        runner.register_hook(script.OptimizerHook())
        runner.run([loader], [("train", 1)])
        steps, state = moco_slowly(run, batches, args, [drawn(run)])
        # Their model has the query's backbone under a second name.
        prefix = "encoder_q.0."
        for step in steps:
            step.gradients = {
                key.replace(prefix, "backbone."): value for key, value in step.gradients.items()
            }
        for key in [key for key in state if key.startswith(prefix)]:
            state[key.replace(prefix, "backbone.")] = state[key]
        errors = run.errors(steps, state)
    Row(name, codebases.commit(source), lines, *errors).check(2)
