"""MixMask for models that compute their loss inside `forward`.

    model.contrastive_loss = RecordingCriterion(model.contrastive_loss, calls=2)   # once
    loss = model(x_1, x_2) + model.contrastive_loss.mixed_loss(                    # each step
        online, mixmask.mix_batch(x_1, masks)
    )

MoCo v3, SimSiam and SimCLR re-implementations, and byol-pytorch have an inner loss of two
arguments, which `RecordingCriterion` replaces. Barlow Twins and VICReg compute theirs in line:
`record_embeddings` listens to their projector. `RecordingView` is for views made in `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from mixmask.integrations._steps import (
    Snapshot,
    StandIn,
    StandInModule,
    check_recordable,
    comes_from,
    list_unused,
    split_arguments,
)
from mixmask.losses import Criterion, LambdaWeightedLoss
from mixmask.mixing import MixedBatch

Encode = Callable[[Tensor], Tensor]
# The criterion as it was, z and target.
Call = tuple[Snapshot, Tensor, Tensor]


class RecordingCriterion(StandIn[Call]):
    r"""Replace a model's inner loss, and offer the mixed term of its calls (eq. 4).

    Calls are passed on. Of calls with gradients it keeps the arguments and a copy of the
    criterion's state (see `LambdaWeightedLoss`) until `mixed_loss` takes them: the mixed term
    meets the state of the clean call, even if `forward` fills a bank afterwards. Around a module
    it is a module with the same parameters, buffers and `state_dict`.

    Args:
        criterion: (z, target, ...) -> () or (N,): a function, a module, or a method of the model.
            The mixed term gets the same further arguments.
        calls: How often `forward` calls it per step: 2 in symmetric methods.
        mixed_criterion: (z, target) -> () or (N,) for the mixed term, if the criterion is not a
            loss (SimSiam's `CosineSimilarity`, MoCo's logits), or returns () although each sample
            has its own λ. A queue is read at the clean call: `InfoNCE(lambda: model.queue)`.
        switch: False keeps the term of λ alone (the paper's ablation).

    Raises:
        TypeError: If the criterion is not callable, or is `CosineSimilarity` or
            `CrossEntropyLoss` and there is no `mixed_criterion`.
        ValueError: If `calls` is not positive.

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

    replaces = kind = "criterion"
    criterion: Any
    mixed_criterion: object

    def __init__(
        self,
        criterion: Criterion,
        *,
        calls: int = 1,
        mixed_criterion: Criterion | None = None,
        switch: bool = True,
    ) -> None:
        check_recordable(criterion, mixed_criterion)
        super().__init__(criterion, calls)
        # Not by assignment, as the criterion.
        vars(self)["mixed_criterion"] = mixed_criterion
        self.switch = switch
        # What is kept is not the criterion's state, though its model holds it.
        self._ignored = "_kept", *list_unused(self._mixed_or_own)
        self._tried = False

    @property
    def _mixed_or_own(self) -> Any:
        return self.criterion if self.mixed_criterion is None else self.mixed_criterion

    def __repr__(self) -> str:
        return f"RecordingCriterion({self.criterion!r}, calls={self._calls}, switch={self.switch})"

    def __call__(self, *args: Any, **options: object) -> Any:
        """Return the criterion's value; of a call with gradients, keep the arguments."""
        if torch.is_grad_enabled():
            self._record(args, options)
        return self.criterion(*args, **options)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # Imports no compiler by itself.
    def _record(self, args: Sequence[object], options: Mapping[str, object]) -> None:
        z, target, more = split_arguments(self.criterion, args, options)
        if not isinstance(z, Tensor) or not isinstance(target, Tensor):
            raise TypeError(
                "the criterion must take two tensors first, z and target, got "
                f"{type(z).__name__} and {type(target).__name__}; record a function that does, one "
                "call per pair"
            )
        if not z.requires_grad:
            return
        if not target.is_floating_point():
            raise TypeError(
                f"the criterion must take embeddings and targets, got targets of {target.dtype}; "
                "wrap the function that takes embeddings, not the cross-entropy of its logits"
            )
        again = more and self.mixed_criterion is None
        trained = [name for name, value in more.items() if _is_trained(value, z)] if again else []
        if trained:
            raise TypeError(
                f"the criterion must take two embeddings, got others as {', '.join(trained)}; "
                "record the function of one pair that it calls, or pass one as mixed_criterion"
            )
        used = partial(self._mixed_or_own, **more) if again else self._mixed_or_own
        self._keep((Snapshot(used, self._ignored), z, target))

    def mixed_loss(
        self,
        z_mixed: Tensor | Encode | Sequence[Tensor | Encode],
        mixed: MixedBatch | Sequence[MixedBatch],
        *,
        call: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Return the mixed term of the step that has just run, to be added to its loss.

        Args:
            z_mixed: (N, ...) embeddings of the mixed images, as the criterion takes them; or the
                online branch, to be called with `mixed.images`; or a list of either.
            mixed: What was mixed, or a list in the same order.
            call: Which call in `forward` had the view that was mixed as its first argument.
                Default: the first; for a list, one each.

        Returns:
            () scalar. The recorded calls are then forgotten.

        Raises:
            ValueError: If `forward` has not called the criterion `calls` times with gradients
                since the last `mixed_loss`, or if sizes do not fit.
            TypeError: If an argument has the wrong type.
        """
        views = [z_mixed] if isinstance(z_mixed, Tensor) or callable(z_mixed) else list(z_mixed)
        records = [mixed] if isinstance(mixed, MixedBatch) else list(mixed)
        order = range(len(records)) if call is None else [call] if isinstance(call, int) else call
        if not len(views) == len(records) == len(order) or not records:
            raise ValueError(
                "z_mixed, mixed and call must have the same length, at least one, got "
                f"{len(views)}, {len(records)} and {len(order)}; pass one of each per mixed view"
            )
        if not all(0 <= index < self._calls for index in order):
            raise ValueError(
                f"call must name the calls 0 ... {self._calls - 1}, got {list(order)}; "
                "pass calls= as many as forward makes"
            )
        calls = self._take_before([view for view in views if isinstance(view, Tensor)])
        terms = []
        for index, view, record in zip(order, views, records, strict=True):
            embedding = view if isinstance(view, Tensor) else view(record.images)  # (N, ...)
            terms.append(self._term(calls[index], embedding, record))
        # A branch that was called above may have been recorded as well.
        self.reset()
        return reduce(add, terms)

    def _take_before(self, embedded: Sequence[Tensor]) -> list[Call]:
        """Return the step's calls; those of mixed views that are embedded came after them."""
        del embedded
        return self._take()

    def _term(self, call: Call, z_mixed: Tensor, mixed: MixedBatch) -> Tensor:
        snapshot, z, target = call
        tried, self._tried = self._tried, True
        with snapshot.installed() as criterion:
            whole = LambdaWeightedLoss(criterion, switch=self.switch, ignore=self._ignored)
            # Only its first call compares trained parameters, for which a device is waited for.
            whole._tried = tried
            return whole.mixed_loss(z_mixed, target, mixed, z=z)


def _is_trained(value: object, z: Tensor) -> bool:
    """Tell whether an argument is a batch of embeddings with a gradient, as z."""
    return isinstance(value, Tensor) and value.requires_grad and value.shape == z.shape


class _RecordingModule(RecordingCriterion, StandInModule):
    """`RecordingCriterion` around a module."""


RecordingCriterion.as_module = _RecordingModule


class RecordingView(StandIn[Tensor]):
    """Replace an augmentation that runs inside `forward`, and keep the view it made.

    Around a module it is a module with the same `state_dict`. Views made under `torch.no_grad()`
    are not kept.

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

    replaces, kind = "augment", "augmentation"
    augment: Any

    def __init__(self, augment: Callable[[Tensor], Tensor], *, calls: int = 1) -> None:
        if not callable(augment):
            raise TypeError(
                f"augment must be callable with images, got {type(augment).__name__}; pass for "
                "instance the model's augment_fn"
            )
        super().__init__(augment, calls)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the view, and keep it."""
        view: Tensor = self.augment(images)
        if torch.is_grad_enabled():
            self._keep(view)
        return view

    def take(self, call: int = 0) -> Tensor:
        """Return the view (N, C, H, W) that a call of the step made, and forget all of them.

        Raises:
            ValueError: If forward has not run since the last time, or ran more than once.
        """
        return self._take()[call].detach()


class _ViewModule(RecordingView, StandInModule):
    """`RecordingView` around a module."""


RecordingView.as_module = _ViewModule


def record_embeddings(
    module: nn.Module, criterion: Criterion, *, switch: bool = True
) -> RecordingCriterion:
    """Record the embeddings of both views where a model computes its loss in line.

    A hook keeps the module's first two outputs of each step, as if the criterion had been called
    with them in both orders. The mixed embeddings must come from the same module.

    Args:
        module: Returns the embeddings (N, C) that the loss compares, once per view: Barlow
            Twins' and VICReg's `model.projector`. Pass it after conversions that replace modules,
            such as `convert_sync_batchnorm`.
        criterion: (z, target) -> () or (N,), for the mixed term: `losses.BarlowTwins(lambd)`,
            `losses.VICReg()`.
        switch: False keeps the term of λ alone (the paper's ablation).

    Returns:
        A `RecordingCriterion` for its `mixed_loss`; the query of call 0 is the first view, that of
        call 1 the second.

    Raises:
        TypeError: If the module is not a torch module, or the criterion not a loss of embeddings.

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

    def keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        """Keep the first two outputs with a gradient, and count the rest."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        # The state is that of the first two outputs; later ones only count.
        if len(self._kept) < 2:
            self._kept.append((Snapshot(self.criterion, self._ignored), output, output))
        else:
            self._kept.append(self._kept[1])

    def _take_before(self, embedded: Sequence[Tensor]) -> list[Call]:
        kept = self._kept
        self.reset()
        if len(kept) not in (2, 2 + len(embedded)):
            raise ValueError(
                "the module must have been called for both clean views and the mixed ones since "
                f"the last mixed_loss, got {len(kept)} calls; take mixed_loss in every step (or "
                "call reset() where one is skipped), run what is not trained under "
                "torch.no_grad(), and give views that are embedded in one call of 2N to "
                "lambda_weighted_loss in forward"
            )
        (_, first, _), (state, second, _) = kept[:2]
        # Embedded before the clean views, mixtures would be taken for them, and the loss be wrong.
        if any(comes_from(z, (first, second)) for z in embedded):
            raise ValueError(
                "the module's first two outputs must be those of the clean views, got a mixed view "
                "among them; call the model before the mixed images are embedded"
            )
        return [(state, first, second), (state, second, first)]
