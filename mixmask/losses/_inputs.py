"""The inputs of a step as lists: directions, mixed views, and their sizes checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from mixmask._checks import check_tensor
from mixmask.mixing import MixedBatch

# One embedding, or one per direction or mixed view.
Embeddings = Tensor | Sequence[Tensor]
Records = MixedBatch | Sequence[MixedBatch]

Part = TypeVar("Part")


def as_list(value: Part | Sequence[Part]) -> list[Part]:
    """Return the parts of a list or tuple, or the value itself as the only part."""
    # No type says that a part is not a sequence itself.
    return list(value) if isinstance(value, (list, tuple)) else [cast("Part", value)]


def as_directions(
    z: Embeddings, target: Embeddings, name: str = "z"
) -> list[tuple[Tensor, Tensor]]:
    """Return embeddings with their targets, one pair per direction."""
    # A tensor beside a tuple is one output of several, left unpacked, and not one direction.
    several = [isinstance(value, (list, tuple)) for value in (z, target)]
    if several[0] != several[1]:
        counts = [f"{type(value).__name__} of {len(value)}" for value in (z, target)]
        raise TypeError(
            f"{name} and target must both be tensors, or both be tuples with one entry per "
            f"direction, got {counts[0]} and {counts[1]}; if a model returns several outputs, "
            f"pass the one that the loss compares, as in {name}[0]"
        )
    ours, theirs = as_list(z), as_list(target)
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"{name} and target must hold one entry per direction, got {len(ours)} and "
            f"{len(theirs)}; pair each view with its target, as (z1, z2) and (t2, t1)"
        )
    return list(zip(ours, theirs, strict=True))


def match_directions(values: list[Tensor], count: int) -> list[Tensor]:
    """Return the target of each mixed view: the first one's, or one per direction."""
    if len(values) == 1 or count <= 1:
        return values[:1] * count
    if len(values) != count:
        raise ValueError(
            f"there must be one mixed view, or one per direction, got {count} for {len(values)} "
            "directions; pass them in the order of the directions"
        )
    return values


def as_pairs(z_mixed: Embeddings | None, mixed: Records | None) -> list[tuple[Tensor, MixedBatch]]:
    """Return embeddings with their records, one pair per mixed view; none if nothing was mixed."""
    if z_mixed is None and mixed is None:
        return []
    if z_mixed is None or mixed is None:
        raise ValueError(
            "z_mixed and mixed belong together, got only one of them; pass the embeddings of "
            "mixed.images and mixed itself"
        )
    embeddings, records = as_list(z_mixed), as_records(mixed)
    if len(embeddings) != len(records) or not records:
        fix = "in the same order"
        if isinstance(mixed, MixedBatch):
            fix = (
                "and if the encoder returns several outputs, the one that the loss compares, "
                "as in z_mixed[0]"
            )
        raise ValueError(
            f"z_mixed and mixed must have the same length, at least one, got {len(embeddings)} and "
            f"{len(records)}; pass one embedding for each mixed view, {fix}"
        )
    return list(zip(embeddings, records, strict=True))


def as_records(mixed: Records) -> list[MixedBatch]:
    """Return what was mixed as a list."""
    records = as_list(mixed)
    for record in records:
        check_mixed(record)
    return records


def check_mixed(mixed: object) -> None:
    """Require what mix_batch returned, as a whole."""
    if not isinstance(mixed, MixedBatch):
        raise TypeError(
            f"mixed must be a MixedBatch, got {type(mixed).__name__}; pass what mix_batch returned "
            "itself, not its images"
        )


def check_sizes(n: int, **tensors: Tensor) -> None:
    """Require tensors that hold one row per image, by their names."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.ndim == 0 or tensor.shape[0] != n:
            fix = "pass the embeddings of this batch, before any gathering"
            if tensor.ndim and tensor.shape[0] == 2 * n:  # (2N, ...), as SimCLR stacks its views.
                fix = f"both views in one tensor are split first, as in {name}.chunk(2)"
            elif tensor.ndim and 2 * tensor.shape[0] == n:  # They were mixed as one batch.
                fix += "; both views in one tensor are mixed one at a time, as images.chunk(2)[0]"
            raise ValueError(
                f"{name} must hold one row for each of the {n} mixed images, got "
                f"{tuple(tensor.shape)}; {fix}"
            )


def count_rows(z: Tensor) -> int:
    check_tensor("z", z)
    return z.shape[0] if z.ndim else 0


def check_loss(loss: Tensor, n: int, lam: Tensor | None = None) -> Tensor:
    """Return what a criterion gave if it is () or (N,); for a λ per sample, (N,)."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the criterion must return a tensor, () or (N,), got {type(loss).__name__}; "
            "wrap it so that it returns the loss alone"
        )
    if loss.shape not in ((), (n,)):
        raise ValueError(
            f"the criterion must return () or (N,) with N = {n}, got {tuple(loss.shape)}; "
            "reduce it over all axes except the first"
        )
    if lam is not None and lam.ndim == 1 and loss.ndim == 0:
        raise ValueError(
            "one λ per sample needs a criterion that returns (N,), got a scalar; "
            "build it with reduction='none', if it has that, or use one mask for the whole batch"
        )
    return loss


def check_gradient(loss: Tensor, z_mixed: Tensor) -> Tensor:
    """Return a mixed term if it can train what embedded the mixed view."""
    if z_mixed.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "the mixed term has no gradient, though z_mixed requires one: the criterion detaches "
            "its first argument, or compares others; pass a function (z, target) of the embeddings "
            "that are trained"
        )
    return loss
