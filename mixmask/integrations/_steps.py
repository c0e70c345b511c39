"""What integrations share: the mixed term of what a step computed, and what is kept of a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import FunctionType, MethodType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from mixmask._checks import check_integer
from mixmask.losses import Criterion, lambda_weighted_loss
from mixmask.losses._criteria import check_kind, is_own
from mixmask.losses._rows import mix_losses
from mixmask.losses._state import Loan, lend_state, list_codes
from mixmask.mixing import MixedBatch

T = TypeVar("T")
Mixing = Callable[[Tensor], MixedBatch]
# Clean images (N, C, H, W), the online branch, and what their mixture is compared with.
View = tuple[Tensor, Callable[[Tensor], Tensor], Sequence[tuple[Criterion, Tensor]]]

_REPLICAS = (
    "nn.DataParallel, which calls it once per device, is not supported: put the two lines of "
    "mixmask.lambda_weighted_loss into forward"
)

_SHARED_STATE = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training",
)  # fmt: skip


@dataclass(frozen=True)
class SplitCriterion:
    """A criterion of which λ weights the distance; the rest sees no target and counts once."""

    distance: Callable[[Tensor, Tensor], Tensor]  # (z, target) -> (N,)
    rest: Callable[[Tensor], Tensor]  # z -> ()

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one view towards its targets."""
        return self.weighted(z, target, None, z.new_ones(()))

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return both weighted terms, (); see `losses.SharingCriterion`."""
        own = self.distance(z, target)  # (N,)
        others = None if other is None else self.distance(z, other)  # (N,)
        return mix_losses(own, others, lam).mean() + self.rest(z)


def weigh_squares(weight: float, rest: Callable[[Tensor], Tensor]) -> SplitCriterion:
    """Return VICReg's form: a weighted mean of squares, (N,), and what sees no target, ()."""
    return SplitCriterion(
        lambda z, target: weight * (z - target).square().flatten(1).mean(dim=1), rest
    )


def check_mixing(mixing: object) -> None:
    """Require a function from images to their mix."""
    if not callable(mixing):
        raise TypeError(
            f"mixing must be callable with images, got {type(mixing).__name__}; pass for "
            "instance mixmask.MixMask(grid_size=4)"
        )


def mix_views(mixing: Mixing, views: Iterable[View], *, switch: bool) -> tuple[Tensor, Tensor]:
    """Return the mean mixed term over views and their targets, and the mean share of own pixels."""
    terms, shares = [], []
    for images, embed, towards in views:
        mixed = mixing(images)
        z = embed(mixed.images)  # (N, C), once for all targets.
        terms += [
            lambda_weighted_loss(criterion, z, target, mixed, switch=switch)
            for criterion, target in towards
        ]
        shares.append(mixed.lam.mean())
    return torch.stack(terms).mean(), torch.stack(shares).mean()


class StandIn(Generic[T]):
    """Replaces a callable, and keeps the results of one step's calls, to be taken once.

    Around a module it is a module of the same parameters, buffers and names.
    """

    replaces: ClassVar[str]  # The attribute that holds what is replaced.
    kind: ClassVar[str]
    as_module: ClassVar[type]

    def __new__(cls, *args: object, **options: object) -> Any:
        # A model's child must stay a module, and would be hidden in the place of its method.
        replaced = args[0] if args else options.get(cls.replaces)
        other = isinstance(replaced, nn.Module) and "as_module" in vars(cls)
        return super().__new__(cls.as_module if other else cls)

    def __init__(self, replaced: object, calls: int) -> None:
        check_integer("calls", calls, 1, "count them in forward: 2 in symmetric methods")
        if isinstance(self, nn.Module):
            nn.Module.__init__(self)
            # The same objects, so that optimizers, `to` and `state_dict` see what they saw.
            for name in _SHARED_STATE:
                vars(self)[name] = vars(replaced)[name]
        # Not by assignment, which would make it a child and rename its state.
        vars(self)[self.replaces] = replaced
        self._calls = calls
        self._kept: list[T] = []

    def __getattr__(self, name: str) -> Any:
        if self.replaces not in vars(self) or name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)[self.replaces], name)

    def __getstate__(self) -> dict[str, object]:
        # Copies and pickles leave the current step out.
        return {**vars(self), "_kept": []}

    def reset(self) -> None:
        """Forget the recorded calls of a step whose loss is not used."""
        self._kept = []

    def _keep(self, item: T) -> None:
        """Keep the result of a call; refuse if that of the last step was not taken."""
        # Forgotten before the error, so that a caller who goes on starts with a clean step.
        if len(self._kept) == self._calls:
            self.reset()
            raise ValueError(
                f"the {self.kind} must be called {self._calls} times per step, got one more before "
                "the last ones were taken; take them in every step (or call reset() where one is "
                "skipped), run what is not trained under torch.no_grad(), and pass calls= as many "
                f"as forward makes; {_REPLICAS}"
            )
        self._kept.append(item)

    def _take(self) -> list[T]:
        """Return the results of the step's calls, and forget them."""
        kept = self._kept
        self.reset()
        if len(kept) == self._calls:
            return kept
        fix = "pass calls= as many as forward makes"
        if not kept:
            fix = (
                "if it was never called, replace the name in the module that calls it, which may "
                "have imported it, and let its first argument carry the gradient"
            )
        raise ValueError(
            f"the {self.kind} must have been called {self._calls} times since it was last read, "
            f"got {len(kept)} calls; read it once after each forward pass with gradients, and "
            f"{fix}; {_REPLICAS}"
        )


class StandInModule(nn.Module):
    """The part of a stand-in that is a module."""

    replaces: ClassVar[str]

    def train(self, mode: bool = True) -> Any:
        vars(self)[self.replaces].train(mode)
        self.training = mode
        return self


class Snapshot(Loan):
    """State of a criterion at one time, for later calls inside `installed`.

    It covers what `lend_state` covers, and what functions in our losses return, such as the queue
    of `InfoNCE(lambda: queue)`.
    """

    def __init__(self, criterion: Criterion, ignore: Collection[str] = ()) -> None:
        super().__init__(ignore)
        with self:
            self.criterion: Criterion = self.lend_all(criterion)

    def lend(self, value: object, *args: Any, **options: Any) -> Any:
        """Return a copy; one of our losses gets a copy of its current queue or center."""
        if not is_own(value):
            return super().lend(value, *args, **options)
        # Frozen and without state: only what its functions return can have changed by then.
        if id(value) not in self.lent:
            self.lent[id(value)] = value, _read_functions(value)
        return self.lent[id(value)][1]

    @contextmanager
    def installed(self) -> Iterator[Criterion]:
        """Install the recorded state for the block; the current one comes back afterwards."""
        with lend_state(self.criterion, self.ignore):
            self.drop_new()
            for store, held in self.parts:
                store({key: self.lent.get(id(part), (part, part))[1] for key, part in held.items()})
            yield self.criterion


def _read_functions(loss: Any) -> object:
    """Return a loss with a copy of its current queue or center."""
    values = {field.name: getattr(loss, field.name) for field in fields(loss) if field.init}
    for name, value in values.items():
        read = value() if callable(value) else value
        values[name] = read.clone() if isinstance(read, Tensor) else read
    return replace(loss, **values)


# Steps back in autograd's graph from an embedding to the output that it was made of.
_NEAR = 6
# With these, what a method uses of its model cannot be told.
_DYNAMIC = frozenset(("super", "getattr", "vars", "children", "modules", "_modules"))


def list_unused(criterion: object) -> tuple[str, ...]:
    """Name the children of a method's model that it does not use; they need no copy."""
    model = getattr(criterion, "__self__", None)
    if not isinstance(criterion, MethodType) or not isinstance(model, nn.Module):
        return ()
    mentioned: set[str] = set()
    todo: list[object] = [criterion.__func__]
    while todo:
        method = todo.pop()
        # A decorator encloses what it decorates.
        if not isinstance(method, FunctionType) or method.__closure__:
            return ()
        named = {name for code in list_codes(method.__code__) for name in code.co_names}
        found = [getattr(type(model), name, None) for name in named - mentioned]
        todo += [one for one in found if isinstance(one, (FunctionType, MethodType, property))]
        mentioned |= named
    if mentioned & _DYNAMIC:
        return ()
    return tuple(f"__self__.{name}" for name, _ in model.named_children() if name not in mentioned)


def comes_from(z: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Tell whether an embedding is one of the outputs, or close to one in autograd's graph."""
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
    criterion: Any, args: Sequence[object], options: Mapping[str, object]
) -> tuple[object, object, dict[str, object]]:
    """Return z, target and further arguments by name, from a criterion's call."""
    # The common call needs no look at the signature, which builtins may not have.
    if len(args) == 2:
        return args[0], args[1], dict(options)
    called = criterion.forward if isinstance(criterion, nn.Module) else criterion
    bound = inspect.signature(called).bind(*args, **options)
    # Further arguments are passed on by name, so what only goes by position is refused below.
    given: dict[str, object] = {}
    fixed = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            fixed.append(name)
    first, *more = given
    if not more or {*more[1:]} & {*fixed}:
        raise TypeError(
            f"the criterion must take z, target and further arguments by name, got {len(args)} by "
            f"position and {list(options)}; name those after the first two in forward"
        )
    return given[first], given[more[0]], {name: given[name] for name in more[1:]}


def check_recordable(criterion: object, mixed_criterion: object) -> None:
    """Require a loss of embeddings for the mixed term."""
    used = criterion if mixed_criterion is None else mixed_criterion
    if not callable(criterion):
        raise TypeError(
            f"the criterion must be callable as (z, target), got {type(criterion).__name__}; pass "
            "for instance model.contrastive_loss"
        )
    try:
        check_kind(used)
    except TypeError as error:
        raise TypeError(f"{error}; pass mixed_criterion=losses.NegativeCosine()") from error
    if getattr(type(used), "forward", None) is nn.CrossEntropyLoss.forward:
        raise TypeError(
            "the criterion must take embeddings and targets, got CrossEntropyLoss, which takes "
            "logits; wrap the function that makes them, or pass for instance "
            "mixed_criterion=losses.NTXent()"
        )
