"""MixMask for models that compute their loss inside `forward`.

    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)   # once
    loss = model(x_1, x_2) + model.contrastive_loss.mixed_loss(                    # each step
        online, mixmask.mix_batch(x_1, masks)
    )

MoCo v3, SimSiam and SimCLR re-implementations, and byol-pytorch have an inner loss of two
arguments, whose place `RecordingCriterion` takes. Barlow Twins and VICReg compute theirs in line:
`record_embeddings` listens to their projector. What augments inside `forward` is met by
`RecordingView`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixmask.integrations._steps import Kept, SameState, as_it_is, call_a_copy
from mixmask.losses import (
    Criterion,
    LambdaWeightedLoss,
    MatchingCriterion,
    SharingCriterion,
    lambda_weighted_loss,
)
from mixmask.mixing import MixedBatch

Encode = Callable[[Tensor], Tensor]


class RecordingCriterion:
    r"""Stand in place of a model's inner loss, and offer the mixed term of its calls (eq. 4).

    It is called as the criterion is and returns what that returns; of calls with gradients it
    keeps the two arguments until `mixed_loss` takes them. Around a module it is a module of the
    same parameters, buffers and `state_dict`; attributes of the criterion are reachable. A module
    that holds state is copied before each call, so that the mixed term sees the state that the
    clean one saw.

    Args:
        criterion: (z, target) -> () or (N,): a function, a module, or a method of the model.
        calls: How often `forward` calls it per step: 2 in symmetric methods.
        mixed_criterion: (z, target) -> () or (N,) for the mixed term, where the criterion is no
            loss (SimSiam's `CosineSimilarity`, whose sign `forward` turns) or returns () and each
            sample has a λ of its own. Default: the criterion.
        switch: False keeps the term of λ alone (the paper's ablation).

    Raises:
        TypeError: If the criterion is not callable, or is `CosineSimilarity` or
            `CrossEntropyLoss` and there is no `mixed_criterion`.
        ValueError: If it is a method of a model with a queue, which is filled before the mixed
            term would read it; or if `calls` is not positive.

    Source:
        MixMask, section 3.2 and eq. 4.

    Example:
        >>> import mixmask, torch
        >>> class SimSiam(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
        ...         self.predictor = torch.nn.Linear(16, 16)
        ...         self.criterion = mixmask.losses.NegativeCosine()
        ...     def forward(self, x_1, x_2):
        ...         z_1, z_2 = self.encoder(x_1), self.encoder(x_2)
        ...         loss = self.criterion(self.predictor(z_1), z_2.detach())
        ...         return loss + self.criterion(self.predictor(z_2), z_1.detach())
        >>> model = SimSiam()
        >>> model.criterion = RecordingCriterion(model.criterion, calls=2)
        >>> x_1, x_2 = torch.rand(2, 4, 3, 8, 8)
        >>> mixed = mixmask.mix_batch(x_1, mixmask.BlockMaskGenerator(2))
        >>> loss = model(x_1, x_2)
        >>> z_mixed = model.predictor(model.encoder(mixed.images))
        >>> (loss + model.criterion.mixed_loss(z_mixed, mixed)).backward()
    """

    criterion: Any

    def __new__(cls, criterion: Any = None, **_: Any) -> RecordingCriterion:
        """Make a module of a module, for a model takes nothing else in its place."""
        plain = cls is not RecordingCriterion or not isinstance(criterion, nn.Module)
        return super().__new__(cls if plain else _RecordingModule)

    def __init__(
        self,
        criterion: Criterion,
        *,
        calls: int = 1,
        mixed_criterion: Criterion | None = None,
        switch: bool = True,
    ) -> None:
        """Refuse what is not a loss of embeddings now rather than at the first step."""
        _check_criterion(criterion, mixed_criterion)
        # Not by assignment, which would make it a child and rename its state.
        vars(self).update(criterion=criterion, mixed_criterion=mixed_criterion)
        self.switch = switch
        self._calls: Kept[tuple[Criterion, Tensor, Tensor]] = Kept(calls, "criterion")

    def __getattr__(self, name: str) -> Any:
        if "criterion" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["criterion"], name)

    def __repr__(self) -> str:
        return (
            f"RecordingCriterion({self.criterion!r}, calls={self._calls.calls}, "
            f"switch={self.switch})"
        )

    def __call__(self, z: Tensor, target: Tensor) -> Any:
        """Return the criterion's value; of a call with gradients, keep the arguments."""
        if not (torch.is_grad_enabled() and z.requires_grad):
            return self.criterion(z, target)
        if not target.is_floating_point():
            raise TypeError(
                f"the criterion must take embeddings and targets, got targets of {target.dtype}; "
                "wrap the function that takes embeddings, not the cross-entropy of its logits"
            )
        self._calls.add((as_it_is(self.criterion), z, target))
        return self.criterion(z, target)

    def mixed_loss(
        self,
        z_mixed: Tensor | Encode | Sequence[Tensor | Encode],
        mixed: MixedBatch | Sequence[MixedBatch],
        *,
        call: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Return the mixed term of the step that has just run, to be added to its loss.

        Args:
            z_mixed: (N, ...) embeddings of the mixed images by the online branch, as the criterion
                takes them; or that branch, which is called with `mixed.images`. A list mixes
                several views.
            mixed: What was mixed, or a list in the same order.
            call: To which of forward's calls a mixed view belongs: the one whose first argument
                came from the view that was mixed. Default: the first; for a list, one each.

        Returns:
            () scalar. What was recorded is then forgotten.

        Raises:
            ValueError: If forward has not called the criterion `calls` times since the last time:
                not yet, without gradients, or not for this step. Or if sizes do not fit.
            TypeError: If an argument has the wrong type.
        """
        views = [z_mixed] if isinstance(z_mixed, Tensor) or callable(z_mixed) else list(z_mixed)
        records = [mixed] if isinstance(mixed, MixedBatch) else list(mixed)
        order = _order(call, len(records), single=isinstance(mixed, MixedBatch))
        if not len(views) == len(records) == len(order) or not records:
            raise ValueError(
                f"z_mixed, mixed and call must be as many, at least one, got {len(views)}, "
                f"{len(records)} and {len(order)}; pass one of each per mixed view"
            )
        if not all(0 <= index < self._calls.calls for index in order):
            raise ValueError(
                f"call must name the calls 0 ... {self._calls.calls - 1}, got {order}; pass calls= "
                "as many as forward makes"
            )
        calls = self._taken(len(records))
        total = None
        for index, view, record in zip(order, views, records, strict=True):
            embedding = view if isinstance(view, Tensor) else view(record.images)
            term = self._term(calls[index], embedding, record)
            total = term if total is None else total + term
        assert total is not None
        self.reset()
        return total

    def reset(self) -> None:
        """Forget what was recorded, where the loss of a step is not used."""
        self._calls.items = []

    def _taken(self, views: int) -> list[tuple[Criterion, Tensor, Tensor]]:
        del views
        return self._calls.take()

    def _term(
        self, call: tuple[Criterion, Tensor, Tensor], z_mixed: Tensor, mixed: MixedBatch
    ) -> Tensor:
        kept, z, target = call
        if self.mixed_criterion is not None:
            kept = self.mixed_criterion
        if isinstance(kept, MatchingCriterion):
            whole = LambdaWeightedLoss(as_it_is(kept), switch=self.switch)
            return whole.mixed_loss(z_mixed, target, mixed, z=z)
        criterion = kept
        if isinstance(kept, SharingCriterion):
            criterion = as_it_is(kept)
        elif isinstance(kept, nn.Module):
            # The term of the partners must not see what that of the images left.
            criterion = partial(call_a_copy, kept)
        return lambda_weighted_loss(criterion, z_mixed, target, mixed, switch=self.switch)


class _RecordingModule(RecordingCriterion, SameState):
    """`RecordingCriterion` around a module."""

    def __init__(self, criterion: Any, **options: Any) -> None:
        SameState.__init__(self, criterion)
        super().__init__(criterion, **options)

    def train(self, mode: bool = True) -> _RecordingModule:
        self.criterion.train(mode)
        self.training = mode
        return self


class RecordingView:
    """Stand in place of an augmentation that runs inside `forward`, and keep the view it made.

    Around a module it is a module of the same `state_dict`. Calls under `torch.no_grad()` are not
    kept.

    Args:
        augment: Images (N, C, H, W) to a view of them: a function or a module.
        calls: How often `forward` calls it per step: 2 where it makes both views.

    Raises:
        TypeError: If it is not callable.
        ValueError: If `calls` is not positive.

    Example:
        >>> import mixmask, torch
        >>> view = RecordingView(torch.nn.Identity())
        >>> x = view(torch.rand(4, 3, 8, 8))
        >>> mixed = mixmask.mix_batch(view.take(), mixmask.BlockMaskGenerator(2))
    """

    augment: Any

    def __new__(cls, augment: Any = None, **_: Any) -> RecordingView:
        """Make a module of a module, for a model takes nothing else in its place."""
        plain = cls is not RecordingView or not isinstance(augment, nn.Module)
        return super().__new__(cls if plain else _ViewModule)

    def __init__(self, augment: Callable[[Tensor], Tensor], *, calls: int = 1) -> None:
        """Store the augmentation."""
        if not callable(augment):
            raise TypeError(
                f"augment must be callable with images, got {type(augment).__name__}; pass for "
                "instance the model's augment_fn"
            )
        vars(self)["augment"] = augment
        self._views: Kept[Tensor] = Kept(calls, "augmentation")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the view, and keep it."""
        view: Tensor = self.augment(images)
        if torch.is_grad_enabled():
            self._views.add(view)
        return view

    def take(self, call: int = 0) -> Tensor:
        """Return the view that one of the step's calls made, and forget all of them.

        Args:
            call: Which of the `calls`.

        Returns:
            (N, C, H, W), without a gradient.

        Raises:
            ValueError: If forward has not run since the last time, or ran more than once.
        """
        return self._views.take()[call].detach()

    def reset(self) -> None:
        """Forget the views, where the loss of a step is not used."""
        self._views.items = []


class _ViewModule(RecordingView, SameState):
    """`RecordingView` around a module."""

    def __init__(self, augment: Any, **options: Any) -> None:
        SameState.__init__(self, augment)
        super().__init__(augment, **options)

    def train(self, mode: bool = True) -> _ViewModule:
        self.augment.train(mode)
        self.training = mode
        return self


def record_embeddings(
    module: nn.Module, criterion: Criterion, *, switch: bool = True
) -> RecordingCriterion:
    """Record the embeddings of both views where a model computes its loss in line.

    A hook on the module keeps its first two outputs of each step, as if the criterion had been
    called with them and, the other way around, once more; the model is not changed. The mixed
    embeddings must come from the same module.

    Args:
        module: What gives the embeddings (N, C) that the loss compares: Barlow Twins' and VICReg's
            `model.projector`. Called twice per step, once per view. Name it after conversions
            that replace modules, such as `convert_sync_batchnorm`.
        criterion: (z, target) -> () or (N,), for the mixed term: `losses.BarlowTwins(lambd)`,
            `losses.VICReg()`.
        switch: False keeps the term of λ alone (the paper's ablation).

    Returns:
        A `RecordingCriterion`, of which `mixed_loss` is used alone. Its call 0 has the first view
        as its query (pass a mixture of that view), its call 1 the second one.

    Raises:
        TypeError: If the module is none, or the criterion is no loss of embeddings.

    Example:
        >>> import mixmask, torch
        >>> projector = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
        >>> criterion = record_embeddings(projector, mixmask.losses.BarlowTwins())
        >>> x_1, x_2 = torch.rand(2, 4, 3, 8, 8)
        >>> loss = mixmask.losses.barlow_twins(projector(x_1), projector(x_2))
        >>> mixed = mixmask.mix_batch(x_1, mixmask.BlockMaskGenerator(2))
        >>> (loss + criterion.mixed_loss(projector, mixed)).backward()
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a torch module, got {type(module).__name__}; pass model.projector"
        )
    recorded = _RecordedEmbeddings(criterion, calls=2, switch=switch)
    module.register_forward_hook(recorded.keep)
    return recorded


class _RecordedEmbeddings(RecordingCriterion):
    """Two outputs of a module are two calls; what follows them must be the mixed views'."""

    def __init__(self, criterion: Criterion, **options: Any) -> None:
        super().__init__(criterion, **options)
        self._outputs: list[Tensor] = []
        self._more = 0

    def keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """Keep an output with a gradient: the first two, and the number of the rest."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        if len(self._outputs) == 2:
            self._more += 1
        else:
            self._outputs.append(output)

    def reset(self) -> None:
        """Forget what was recorded."""
        self._outputs, self._more = [], 0
        super().reset()

    def _taken(self, views: int) -> list[tuple[Criterion, Tensor, Tensor]]:
        outputs, more = self._outputs, self._more
        self.reset()
        if len(outputs) < 2 or more not in (0, views):
            raise ValueError(
                "the module must have been called for both clean views and the mixed ones since "
                f"the last mixed_loss, got {len(outputs) + more} calls; take mixed_loss in every "
                "step (or call reset() where one is skipped), and run what is not trained under "
                "torch.no_grad()"
            )
        first, second = outputs
        return [(self.criterion, first, second), (self.criterion, second, first)]


def _order(call: int | Sequence[int] | None, n: int, *, single: bool) -> list[int]:
    """Return the index of the call of each of n mixed views."""
    if call is None:
        return [0] if single else list(range(n))
    return [call] if isinstance(call, int) else list(call)


def _check_criterion(criterion: Any, mixed_criterion: Any) -> None:
    for one in (criterion, mixed_criterion):
        if not callable(one) and not (one is None and one is mixed_criterion):
            raise TypeError(
                f"the criterion must be callable as (z, target), got {type(one).__name__}; pass "
                "for instance model.contrastive_loss"
            )
    used = criterion if mixed_criterion is None else mixed_criterion
    if isinstance(used, nn.CosineSimilarity):
        raise TypeError(
            "the mixed term must be a loss, got CosineSimilarity, which is large where the loss is "
            "small; pass mixed_criterion=losses.NegativeCosine()"
        )
    if isinstance(used, nn.CrossEntropyLoss):
        raise TypeError(
            "the criterion must take embeddings and targets, got CrossEntropyLoss, which takes "
            "logits; wrap the function that makes them, or pass for instance "
            "mixed_criterion=losses.NTXent()"
        )
    if mixed_criterion is None and hasattr(getattr(criterion, "__self__", None), "queue"):
        raise ValueError(
            "the criterion must not read a queue of its model, which is filled before the mixed "
            "term, got a method of a model with one; use mixmask.integrations.moco"
        )
