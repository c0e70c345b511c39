from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The same examples in each run; `--hypothesis-profile=thorough` tries more, and others each time.
settings.register_profile("quick", max_examples=200, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None, database=None)
settings.load_profile("quick")

# Who starts the tests in the background may have them ignore signals, which runs then do, too.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)

# A plugin of a few files must not be imported before they name it.
collect_ignore = ["integrations/solo_fixtures.py"]

# Left out by -m "not slow": whole commands and scripts, several processes, compilation.
_SLOW_FILES = (
    "test_benchmarks", "test_evidence", "test_examples", "test_own_loops", "test_processes",
    "test_distributed", "test_lightly", "test_solo", "test_foreign", "test_finetune", "test_cli",
    "test_detect", "test_evaluate_command", "test_readme", "test_studies", "test_stream",
    "test_methods", "test_layouts", "test_start", "test_going_on", "test_ranks", "test_notebook",
    "test_compiled", "test_embed",
)  # fmt: skip
_SLOW_NAMES = (
    "compile", "process", "torchrun", "one_graph", "need_no_backend", "a_loader_returns",
    "needs_no_value", "every_writer", "exports_with", "stems_survive", "never_waits",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long by its kind, so that the fast lane stays fast."""
    for item in items:
        if item.path.stem.startswith(_SLOW_FILES) or any(n in item.name for n in _SLOW_NAMES):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same state of torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _processes_end() -> Iterator[None]:
    """Fail where a test leaves a process behind, not where a later one finds it."""
    yield
    if active_children():
        gc.collect()  # A caught error may have held the workers of a loader.
        assert active_children() == []


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Run a test on the CPU and, where there is one, on an accelerator."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device found")
    return torch.device(name)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Write images of three classes to train and to test on."""
    from evaluated import write_photographs  # It needs more than the tests of the core have.

    return write_photographs(tmp_path / "photographs")


@pytest.fixture
def run(tmp_path: Path, photographs: Path) -> Path:
    """Write the folder of a run on these images."""
    from evaluated import write_run

    return write_run(tmp_path / "run", photographs, "narrow", 16)


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of two classes to train and to test on, which no test may change."""
    from commands import write_photographs

    return write_photographs(tmp_path_factory.mktemp("data") / "photographs")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of two classes without a test split, which no test may change."""
    from started import write_noise

    return write_noise(tmp_path_factory.mktemp("data") / "noise")


@pytest.fixture(scope="module")
def whole(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of two epochs that nobody disturbs."""
    from started import TINY, start

    return start(tmp_path_factory.mktemp("runs") / "whole", data=str(noise), **TINY).folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Read one of the files of golden numbers, as tensors by name."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}

    return read


@pytest.fixture
def within_budget() -> Callable[..., None]:
    """Hold a loss in low precision to the plain formula's error against float64, plus a step."""

    def check(
        ours: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        inputs: list[Tensor],
        *,
        autocast: bool = False,
    ) -> None:
        dtype = torch.bfloat16 if autocast else inputs[0].dtype
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        exact = plain(*wide)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine, theirs = ours(*leaves), plain(*leaves)
        assert mine.dtype == torch.float32
        gradients = zip(
            *(
                torch.autograd.grad(value.sum(), tensors, allow_unused=True)
                for value, tensors in ((mine, leaves), (theirs, leaves), (exact, wide))
            ),
            strict=True,
        )
        compared = [found for found in gradients if found[2] is not None]
        assert compared
        # In float32 both errors are a few roundings, in orders of their own.
        step = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
        for found, their, truth in [(mine, theirs, exact), *compared]:
            ours_off, plain_off = (
                float((value.double() - truth).detach().abs().max()) for value in (found, their)
            )
            assert ours_off <= plain_off + step * float(truth.detach().abs().max())

    return check
