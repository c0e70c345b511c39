"""What is kept of a step until it is read, and modules that stand in place of others."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from types import CodeType, FunctionType, MethodType
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from mixmask.losses import Criterion, LambdaWeightedLoss
from mixmask.losses._state import Loan, Part, lend_state

T = TypeVar("T")

_REPLICAS = (
    "nn.DataParallel, which calls it once per device, is not supported: put the two lines of "
    "mixmask.lambda_weighted_loss into forward"
)


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
                f"as forward makes; {_REPLICAS}"
            )
        self.items.append(item)

    def take(self) -> list[T]:
        """Return what the calls of the step left, and forget it."""
        items, self.items = self.items, []
        if len(items) != self.calls:
            fix = "pass calls= as many as forward makes"
            if not items:
                fix = (
                    "if it was never called, replace the name in the module that calls it, which "
                    "may have imported it, and let its first argument carry the gradient"
                )
            raise ValueError(
                f"the {self.what} must have been called {self.calls} times since it was last read, "
                f"got {len(items)} calls; read it once after each forward pass with gradients, and "
                f"{fix}; {_REPLICAS}"
            )
        return items


class SameState(nn.Module):
    """A module with the parameters, buffers and names of another, in place of which it stands."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[registry] = vars(inner)[registry]
        self.training = inner.training


class Snapshot(Loan):
    """What a criterion remembers at one time, for a call at a later one.

    Seen is what `lend_state` sees, and what functions in our losses return, as the queue of
    `InfoNCE(lambda: queue)`.

    Attributes:
        criterion: What is to be called inside `installed`.
    """

    def __init__(self, criterion: Criterion, ignore: Collection[str] = ()) -> None:
        super().__init__(ignore, cautious=False)
        self.known: list[tuple[dict[str, Any], str, Collection[str]]] = []
        self.parts: list[Part] = []
        with self:
            self.criterion: Criterion = self.lend_all(criterion)

    def callback(self, callback: Any, /, *args: Any, **options: Any) -> Any:
        """Note what is held beside what restores it."""
        if callback == self._drop_new:
            self.known.append(args)
        else:
            self.parts.append((callback, args[0]))
        return super().callback(callback, *args, **options)

    def lend(self, value: Any, *args: Any, **options: Any) -> Any:
        """Return a copy, as the loan does, and one of our losses with the queue of now."""
        if not _is_our_loss(value):
            return super().lend(value, *args, **options)
        if id(value) not in self.lent:
            self.lent[id(value)] = value, _read_functions(value)
        return self.lent[id(value)][1]

    @contextmanager
    def installed(self) -> Iterator[Criterion]:
        """Put the state of then in place; afterwards that of now is back."""
        with lend_state(self.criterion, self.ignore):
            for space, name, known in self.known:
                self._drop_new(space, name, known)
            for store, held in self.parts:
                parts = {key: self.lent.get(id(part), (part, part)) for key, part in held.items()}
                store({key: stand_in for key, (_, stand_in) in parts.items()})
            yield self.criterion


def _is_our_loss(value: Any) -> bool:
    ours = type(value).__module__.startswith("mixmask.losses.")
    return ours and is_dataclass(value) and not isinstance(value, type)


def _read_functions(loss: Any) -> Any:
    """Return a loss whose queue or center is a copy of that of now."""
    values = {field.name: getattr(loss, field.name) for field in fields(loss) if field.init}
    for name, value in values.items():
        read = value() if callable(value) else value
        values[name] = read.clone() if isinstance(read, Tensor) else read
    return replace(loss, **values)


# Steps back in autograd's graph from an embedding to the output that it was made of.
_NEAR = 6
# With these, what a method uses of its model cannot be told.
_DYNAMIC = frozenset(("super", "getattr", "vars", "children", "modules", "_modules"))


def list_unused(criterion: Any) -> tuple[str, ...]:
    """Name the children of a method's model that the method does not mention.

    A loss that is a method of its model would else have the encoders' statistics copied.
    """
    model = getattr(criterion, "__self__", None)
    if not isinstance(criterion, MethodType) or not isinstance(model, nn.Module):
        return ()
    mentioned: set[str] = set()
    codes: list[Any] = [getattr(criterion.__func__, "__code__", None)]
    while codes:
        code = codes.pop()
        if not isinstance(code, CodeType):
            return ()
        new = set(code.co_names) - mentioned
        mentioned |= new
        methods = (getattr(type(model), name, None) for name in new)
        codes += [one.__code__ for one in methods if isinstance(one, FunctionType)]
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
    if mentioned & _DYNAMIC:
        return ()
    return tuple(f"__self__.{name}" for name, _ in model.named_children() if name not in mentioned)


def comes_from(z: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Tell whether an embedding is one of the outputs, or is near to one in autograd's graph."""
    origins = {output.grad_fn for output in outputs}
    level = {z.grad_fn}
    # Normalising and the like take a few nodes; an encoder is not walked through.
    for _ in range(_NEAR):
        if level & origins:
            return True
        level = {node for one in level if one is not None for node, _ in one.next_functions}
        level.discard(None)
    return False


def split_arguments(
    criterion: Any, args: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Return z, target and further arguments by name, from what a criterion is called with."""
    if len(args) == 2:
        return args[0], args[1], dict(options)
    called = criterion.forward if isinstance(criterion, nn.Module) else criterion
    bound = inspect.signature(called).bind(*args, **options)
    # What can be given by name alone, or not at all, is taken apart.
    names = {name: one.kind for name, one in bound.signature.parameters.items()}
    given = dict(bound.arguments)
    for name in list(given):
        if names[name] is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name)
    names_of_two = list(given)[:2]
    fixed = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL
    if len(names_of_two) < 2 or any(names.get(name) in fixed for name in list(given)[2:]):
        raise TypeError(
            f"the criterion must take z, target and further arguments by name, got {len(args)} by "
            f"position and {list(options)}; name those after the first two in forward"
        )
    z, target = (given.pop(name) for name in names_of_two)
    return z, target, given


def check_recordable(criterion: Any, mixed_criterion: Any) -> None:
    """Require a loss of embeddings for the mixed term."""
    for one in (criterion, mixed_criterion):
        if not callable(one) and not (one is None and one is mixed_criterion):
            raise TypeError(
                f"the criterion must be callable as (z, target), got {type(one).__name__}; pass "
                "for instance model.contrastive_loss"
            )
    used = criterion if mixed_criterion is None else mixed_criterion
    try:
        LambdaWeightedLoss(used)
    except TypeError as error:
        raise TypeError(f"{error}; pass mixed_criterion=losses.NegativeCosine()") from error
    if getattr(type(used), "forward", None) is nn.CrossEntropyLoss.forward:
        raise TypeError(
            "the criterion must take embeddings and targets, got CrossEntropyLoss, which takes "
            "logits; wrap the function that makes them, or pass for instance "
            "mixed_criterion=losses.NTXent()"
        )
