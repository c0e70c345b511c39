"""What a criterion is, and what is refused: a similarity, a classifier's loss on keys, a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Images have few channels, dense embeddings have many.
_MOST_CHANNELS = 16
# Probabilities that were rounded to bfloat16 sum to 1 within this.
_TOLERANCE = 0.05
# Looking at values waits for the device, so there it is done once per kind of criterion and its
# options: a loop may build one in each step.
_looked_at: set[tuple[object, ...]] = set()

_TOLD_APART = ("reduction", "log_target", "label_smoothing", "ignore_index")
# The losses among torch's functions.
_FUNCTIONS: tuple[object, ...] = (
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cross_entropy, F.huber_loss,
    F.kl_div, F.l1_loss, F.mse_loss, F.smooth_l1_loss,
)  # fmt: skip

Criterion = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class SharingCriterion(Protocol):
    """A criterion that evaluates both weighted terms at once, because they share work.

    `weighted` is used if it keeps these parameter names, and if no subclass of the class that
    defines it overrides the call. If it also has a parameter `partner`, it gets the index (N,)
    with `other` = target[partner], to share more.
    """

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the plain criterion, () or (N,)."""

    def weighted(self, z: Tensor, target: Tensor, other: Tensor | None, lam: Tensor) -> Tensor:
        """Return lam * l(z, target) + (1 - lam) * l(z, other), () or (N,).

        Without `other`, return lam * l(z, target) alone.
        """


@runtime_checkable
class MatchingCriterion(Protocol):
    """A criterion whose mixed term is matched to what it finds between the clean views.

    `matched` is used as `weighted` of a `SharingCriterion` is.
    """

    def __call__(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the plain criterion, ()."""

    def matched(
        self, z_mixed: Tensor, target: Tensor, z: Tensor, other: Tensor | None, lam: Tensor
    ) -> Tensor:
        """Return the whole mixed term, (); `z` and `other` are of the images and partners."""


def gives_both_terms(criterion: object) -> TypeGuard[SharingCriterion]:
    """Tell whether `weighted` gives both terms, and gives those of the criterion's own call."""
    return {"other", "lam"} <= _list_parameters(criterion, "weighted")


def takes_partners(criterion: object) -> bool:
    """Tell whether `weighted` of a criterion that shares takes the partners' index."""
    return "partner" in _list_parameters(criterion, "weighted")


def matches(criterion: object) -> TypeGuard[MatchingCriterion]:
    """Tell whether the mixed term is that of `matched`."""
    return {"other", "lam"} <= _list_parameters(criterion, "matched")


def _list_parameters(criterion: object, name: str) -> frozenset[str]:
    """Return the parameters of a method, if it is to be used in the place of the call."""
    # A proxy's attributes are those of what it wraps, its call is not: only the type tells.
    if isinstance(criterion, partial):
        return frozenset()
    for kind in type(criterion).__mro__:
        own = kind.__dict__
        if name in own:
            code = getattr(own[name], "__code__", None)
            return frozenset() if code is None else frozenset(code.co_varnames[: code.co_argcount])
        if "__call__" in own or "forward" in own:
            break
    return frozenset()


def is_own(value: object) -> bool:
    """Tell whether a value is one of our losses, which are frozen and hold no state."""
    return type(value).__module__.startswith("mixmask.losses.") and is_dataclass(value)


def is_library(criterion: object) -> bool:
    """Tell whether a criterion is a loss of this package, or a function of torch: no state."""
    # Dynamo knows the functions of torch by identity alone.
    return is_own(criterion) or any(criterion is function for function in _FUNCTIONS)


def check_criterion(criterion: Callable[..., object], z: Tensor, target: Tensor) -> None:
    """Refuse what would train on something else than it seems to, where it can be detected."""
    check_kind(criterion)
    base = unwrap(criterion)
    images = z.ndim == 4 and z.shape[1] <= _MOST_CHANNELS and not z.requires_grad
    is_module = images and isinstance(base, nn.Module)
    if is_module and any(parameter.requires_grad for parameter in base.parameters()):
        raise TypeError(
            f"the criterion compares embeddings, got the module {type(base).__name__}, which has "
            f"trainable parameters, and images {tuple(z.shape)}; pass the loss alone, and "
            "encode(mixed.images) as z_mixed"
        )
    # Values cannot be looked at in a graph.
    if torch.compiler.is_compiling():
        return
    for kind, check in _CHECKS.items():
        if not _is_kind(base, *kind):
            continue
        options = _read_options(criterion)
        known = kind, *sorted((key, repr(options[key])) for key in options if key in _TOLD_APART)
        if z.device.type == "cpu" or known not in _looked_at:
            check(z, target, criterion)
            _looked_at.add(known)


def check_kind(criterion: object) -> None:
    """Require an instance that can be called, and no cosine similarity."""
    if isinstance(criterion, type):
        raise TypeError(
            f"criterion must be an instance, got the class {criterion.__name__}; "
            f"pass {criterion.__name__}(...)"
        )
    if not callable(criterion):
        fix = "pass for instance losses.InfoNCE(queue)"
        if isinstance(criterion, Tensor):
            fix = "pass the criterion itself, not the loss that it returned"
        raise TypeError(
            f"criterion must be callable as (z, target), got {type(criterion).__name__}; {fix}"
        )
    base = unwrap(criterion)
    # A loss falls where the similarity rises: its sign would train embeddings apart.
    if _is_kind(base, nn.CosineSimilarity, F.cosine_similarity):
        raise TypeError(
            "the criterion must be a loss, got a cosine similarity, which training would "
            "minimise; use losses.NegativeCosine()"
        )


def unwrap(criterion: Callable[..., object]) -> Any:
    """Return what a partial calls in the end, or the criterion itself."""
    while isinstance(criterion, partial):
        criterion = criterion.func
    return criterion


def _is_kind(base: object, module: type[nn.Module], function: Callable[..., object]) -> bool:
    """Tell whether this is a function of torch or its module, with the module's own forward."""
    own = isinstance(base, module) and type(base).forward is module.forward
    return own or base is function


def _check_classes(z: Tensor, target: Tensor, _criterion: object) -> None:
    """Require class probabilities or labels that differ."""
    if target.is_floating_point():
        _check_distributions("cross-entropy", target)
        return
    n, classes = len(target), z.shape[1] if z.ndim == 2 else 0
    # MoCo's logits are (N, 1 + K), SimCLR's (2N, 2N - 1). Few true labels may all be 0 by chance.
    if (classes > n >= 4 or classes == n - 1 >= 7) and not target.any():
        raise ValueError(
            "the targets of a cross-entropy are all class 0, so both terms of a mixture are the "
            "same: these look like MoCo's or SimCLR's logits and labels; pass "
            "losses.InfoNCE(queue) or losses.NTXent(), with the queries as z and the keys as target"
        )


def _read_options(criterion: object) -> dict[str, object]:
    return criterion.keywords if isinstance(criterion, partial) else vars(criterion)


def _check_divergence(z: Tensor, target: Tensor, criterion: object) -> None:
    """Require log-probabilities and probabilities."""
    options = _read_options(criterion)
    _check_distributions("KL divergence", target.exp() if options.get("log_target") else target)
    if bool(z.detach().max() > _TOLERANCE):
        raise ValueError(
            "a KL divergence needs log-probabilities as z, got positive values; pass "
            "z.log_softmax(dim=1)"
        )


def _check_binary(_z: Tensor, target: Tensor, _criterion: object) -> None:
    if not bool(((target >= 0) & (target <= 1)).all()):
        raise ValueError(
            "the targets of a binary cross-entropy must lie within 0 ... 1, got others, which "
            "look like embeddings; use a loss between embeddings, as losses.InfoNCE()"
        )


def _check_distributions(name: str, target: Tensor) -> None:
    rows = target.detach().float()  # (N, K)
    # What has no axis of classes is no distribution either: as far off as can be.
    off = (rows.sum(dim=1) - 1).abs().max() if rows.ndim > 1 else rows.new_ones(())
    if not bool((rows.min() >= 0) & (off < _TOLERANCE)):
        raise ValueError(
            f"the floating targets of a {name} must be distributions over classes, got rows that "
            "are not, which look like embeddings; use a loss between embeddings, as "
            "losses.InfoNCE(), or pass target.softmax(dim=1)"
        )


_CHECKS: dict[tuple[type[nn.Module], Callable[..., object]], Callable[..., None]] = {
    (nn.CrossEntropyLoss, F.cross_entropy): _check_classes,
    (nn.NLLLoss, F.nll_loss): _check_classes,
    (nn.KLDivLoss, F.kl_div): _check_divergence,
    (nn.BCELoss, F.binary_cross_entropy): _check_binary,
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits): _check_binary,
}
