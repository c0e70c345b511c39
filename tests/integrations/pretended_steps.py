"""Steps of other libraries on a pretended accelerator, with mixed views and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pretended import DEVICE, Accelerator, PretendedTensor
from pretended_known import Known
from torch import Tensor, nn

# A forward pass of a module on a device: from whether it mixes, to the module and its loss.
Build = Callable[[bool, torch.device], tuple[nn.Module, Callable[[], Tensor]]]
# A function of ours, a line of it, what that becomes, and what is then said.
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "copy to the host": (
        "mix_views", "mixed.lam.mean()", "mixed.lam.cpu().mean()",
        r"waits with mixed views .*'_to_copy', '_steps\.py:mix_views'",
    ),
    "item": (
        "mix_views", "z = embed(", "mixed.lam.max().item()\n        z = embed(",
        r"waits with mixed views .*'_local_scalar_dense', '_steps\.py:mix_views'",
    ),
    "no device": (
        "_reverse", "torch.arange(n, device=device)", "torch.arange(n)",
        r"index_select got .* a host's \(6,\) at mixmask/mixing\.py",
    ),
    "number of the host": (
        "mix_views", "torch.stack(terms).mean()", "torch.stack(terms).mean() * torch.ones(())",
        r"mul got .* a host's \(\) at mixmask/integrations/_steps\.py",
    ),
}  # fmt: skip
every_mutation = pytest.mark.parametrize("mutation", MUTATIONS)


def compare_waits(build: Build, accelerator: Accelerator, theirs: Sequence[Known] = ()) -> None:
    """Require of a step with mixed views the CPU's values, and the waits of one without them."""
    found = []
    for mixes in (False, True):
        (ours, step), (twin, expected) = build(mixes, DEVICE), build(mixes, torch.device("cpu"))
        # What is checked once, in the first step, may wait.
        for _ in range(2):
            torch.manual_seed(1)
            with accelerator.counted() as waits:
                _backward(ours, step())
            torch.manual_seed(1)
            _backward(twin, expected())
            # Batch norms and queues carry what a step did into the next one.
            _compare(ours.state_dict(), twin.state_dict())
            _compare(_gradients(ours), _gradients(twin))
        found.append(waits)
    clean, mixed = found
    assert mixed == clean, f"waits with mixed views {mixed}, without {clean}"
    assert set(clean) == {(one.operator, one.place) for one in theirs}


def _backward(module: nn.Module, loss: Tensor) -> None:
    module.zero_grad()
    loss.backward()


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def _compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value is None:
            assert expected[name] is None, name
            continue
        assert isinstance(value, PretendedTensor), name
        torch.testing.assert_close(value.held, expected[name], rtol=1e-6, atol=1e-9)


def move_all(values: Any, device: torch.device) -> Any:
    """Move the tensors of a batch."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, dict):
        return {key: move_all(value, device) for key, value in values.items()}
    if isinstance(values, list):
        return [move_all(value, device) for value in values]
    return values
