"""State in a graph, and out of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from buffered import MIXED, SHARED, C, Center, K, draw_rows, measure_distance
from hidden import HIDDEN, fill_bank
from torch import Tensor, nn

from mixmask import LambdaWeightedLoss
from mixmask.losses import InfoNCE

COMPILED = (
    "list",
    "tensor in a tuple",
    "tensor in a dict",
    "list of an object",
    "plain object's tensor",
    "nonlocal",
    "closure around a module",
    "bound method",
    "globals",
    "globals of forward and a property",
    "function's attribute",
    "partial of a tensor",
    "view of a buffer",
)


class FrozenQueue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queue = nn.Parameter(torch.zeros(K, C), requires_grad=False)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return fill_bank(self.queue.data, z, target)


@pytest.mark.parametrize("name", [*COMPILED, "frozen parameter"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_state_that_cannot_be_traced_is_lent_all_the_same(name: str) -> None:
    make = HIDDEN.get(name, FrozenQueue)
    z, target, z_mixed = draw_rows(3)
    ours = LambdaWeightedLoss(make())
    expected = [ours(z, target, z_mixed, MIXED).detach() for _ in range(3)]
    torch._dynamo.reset()
    compiled = torch.compile(LambdaWeightedLoss(make()), backend="eager")
    for wanted in expected:
        torch.testing.assert_close(compiled(z, target, z_mixed, MIXED).detach(), wanted)


@pytest.mark.parametrize(
    "name",
    [
        "list",
        "dict at first empty",
        "nonlocal",
        "globals",
        "partial of a tensor",
        "view of a buffer",
    ],
)
def test_a_single_graph_is_refused_where_state_cannot_be_traced(name: str) -> None:
    torch._dynamo.reset()
    whole = torch.compile(LambdaWeightedLoss(HIDDEN[name]()), backend="eager", fullgraph=True)
    z, target, z_mixed = draw_rows(3)
    with pytest.raises(Exception, match=r"keep its state in buffers, or compile without"):
        whole(z, target, z_mixed, MIXED)


TEMPERATURE = 0.5


def _scale(scale: float) -> Callable[..., Tensor]:
    return lambda z, target: measure_distance(z, target) * scale


IN_ONE_GRAPH: dict[str, Callable[[], Any]] = {
    "function": lambda: measure_distance,
    "constant of a module": lambda: lambda z, target: measure_distance(z, target) * TEMPERATURE,
    "constant in a closure": lambda: (lambda scale: lambda z, t: measure_distance(z, t) * scale)(
        0.25
    ),
    "partial": lambda: functools.partial(F.smooth_l1_loss, beta=0.5),
    "InfoNCE": lambda: InfoNCE(torch.randn(K, C), reduction="none"),
    "module of torch": nn.PairwiseDistance,
    "buffers and a temperature": Center,
}


@pytest.mark.parametrize("make", IN_ONE_GRAPH.values(), ids=IN_ONE_GRAPH)
def test_what_holds_no_state_or_only_buffers_is_one_graph(make: Callable[[], Any]) -> None:
    criterion = make()
    z, target, z_mixed = draw_rows(3)
    expected = LambdaWeightedLoss(copy.deepcopy(criterion))(z, target, z_mixed, SHARED)
    torch._dynamo.reset()
    whole = torch.compile(LambdaWeightedLoss(criterion), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(z, target, z_mixed, SHARED), expected)
