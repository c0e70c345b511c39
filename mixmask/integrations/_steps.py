"""What is kept of a step until it is read, and modules that stand in place of others."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from mixmask.losses import Criterion

T = TypeVar("T")


class Kept(Generic[T]):
    """What the calls of one step left, to be taken once."""

    def __init__(self, calls: int, what: str) -> None:
        if isinstance(calls, bool) or not isinstance(calls, int):
            raise TypeError(f"calls must be an integer, got {calls!r}; use 2 for symmetric methods")
        if calls < 1:
            raise ValueError(f"calls must be at least 1, got {calls}; count them in forward")
        self.calls, self.what = calls, what
        self.items: list[T] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the step that is under way behind."""
        return {**vars(self), "items": []}

    def add(self, item: T) -> None:
        """Keep what a call left; refuse it where the last step's was not taken."""
        if len(self.items) == self.calls:
            self.items = []
            raise ValueError(
                f"the {self.what} must be called {self.calls} times per step, got one more before "
                "the last ones were taken; take them in every step (or call reset() where one is "
                "skipped), run what is not trained under torch.no_grad(), and pass calls= as many "
                "as forward makes"
            )
        self.items.append(item)

    def take(self) -> list[T]:
        """Return what the calls of the step left, and forget it."""
        items, self.items = self.items, []
        if len(items) != self.calls:
            raise ValueError(
                f"the {self.what} must have been called {self.calls} times since it was last read, "
                f"got {len(items)} calls; read it once after each forward pass with gradients, and "
                "pass calls= as many as forward makes"
            )
        return items


class SameState(nn.Module):
    """A module with the parameters, buffers and names of another, in place of which it stands."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[registry] = vars(inner)[registry]
        self.training = inner.training


def as_it_is(criterion: Criterion) -> Criterion:
    """Return the criterion with the state that it has now; parameters are shared."""
    if not isinstance(criterion, nn.Module):
        return criterion
    memo: dict[int, Any] = {id(weight): weight for weight in criterion.parameters()}
    try:
        return copy.deepcopy(criterion, memo)
    except RuntimeError as error:
        raise ValueError(
            f"the criterion must be copyable, for the mixed term sees the state of before: {error}"
            "; detach what it keeps of a call, or pass mixed_criterion="
        ) from error


def call_a_copy(criterion: Criterion, z: Tensor, target: Tensor) -> Tensor:
    """Call a criterion and leave its state as it is."""
    return as_it_is(criterion)(z, target)
