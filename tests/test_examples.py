"""The examples step by step beside eq. 4, written image by image in float64."""

from __future__ import annotations

import copy
import functools
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from processes import run_in_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mixmask
from mixmask.examples import accelerate_loop, amp, ddp, parts, plain

N, C, K, STEPS = 8, 16, 32, 6
Pair = tuple[Tensor, Tensor]


def start(steps: int = STEPS) -> tuple[nn.Module, Tensor, list[Pair]]:
    """Return an encoder, a queue and pairs of views of photographs, in float64."""
    torch.manual_seed(4)  # With some others, a gradient scaler skips its first step.
    pairs = [(x_q.double(), x_k.double()) for x_q, x_k in parts.load_views(steps, N)]
    return parts.build_encoder(C).double(), parts.build_queue(K, C).double(), pairs


def by_hand(
    encoder: nn.Module,
    queue: Tensor,
    steps: Sequence[Sequence[Pair]],
    *,
    mixed_first: bool = False,
    accumulate: int = 1,
) -> list[list[Tensor]]:
    """Train in place as MoCo's algorithm 1 and MixMask's eq. 4 say; losses by step and process.

    Each step holds a pair of views for each process; processes draw the same mask, and the first
    one's batch statistics are kept.
    """
    encoder_k = copy.deepcopy(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), parts.LR, momentum=0.9)
    masks, found = mixmask.BlockMaskGenerator(grid_size=4), []
    for step, pairs in enumerate(steps):
        if step % accumulate == 0:
            for of_k, of_q in zip(encoder_k.parameters(), encoder.parameters(), strict=True):
                of_k.data = parts.MOMENTUM * of_k.data + (1 - parts.MOMENTUM) * of_q.data
        cells, keys, losses = masks(), [], []
        for rank, (x_q, x_k) in enumerate(pairs):
            nets = [encoder, encoder_k]
            if rank:  # Statistics of its own, which the first process's replace.
                nets = [functools.partial(_on_copies, net) for net in nets]  # type: ignore[misc]
            k = F.normalize(nets[1](x_k), dim=1).detach()
            losses.append(_loss(nets[0], x_q, k, queue, cells, mixed_first=mixed_first))
            keys.append(k)
        (torch.stack(losses).mean() / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        queue = torch.cat([*keys, queue])[:K]
        found.append([loss.detach() for loss in losses])
    return found


def _on_copies(net: nn.Module, images: Tensor) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    return torch.func.functional_call(net, buffers, (images,))  # type: ignore[no-any-return]


def _loss(
    net: Callable[[Tensor], Tensor],
    x_q: Tensor,
    k: Tensor,
    queue: Tensor,
    cells: Tensor,
    *,
    mixed_first: bool,
) -> Tensor:
    kept = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)  # (32, 32)
    mixed = torch.stack([torch.where(kept, x, y) for x, y in zip(x_q, x_q.flip(0), strict=True)])
    order = [mixed, x_q] if mixed_first else [x_q, mixed]
    rows = [F.normalize(net(images), dim=1) for images in order]
    q_mixed, q = rows if mixed_first else rows[::-1]
    lam, total = float(kept.double().mean()), torch.zeros((), dtype=x_q.dtype)
    for i in range(N):
        for share, query, key in (
            (1, q[i], k[i]),
            (lam, q_mixed[i], k[i]),
            (1 - lam, q_mixed[i], k[N - 1 - i]),
        ):
            logits = torch.cat([(query @ key)[None], queue @ query]) / parts.TEMPERATURE
            total = total - share * logits.log_softmax(dim=0)[0] / N
    return total


def expect(
    losses: Any, encoder: nn.Module, rtol: float = 1e-10, of_state: float = 1e-10, **options: Any
) -> None:
    """Compare losses, weights and batch statistics with those of `by_hand`."""
    slow, queue, pairs = start()
    torch.manual_seed(0)
    expected = by_hand(slow, queue, [[pair] for pair in pairs], **options)
    found = torch.stack([torch.as_tensor(loss).double() for loss in losses])
    torch.testing.assert_close(found, torch.tensor(expected).double()[:, 0], rtol=rtol, atol=0)
    for ours, theirs in zip(encoder.state_dict().values(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=of_state, atol=of_state)


def test_plain() -> None:
    encoder, queue, pairs = start()
    torch.manual_seed(0)
    expect(list(plain.train(encoder, queue, pairs)), encoder)


def test_amp_without_its_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler scales each of the two backward passes, and unscales them once."""
    monkeypatch.setattr(torch, "autocast", functools.partial(torch.autocast, enabled=False))
    encoder, queue, pairs = start()
    torch.manual_seed(0)
    expect(list(amp.train(encoder, queue, pairs)), encoder, mixed_first=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_amp(dtype: torch.dtype) -> None:
    encoder, queue, pairs = start()
    encoder.float()
    batches = [(x_q.float(), x_k.float()) for x_q, x_k in pairs]
    torch.manual_seed(0)
    losses = list(amp.train(encoder, queue.float(), batches, dtype=dtype))
    assert {loss.dtype for loss in losses} == {torch.float32}
    expect(losses, encoder, rtol=1e-2, of_state=0.1, mixed_first=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    encoder, queue, pairs = start()
    # A generator of its own: a loader draws a seed for its workers.
    loader: Any = DataLoader(pairs, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]
    torch.manual_seed(0)
    losses = list(accelerate_loop.train(accelerator, encoder, queue, loader))
    expect(losses, encoder, accumulate=accumulate)


def _lightning() -> Any:
    pytest.importorskip("pytorch_lightning", reason="comes with the extra mixmask[lightly]")
    from mixmask.examples import lightning_module

    return lightning_module


def test_lightning(tmp_path: Path) -> None:
    module = _lightning()
    encoder, queue, pairs = start()
    model = module.MoCo(encoder, queue)
    losses: list[Tensor] = []

    class Losses(module.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, *_: Any) -> None:
            if not losses:  # What the frame draws before is its own.
                torch.manual_seed(0)

        def on_train_batch_end(self, _trainer: Any, _model: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].detach())

    with warnings.catch_warnings():
        # Lightning's own: few workers, and what it still calls in torch.
        warnings.simplefilter("ignore")
        trainer = module.pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[Losses()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, DataLoader(pairs, batch_size=None))  # type: ignore[arg-type]
    expect(losses, model.encoder)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    torch.testing.assert_close(saved["queue"], model.queue)


def one_of_two(rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train with every second pair of views, in a process of two."""
    encoder, queue, pairs = start(2 * STEPS)
    if rank:
        # The first process's weights and queue replace these.
        encoder, queue = parts.build_encoder(C).double(), parts.build_queue(K, C).double()
    torch.manual_seed(0)
    losses = list(ddp.train(encoder, queue, pairs[rank::2]))
    return losses, encoder.state_dict()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    found = run_in_processes(one_of_two, tmp_path)
    encoder, queue, pairs = start(2 * STEPS)
    steps = [pairs[2 * step : 2 * step + 2] for step in range(STEPS)]
    torch.manual_seed(0)
    expected = torch.tensor(by_hand(encoder, queue, steps, mixed_first=True)).double()
    for rank, (losses, state) in enumerate(found):
        torch.testing.assert_close(torch.stack(losses), expected[:, rank], rtol=1e-10, atol=0)
        for name, parameter in encoder.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-10, atol=1e-10)
        if rank == 0:
            torch.testing.assert_close(state, encoder.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "amp", "accelerate_loop", "lightning_module"])
def test_they_run_by_themselves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "lightning_module":
        _lightning()
    with warnings.catch_warnings():
        # Lightning's own, and that of a module which has been imported before.
        warnings.simplefilter("ignore")
        runpy.run_module(f"mixmask.examples.{name}", run_name="__main__")
    assert "loss 1" in capsys.readouterr().out  # Above 10, once real keys fill the queue.


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, steps", [("ddp", parts.STEPS), ("accelerate_loop", parts.STEPS // 2)]
)
def test_they_run_under_torchrun(name: str, steps: int) -> None:
    """accelerate deals the batches out to the processes; the DDP example draws them in each."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-m", *command, "-m", f"mixmask.examples.{name}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        )
        # gloo's threads can abort a process that has done all its work (PyTorch's issue 190489).
        if "terminate called without an active exception" not in run.stderr:
            break
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(": loss") == steps


@pytest.mark.parametrize(
    "names, module",
    [
        (["accelerate"], "accelerate_loop"),
        (["lightning", "pytorch_lightning"], "lightning_module"),
    ],
)
def test_a_missing_library_is_named(names: list[str], module: str) -> None:
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"
        f"import mixmask.examples.{module}\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"pip install {names[0]}" in run.stderr.splitlines()[-1]


def test_photographs_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    x_q, x_k = next(iter(parts.load_views(1, 4)))
    assert x_q.shape == x_k.shape == (4, 3, 32, 32)
