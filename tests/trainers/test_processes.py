"""Two processes that train together, as `accelerate launch` starts them, against one.

Weights, queue and prototypes are the same on both, step by step. The running statistics of batch
norm are not: each process has those of its own images, as is usual without --sync-bn.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from processes import launch_processes
from tiny_runs import build_tiny, gradients, note_mixes, run, seeded, tiny_config, tiny_images
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixmask import MixedBatch, _distributed, mix_batch
from mixmask._distributed import average, exchange_rows
from mixmask.trainers import loop
from mixmask.trainers.methods import METHODS, build_method
from mixmask.trainers.methods.moco import MoCo
from mixmask.trainers.methods.simsiam import SimSiam
from mixmask.trainers.run import Run

pytestmark = pytest.mark.slow

WORLD, N = 2, 4
Results = list[dict[str, Any]]

# Options of the comparison with one process.
JOINT: dict[str, dict[str, Any]] = {
    "moco-v1": {},
    "moco-v2": {"symmetric": True},
    "simclr": {},
    "byol": {},
    "simsiam": {},
    "barlow-twins": {},
    "swav": {"frozen": 0.0},
}
# Partners within each half; those of the second one are counted from its own first image.
HALVES = torch.tensor([[3, 2, 0, 1], [1, 2, 3, 0]])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy all that must be the same everywhere: everything but batch norm's statistics."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if not name.endswith(statistics)}


@contextmanager
def _watching(method: type[Any], name: str, before: Any) -> Iterator[None]:
    """Call something before each call of a method's function."""
    original = getattr(method, name)

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        before(self, *arguments)
        return original(self, *arguments, **options)

    setattr(method, name, watched)
    try:
        yield
    finally:
        setattr(method, name, original)


def _train_each(rank: int, folder: Path) -> dict[str, Any]:
    """Train every method for a few steps, the processes naming run folders of their own."""
    found = {}
    for method in METHODS:
        config = tiny_config(method, batch_size=N, epochs=2)
        model = run(config, tiny_images(16), folder / f"rank{rank}" / method)
        found[method] = _weights(model)
    return found


def _fill_a_queue(folder: Path) -> dict[str, Any]:
    """Train MoCo for ten steps and note the keys of each."""
    keys: list[Tensor] = []
    config = tiny_config("moco-v2", batch_size=N, epochs=2, queue_size=29)
    with _watching(
        MoCo, "after_step", lambda self, _: keys.append(torch.cat(self.new_keys).clone())
    ):
        model = run(config, tiny_images(40), folder / "queue")
    return {"keys": keys, "queue": model.queue.keys, "position": model.queue.position}


def _look_at_one_image(folder: Path) -> dict[str, Any]:
    """Note what a step sees of one photograph, the same everywhere in the data."""
    seen: list[Tensor] = []
    noted: list[list[MixedBatch]] = []

    def note(self: SimSiam, x1: Tensor, x2: Tensor, generator: torch.Generator) -> None:
        del generator
        seen.extend((x1.clone(), x2.clone()))
        noted.append(note_mixes(self))

    config = tiny_config(
        "simsiam", batch_size=N, epochs=1, grid_size=8, pattern="discrete", per_sample=True
    )
    images = tiny_images(1).expand(2 * N, -1, -1, -1)
    with _watching(SimSiam, "terms", note):
        run(config, images, folder / "views")
    mask = noted[0][0].mask
    assert mask is not None
    return {"views": torch.stack(seen), "mask": mask}


def _views() -> tuple[Tensor, Tensor, Tensor]:
    """Two views and masks, each (WORLD, N, ...)."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(2 * WORLD * N, 3, 4, 4, generator=generator)
    views = nn.functional.interpolate(coarse, 32, mode="bicubic").view(2, WORLD, N, 3, 32, 32)
    masks = torch.rand(WORLD, N, 4, 4, generator=generator) < 0.5
    return views[0], views[1], masks


class _Synchronised(nn.Module):
    """Batch norm over all processes, for CPUs, on which torch has none."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        over = [0, *range(2, x.ndim)]
        per_feature = (1, -1, *[1] * (x.ndim - 2))
        x = x - average(x.mean(dim=over)).view(per_feature)
        variance = average(x.square().mean(dim=over)).view(per_feature)
        x = x * (variance + self.norm.eps).rsqrt()
        if self.norm.affine:
            x = x * self.norm.weight.view(per_feature) + self.norm.bias.view(per_feature)
        return x


def _synchronise(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _Synchronised(child))
        else:
            _synchronise(child)


def _step(method: str, x1: Tensor, x2: Tensor, masks: Tensor, partner: Tensor) -> Any:
    """Return a model with the gradients of one training step, and the step's losses.

    Several processes take the statistics of their images together; one uses torch's batch norm.
    """
    model, _, _ = build_tiny(method, mix="mixmask", **JOINT[method])
    if dist.is_initialized():
        _synchronise(model)
    if method == "barlow-twins":  # It has no loss of one image, so all share a mask.
        masks = _views()[2][0, 0]
    model.mixtures = [lambda images, _: mix_batch(images, masks, partner=partner)]
    losses = []
    for term in model.terms(x1, x2, seeded()):
        term.loss.backward()
        losses.append(term.loss.detach())
    return model, torch.stack(losses)


def _compare(rank: int) -> dict[str, Any]:
    accelerator = Accelerator()
    assert (accelerator.num_processes, accelerator.process_index) == (WORLD, rank)
    found = {}
    for method in JOINT:
        x1, x2, masks = (half[rank] for half in _views())
        model, losses = _step(method, x1, x2, masks, HALVES[rank])
        loop._average_gradients(accelerator, model.parameters())
        by_name = {name.replace(".norm.", "."): g for name, g in gradients(model).items()}
        found[method] = {"losses": losses, "gradients": by_name}
    return found


def _shuffle_keys(rank: int) -> dict[str, Any]:
    """Embed keys with statistics of the shuffled batch, of the process's own, and of neither."""
    torch.manual_seed(0)
    model: Any = build_method(tiny_config("moco-v2"))
    images = _views()[1][rank]
    model.eval()  # First, while running statistics are still alike.
    fixed = model.key_head(model.key_backbone(images)).detach()
    unshuffled = model.encode_keys(images, seeded(rank + 7))
    model.train()
    own = model.key_head(model.key_backbone(images)).detach()
    return {
        "fixed": nn.functional.normalize(fixed, dim=1),
        "unshuffled": unshuffled,
        "shuffled": model.encode_keys(images, seeded(rank)),
        "again": model.encode_keys(images, seeded(rank)),
        "own": nn.functional.normalize(own, dim=1),
        "exchanged": (once := exchange_rows(10 * rank + torch.arange(5))),
        "returned": exchange_rows(once),
    }


def _interrupt(rank: int, folder: Path) -> dict[str, Any]:
    """Interrupt one of the processes alone, resume, and compare with a whole run."""
    loop._ASK_EVERY = 1  # Otherwise so short a run would end first.
    config = tiny_config("moco-v2", batch_size=N, epochs=2, mix="both")
    images, out = tiny_images(16), folder / "parts"
    whole = run(config, images, folder / "whole")
    steps: list[float] = []

    def after(self: MoCo, done: float) -> None:
        del self
        steps.append(done)
        if rank == 1 and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with _watching(MoCo, "after_step", after):
        try:
            run(config, images, out)
        except KeyboardInterrupt:
            steps.append(-1)
    dist.barrier()
    resumed = run(config, images, out, resume=True)
    return {"steps": steps, "whole": _weights(whole), "resumed": _weights(resumed)}


def _diverge(rank: int, folder: Path) -> str:
    """Let the loss of one process be no number in the last step of an epoch."""
    calls = [0]
    project = SimSiam.project

    def diverging(self: SimSiam, images: Tensor) -> Tensor:
        calls[0] += 1
        z = project(self, images)
        return z * float("nan") if rank == 1 and calls[0] == 12 else z

    SimSiam.project = diverging  # type: ignore[method-assign]
    try:
        run(tiny_config("simsiam", batch_size=N, epochs=3), tiny_images(16), folder / "nan")
    except FloatingPointError as error:
        return str(error)
    finally:
        SimSiam.project = project  # type: ignore[method-assign]
    return "not noticed"


def _save_by_the_clock(rank: int, folder: Path) -> list[int]:
    """Note when a process saves, while only the clock of the first one says that it is due."""
    loop._ASK_EVERY = 2
    steps: list[int] = []
    config = tiny_config("simsiam", batch_size=N, epochs=1, save_minutes=(1e-9, 1e9)[rank])
    with _watching(Run, "save", lambda self, **_: steps.append(self.step)):
        run(config, tiny_images(40), folder / "clock")
    return steps


def _work(rank: int, folder: Path) -> dict[str, Any]:
    """Do everything once in one of the processes."""
    warnings.simplefilter("error")
    return {
        "trained": _train_each(rank, folder),
        "queue": _fill_a_queue(folder),
        "seen": _look_at_one_image(folder),
        "joint": _compare(rank),
        "keys": _shuffle_keys(rank),
        "interrupted": _interrupt(rank, folder),
        "diverged": _diverge(rank, folder),
        "saved": _save_by_the_clock(rank, folder),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> Results:
    """Start two processes and return what each of them found."""
    return launch_processes(_work, folder, seconds=240)


@pytest.mark.parametrize("method", METHODS)
def test_both_processes_end_in_the_same_weights(found: Results, method: str) -> None:
    first, second = (one["trained"][method] for one in found)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    torch.manual_seed(0)
    untrained = build_method(tiny_config(method, batch_size=N))
    assert all(
        not torch.equal(first[f"backbone.{name}"], p)
        for name, p in untrained.backbone.named_parameters()
    )


def test_the_first_process_alone_writes_files(found: Results, folder: Path) -> None:
    del found
    assert not (folder / "rank1").exists()
    for method in METHODS:
        files = {file.name for file in (folder / "rank0" / method).iterdir()}
        assert files == {"config.json", "last.pt", "previous.pt", "metrics.csv"}


def test_the_queue_holds_the_keys_of_both(found: Results) -> None:
    first, second = (one["queue"] for one in found)
    assert torch.equal(first["queue"], second["queue"])
    steps = list(zip(first["keys"], second["keys"], strict=True))
    assert len(steps) == 10
    assert all(not torch.equal(mine, theirs) for mine, theirs in steps)
    newest = torch.cat([keys for both in steps for keys in both])[-29:]
    position = int(first["position"])
    assert position == 10 * WORLD * N % 29
    torch.testing.assert_close(first["queue"].roll(-position, 0), newest, rtol=0, atol=0)


def test_views_and_masks_differ_between_processes(found: Results) -> None:
    first, second = (one["seen"] for one in found)
    views = torch.stack([first["views"], second["views"]]).flatten(0, 2)
    apart = torch.cdist(views.flatten(1), views.flatten(1)) + 1e9 * torch.eye(len(views))
    assert apart.min() > 1
    masks = torch.cat([first["mask"], second["mask"]]).flatten(1).float()
    assert len(masks.unique(dim=0)) == WORLD * N


@pytest.mark.parametrize("method", JOINT)
def test_one_step_of_two_halves_is_one_step_of_the_whole_batch(found: Results, method: str) -> None:
    x1, x2, masks = (both.flatten(0, 1) for both in _views())
    partner = (HALVES + torch.arange(WORLD)[:, None] * N).flatten()
    model, losses = _step(method, x1, x2, masks, partner)
    halves = [one["joint"][method] for one in found]
    mean = torch.stack([half["losses"] for half in halves]).mean(dim=0)
    torch.testing.assert_close(mean, losses, rtol=1e-4, atol=1e-6)
    if method != "barlow-twins":  # Whose correlations are those of all images, everywhere.
        assert any((half["losses"] - losses).abs().max() > 1e-3 for half in halves)
    for half in halves:
        torch.testing.assert_close(half["gradients"], gradients(model), rtol=1e-3, atol=1e-5)


def test_keys_are_shuffled_over_both_and_come_back_in_order(found: Results) -> None:
    for one in found:
        keys = one["keys"]
        assert torch.equal(keys["shuffled"], keys["again"])
        assert (keys["shuffled"] - keys["own"]).abs().max() > 1e-3
        torch.testing.assert_close(keys["unshuffled"], keys["fixed"])


def test_exchanged_rows_come_from_all_and_return(found: Results) -> None:
    first, second = (one["keys"] for one in found)
    assert first["exchanged"].tolist() == [0, 1, 2, 10, 11]
    assert second["exchanged"].tolist() == [3, 4, 12, 13, 14]
    assert first["returned"].tolist() == [0, 1, 2, 3, 4]
    assert second["returned"].tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("n", [1, 7, 8, 64])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_each_process_receives_as_many_rows_as_it_has(
    n: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(_distributed, "world_size", lambda: world)
    monkeypatch.setattr(dist, "all_to_all_single", lambda *given: sent.append(given[2:]))
    for rank in range(world):
        monkeypatch.setattr(_distributed, "rank", lambda rank=rank: rank)
        assert exchange_rows(torch.zeros(n, 2)).shape == (n, 2)
    for rank, (received, given) in enumerate(sent):
        assert sum(received) == sum(given) == n
        assert max(given) - min(given) <= 1
        # What a process expects from another is what that one gives.
        assert received == [sizes[1][rank] for sizes in sent]


def test_one_interrupted_process_stops_both_at_the_same_step(found: Results) -> None:
    for one in found:
        assert one["interrupted"]["steps"] == [0.25, 0.5, 0.75, -1]
        for name, tensor in one["interrupted"]["whole"].items():
            assert torch.equal(one["interrupted"]["resumed"][name], tensor), name


def test_both_save_when_the_clock_of_the_first_says_so(found: Results) -> None:
    for one in found:
        assert one["saved"] == [2, 4, 5]


def test_a_loss_that_is_no_number_anywhere_stops_both(found: Results, folder: Path) -> None:
    for one in found:
        assert "the loss became nan in epoch 2" in one["diverged"]
    kept = torch.load(folder / "nan" / "last.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in kept["model"].values())
