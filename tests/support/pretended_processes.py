"""A pretended second process, which holds the same as this one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as functional
from torch import Tensor

from mixmask import _distributed


def pretend_two_processes(patch: pytest.MonkeyPatch) -> None:
    """Let torch see a second process, which holds the same as this one."""

    def all_gather(out: Tensor, rows: Tensor) -> None:
        out.copy_(torch.cat([rows, rows]))

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if op == dist.ReduceOp.SUM:
            tensor.mul_(2)

    def all_gather_object(out: list[Any], value: Any) -> None:
        out[:] = [value, value]

    def all_gather_list(out: list[Tensor], rows: Tensor, **_: Any) -> None:
        for part in out:
            part.copy_(rows)

    patch.setattr(_distributed, "_all_gather", all_gather)
    patch.setattr(dist, "all_gather", all_gather_list)
    # Those that gradients flow through, which some libraries use.
    patch.setattr(functional, "all_gather", lambda rows, *_: (rows, rows))
    patch.setattr(functional, "all_reduce", lambda tensor, *_: 2 * tensor)
    patch.setattr(dist, "all_gather_object", all_gather_object)
    patch.setattr(dist, "all_reduce", all_reduce)
    patch.setattr(dist, "all_to_all_single", lambda out, rows, *_: out.copy_(rows))
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        patch.setattr(dist, name, lambda value=value: value)
