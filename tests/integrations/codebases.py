"""Run other people's training code, with a recipe's lines in it, beside a slow oracle.

`MIXMASK_CODEBASES` names a folder of checkouts, one per codebase. A test takes one of them:

    source, lines = codebases.patched("moco", "facebookresearch/moco", tmp_path)
    with codebases.on_cpu(batches) as run, codebases.loaded(tmp_path / "main_moco.py") as script:
        script.main_worker(0, 1, args)
    Row("moco", codebases.commit(source), lines, *run.errors(slow_steps, slow_state)).check(2)

Their scripts ask for several GPUs; `on_cpu` gives them one process on the CPU, in float64, and
keeps each step's loss and gradients. No other line of theirs is changed.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stdout,
)
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import recipes_page
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.data.sets import load_data
from mixmask.masks import BlockMaskGenerator

FOLDER = "MIXMASK_CODEBASES"
TOLERANCE = 1e-9

Edit = tuple[str, str]
Named = Mapping[str, Tensor]
_Replaced = tuple[Any, str, Any]


def checkout(name: str) -> Path:
    """Return the checkout of a codebase, or skip the test and say why."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        pytest.skip(f"{FOLDER} is not set; it names a folder with checkouts of other codebases")
    path = Path(folder) / name
    if not path.is_dir():
        pytest.skip(f"no checkout of {name} in {FOLDER}={folder}")
    return path


def commit(source: Path) -> str:
    """Return the commit that a checkout is at."""
    command = ["git", "-C", str(source), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# The page's masks keep half of an image, and so would not tell λ from 1 - λ.
SHARES = {"grid_size=8)": "grid_size=4, ratio=0.4)", "grid_size=4)": "grid_size=4, ratio=0.4)"}


def patched(
    name: str, section: str, target: Path, repairs: Sequence[Edit] = (), *, number: int = 0
) -> tuple[Path, int]:
    """Copy the Python files of a checkout with a recipe's lines in them.

    Args:
        name: The checkout.
        section: The recipe's heading.
        target: Where the copy goes.
        repairs: What a checkout needs to run at all today; replaced in every file, not counted.
        number: Which of the section's diffs.

    Returns:
        The checkout, and the number of lines added or changed by the recipe, imports aside.
    """
    source = checkout(name)
    for file in source.rglob("*.py"):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(file.read_text())
    lines = 0
    for changed in recipes_page.apply(section, number, target, SHARES):
        lines += changed_lines((source / changed).read_text(), (target / changed).read_text())
    for place in target.rglob("*.py") if repairs else ():
        text = place.read_text()
        for old, new in repairs:
            text = text.replace(old, new)
        place.write_text(text)
    return source, lines


def changed_lines(before: str, after: str) -> int:
    """Count the lines that were added or changed, imports and blank ones aside."""
    old, new = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    counted = 0
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind != "equal":
            ours = [line for line in new[start:end] if not _IMPORT.match(line)]
            counted += max(len(ours), last - first)
    return counted


_IMPORT = re.compile(r"\s*$|\s*(import|from) [\w.]+")


@contextmanager
def loaded(script: Path, *, stubs: Sequence[str] = ()) -> Iterator[ModuleType]:
    """Import a script under a name of its own, its folder first on the path.

    Args:
        script: The file, in a copy that `patched` made.
        stubs: Modules that it imports and does not need here, such as loggers.
    """
    folder = script.resolve().parent
    before = dict(sys.modules)
    name = f"codebase_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # What other codebases call the same (moco, utils, resnet) must not be found loaded.
    local = {path.stem for path in folder.iterdir()}
    for loaded_name in before:
        if loaded_name.split(".")[0] in local:
            del sys.modules[loaded_name]
    sys.modules.update({stub: mock.MagicMock() for stub in stubs}, **{name: module})
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))
        for loaded_name in {*sys.modules} - {*before}:
            if loaded_name.split(".")[0] in local or loaded_name in {*stubs, name}:
                del sys.modules[loaded_name]
        sys.modules.update(before)


@dataclass
class Step:
    """What one step left: its loss and the gradients, by parameter."""

    loss: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Run:
    """What was seen of a training run.

    Attributes:
        model: Their model, without DistributedDataParallel around it.
        initial: A copy of it from before the first step.
        steps: One record per call of backward.
        masks: The masks that were drawn, at cell size, in order.
    """

    model: Any = None
    initial: Any = None
    steps: list[Step] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    def start(self, model: nn.Module) -> None:
        """Say which model is trained, before its first step; DistributedDataParallel says so."""
        self.model, self.initial = model, copy.deepcopy(model)
        self.masks.clear()

    def errors(self, steps: Sequence[Step], state: Named) -> tuple[float, float, float]:
        """Return the worst relative errors of losses, gradients and end state."""
        assert len(self.steps) == len(steps)
        pairs = list(zip(self.steps, steps, strict=True))
        return (
            max(worst({"loss": ours.loss}, {"loss": slow.loss}) for ours, slow in pairs),
            max(worst(ours.gradients, slow.gradients) for ours, slow in pairs),
            worst(self.model.state_dict(), state),
        )


def worst(found: Named, expected: Named) -> float:
    """Return the worst error of any tensor, relative to its largest value.

    A tensor that is zero but for rounding (the bias before a batch norm has such a gradient) is
    measured by a ten-thousandth of the largest of all.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    sizes = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    floor = 1e-4 * max(
        [sizes[name] for name, tensor in expected.items() if tensor.is_floating_point()]
    )
    return max(
        float((found[name].double() - tensor.double()).abs().max()) / max(sizes[name], floor)
        for name, tensor in expected.items()
    )


@dataclass(frozen=True)
class Row:
    """One line of the table: three steps of a codebase against the oracle."""

    codebase: str
    commit: str
    lines: int
    loss: float
    gradients: float
    state: float

    def __str__(self) -> str:
        """Return the line, in Markdown."""
        errors = " | ".join(f"{value:.0e}" for value in (self.loss, self.gradients, self.state))
        return f"| {self.codebase} | {self.commit} | {self.lines} | {errors} |"

    def check(self, most: int) -> None:
        """Print the line; hold it to so many lines, to the page's number, and to the tolerance."""
        print(f"\n{self}")  # noqa: T201
        stated = {row["codebase"]: row for row in recipes_page.table("codebase", "loss")}
        assert self.lines == int(stated[self.codebase]["lines"]) <= most
        assert max(self.loss, self.gradients, self.state) <= TOLERANCE, str(self)


@contextmanager
def on_cpu(batches: Sequence[Any] | None = None, *, pretend: bool = False) -> Iterator[Run]:
    """Give scripts that are written for several GPUs one process on the CPU, in float64.

    `.cuda()`, automatic mixed precision and synchronised batch norm do nothing; process groups
    are a group of one; DistributedDataParallel is the real one.

    Args:
        batches: What every DataLoader yields, in place of files. None leaves loaders alone.
        pretend: Let `torch.cuda.is_available()` be True.
    """
    run = Run()
    real_ddp, backward, draw = (
        nn.parallel.DistributedDataParallel,
        cast("Any", Tensor.backward),
        BlockMaskGenerator.__call__,
    )

    def ddp(module: nn.Module, *_: Any, find_unused_parameters: bool = False, **__: Any) -> Any:
        run.start(module)
        return real_ddp(module, find_unused_parameters=find_unused_parameters)

    def watched_backward(loss: Tensor, *args: Any, **options: Any) -> None:
        backward(loss, *args, **options)
        named = run.model.named_parameters()
        gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        run.steps.append(Step(loss.detach().clone(), gradients))

    def watched_draw(masks: Any, *args: Any, **options: Any) -> Tensor:
        run.masks.append(draw(masks, *args, **options))
        return run.masks[-1]

    replaced: list[_Replaced] = [
        (Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (nn.Module, "cuda", lambda module, *_, **__: module),
        (torch.cuda, "set_device", _always(None)),
        (torch.cuda.amp, "autocast", lambda *_, **__: nullcontext()),
        (torch.cuda.amp, "GradScaler", _NoScaler),
        (nn.SyncBatchNorm, "convert_sync_batchnorm", lambda module, *_: module),
        (nn.parallel, "DistributedDataParallel", ddp),
        (Tensor, "backward", watched_backward),
        (BlockMaskGenerator, "__call__", watched_draw),
    ]
    if pretend:
        replaced.append((torch.cuda, "is_available", _always(True)))
    with ExitStack() as stack:
        stack.enter_context(_replace(replaced))
        if batches is not None:
            stack.enter_context(_data(batches))
        stack.enter_context(_one_process())
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        # Theirs: old names of torch, a loader's workers.
        warnings.simplefilter("ignore")
        yield run


class _NoScaler:
    """A gradient scaler that does not scale."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None: ...

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}


def _data(batches: Sequence[Any]) -> AbstractContextManager[None]:
    import torchvision.datasets

    sampler = SimpleNamespace(set_epoch=lambda _: None)
    return _replace(
        [
            (torch.utils.data, "DataLoader", _always(batches)),
            (torch.utils.data.distributed, "DistributedSampler", _always(sampler)),
            (torchvision.datasets, "ImageFolder", _always(None)),
        ]
    )


@contextmanager
def _replace(replaced: Sequence[_Replaced]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


@contextmanager
def _one_process() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    try:
        with mock.patch.object(dist, "init_process_group", _always(None)):
            yield
    finally:
        dist.destroy_process_group()
        torch.set_default_dtype(dtype)


def photograph_pairs(steps: int, n: int, size: int = 32) -> list[tuple[list[Tensor], None]]:
    """Return batches of two views of photographs, float64, in the form ([x_1, x_2], None)."""
    images = load_data("clothing64", size).train.images[:: 3409 // (steps * n)][: steps * n]
    images = F.interpolate(images.double(), size=size).sub(128).div(64)
    return [([batch.roll((1, -2), (2, 3)), batch.flip(3) * 0.9], None) for batch in images.split(n)]


def mixed_slowly(images: Tensor, cells: Tensor) -> tuple[Tensor, float]:
    """Return the paper's mixture with the reverse partner, pixel by pixel, and its share.

    Args:
        images: (N, C, H, W).
        cells: (g, g) bool, True where an image keeps its own pixels.
    """
    n, _, height, width = images.shape
    mixed, kept = torch.empty_like(images), 0
    for row in range(height):
        for column in range(width):
            own = bool(cells[row * len(cells) // height, column * len(cells) // width])
            kept += own
            for i in range(n):
                source = i if own else n - 1 - i
                mixed[i, :, row, column] = images[source, :, row, column]
    return mixed, kept / (height * width)


@dataclass
class SlowSGD:
    """SGD with momentum and weight decay, written out."""

    lr: float
    momentum: float
    weight_decay: float
    velocity: dict[str, Tensor] = field(default_factory=dict)

    def step(self, weights: Mapping[str, nn.Parameter], gradients: Named) -> None:
        """Move the weights."""
        for name, gradient in gradients.items():
            weight = weights[name].data
            rise = gradient + self.weight_decay * weight
            if name in self.velocity:
                rise = self.momentum * self.velocity[name] + rise
            self.velocity[name] = rise
            weight.sub_(self.lr * rise)
