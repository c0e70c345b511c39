"""MixMask in the MoCo builder that everyone copies, without an edit of the builder.

    model = wrap(model, masks)                                          # once, before DDP
    loss = criterion(*model(im_q, im_k)) + mixed_loss(model)            # each step

Builders of this family (facebookresearch/moco, szq0214/Un-Mix, kirill-vish/MixMask,
Westlake-AI/openmixup and their descendants) have `encoder_q`, `encoder_k` and a `queue (C, K)`, and
`forward` calls `_dequeue_and_enqueue(keys)`; the last two may have other names. The mixed term is
taken just before the keys are enqueued, when both the keys and the old queue are available.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixmask._partners import Partner
from mixmask.integrations._moco import (
    IN_FORWARD,
    MARK,
    FirstStep,
    check_builder,
    check_keys,
    find_builder,
    find_views,
    normalise,
)
from mixmask.integrations._steps import Mixing, View, mix_views
from mixmask.losses import InfoNCE
from mixmask.masks import MaskGenerator
from mixmask.mixing import MixedBatch, mix_batch

Encode = Callable[[Any, Tensor], Tensor]


def wrap(
    model: nn.Module,
    masks: MaskGenerator | Tensor,
    *,
    switch: bool = True,
    partner: Partner = "reverse",
    per_sample: bool = False,
    symmetric: bool = False,
    temperature: float | None = None,
    encode: Encode | None = None,
    enqueue: str = "_dequeue_and_enqueue",
    queue: str = "queue",
    layout: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Let a MoCo builder take the mixed term of its own training steps (MixMask, eq. 4).

    The model keeps its class, `state_dict` and `forward`; each training step also passes the
    mixed queries through `encoder_q`. Take the term with `mixed_loss(model)`.

    The first step is checked, and nothing stays enqueued if a check fails: `encoder_q` must get
    the images that are mixed, the keys must have unit length, and logits (N, 1 + K) must be the
    cosines with keys and old queue. Without logits, only `encoder_q` may be trained.

    Args:
        model: The builder, or DistributedDataParallel around it. Its `forward` must enqueue the
            batch's own keys (N, C), before any gathering. Queries are its argument `im_q`, or
            else the first argument; in a list, the first entry.
        masks: What `mix_batch` takes: a generator, or a bool tensor.
        switch: False keeps the term of λ alone (the paper's ablation).
        partner: See `mix_batch`.
        per_sample: Draw one mask per sample instead of one per batch.
        symmetric: True if the builder contrasts both views and enqueues `cat([k_1, k_2])`. Both
            views are then mixed, in two more passes.
        temperature: τ. Default: the model's `T` or `head.temperature`, read in each step.
        encode: (model, images) -> (N, C) normalised queries, if more layers follow `encoder_q`;
            logits are then not compared. Default: `encoder_q`, then normalisation.
        enqueue: Name of the method that enqueues.
        queue: Name of the queue; its keys have unit length.
        layout: "CK" if the queue is (C, K), with keys as columns; "KC" if it is (K, C). Default:
            "CK", but a square queue needs it named.
        generator: A CPU generator for masks and partners. Default: torch's global one.

    Returns:
        The model that was passed.

    Raises:
        ValueError: If the model lacks an attribute or is already wrapped, or if an option does
            not fit.
        TypeError: If the model has no temperature, is not a module, or copies itself to several
            devices (`nn.DataParallel`).

    Source:
        He et al., "MoCo", algorithm 1; MixMask, eq. 4 and algorithm 1.

    Example:
        >>> import copy, mixmask
        >>> import torch.nn.functional as F
        >>> class Builder(nn.Module):
        ...     T = 0.2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder_q = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
        ...         self.encoder_k = copy.deepcopy(self.encoder_q)
        ...         self.register_buffer("queue", F.normalize(torch.randn(16, 32), dim=0))
        ...     def _dequeue_and_enqueue(self, keys):
        ...         self.queue = torch.cat([keys.T, self.queue], dim=1)[:, :32]
        ...     def forward(self, im_q, im_k):
        ...         q = F.normalize(self.encoder_q(im_q), dim=1)
        ...         k = F.normalize(self.encoder_k(im_k), dim=1).detach()
        ...         logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue], dim=1)
        ...         self._dequeue_and_enqueue(k)
        ...         return logits / self.T, torch.zeros(len(q), dtype=torch.long)
        >>> model = wrap(Builder(), mixmask.BlockMaskGenerator(2))
        >>> im_q, im_k = torch.rand(2, 4, 3, 8, 8)
        >>> loss = F.cross_entropy(*model(im_q, im_k)) + mixed_loss(model)
        >>> loss.backward()
    """
    builder = find_builder(model)
    check_builder(builder, enqueue, queue, layout)
    if not callable(masks) and not isinstance(masks, Tensor):
        raise TypeError(
            f"masks must be a generator or a bool tensor, got {type(masks).__name__}; "
            "use for instance BlockMaskGenerator(grid_size=8)"
        )
    if per_sample and isinstance(masks, Tensor):
        raise ValueError(
            "per_sample=True draws masks from a generator, got a tensor; pass (N, h, w) masks, "
            "which are one per sample already, without it"
        )
    mixing = partial(_mix, masks, per_sample, partner=partner, generator=generator)
    mixture = _Mixture(
        model=builder, mixing=mixing, switch=switch, symmetric=symmetric, temperature=temperature,
        encode=encode, enqueue=enqueue, queue=queue, layout=layout or "CK",
    )  # fmt: skip
    mixture.criterion()  # Asks for the temperature now.
    # Both live in the instance: its class, parameters and buffers are those of before.
    setattr(builder, MARK, mixture)
    setattr(builder, enqueue, mixture)
    builder.register_forward_pre_hook(mixture.before, with_kwargs=True)
    builder.register_forward_hook(mixture.after, always_call=True)
    return model


def mixed_loss(model: nn.Module) -> Tensor:
    """Return the mixed term of the last forward pass, to be added with weight one.

    Args:
        model: What `wrap` returned, or DistributedDataParallel or `torch.compile` around it.

    Returns:
        () scalar. It can be taken once; nothing of the step is kept.

    Raises:
        TypeError: If the model is not a module, or copies itself to several devices.
        ValueError: If the model is not wrapped, if it has not run a training step yet, or if the
            term was taken already.
    """
    builder = find_builder(model)
    mixture: _Mixture | None = vars(builder).get(MARK)
    if mixture is None:
        raise ValueError(
            f"model must be wrapped, got a {type(builder).__name__} that is not; "
            "call model = wrap(model, masks) first"
        )
    return mixture.take()


def _mix(masks: Any, per_sample: bool, images: Tensor, **options: Any) -> MixedBatch:
    if per_sample:
        masks = masks(len(images), device=images.device, generator=options["generator"])
    return mix_batch(images, masks, **options)


@dataclass(eq=False)
class _Mixture:
    """What `wrap` adds to one model; it replaces the method that enqueues."""

    model: Any
    mixing: Mixing
    switch: bool
    symmetric: bool
    temperature: float | None
    encode: Encode | None
    enqueue: str
    queue: str
    layout: str
    views: list[Tensor] = field(default_factory=list)
    term: Tensor | None = None
    first: FirstStep | None = None
    checked: bool = False
    spent: bool = False

    def __getstate__(self) -> dict[str, object]:
        # Copies and pickles of the model leave the current step out.
        return {**vars(self), "views": [], "term": None, "first": None}

    def before(self, model: nn.Module, args: object, options: object) -> None:
        """Find the images of a training step, before its `forward`."""
        if not (model.training and torch.is_grad_enabled()):
            return
        if model is not self.model:
            raise TypeError(
                "the model must be the one that was wrapped, got a copy of it, as nn.DataParallel "
                f"makes; use DistributedDataParallel, or {IN_FORWARD}"
            )
        if self.term is not None:
            raise ValueError(
                "the mixed term of the last forward pass was not taken, so its loss lacked it; add "
                "mixed_loss(model) to each step's loss, take it also where a step is skipped, and "
                "call the model in eval mode or under torch.no_grad() where nothing is trained"
            )
        self.views = find_views(model, args, options, 1 + self.symmetric)
        # Once: the checks clone the queue and compare values, for which a device is waited for.
        if not self.checked:
            self.first = FirstStep(self.model)

    def __call__(self, keys: Tensor, *args: object, **options: object) -> object:
        """Take the mixed term with the old queue, then enqueue."""
        if self.views:
            # Builders enqueue under no_grad.
            with torch.enable_grad():
                self._mix(keys)
        return getattr(type(self.model), self.enqueue)(self.model, keys, *args, **options)

    def after(self, _model: nn.Module, _args: object, output: object) -> None:
        """Release the images, also if `forward` failed; compare the first output."""
        first, self.first, self.views = self.first, None, []
        if first is None:
            return
        first.close()
        if output is None or self.term is None:
            return
        if self.encode is None:
            try:
                first.check_output(output, self.queue, self.layout, self._temperatures())
            except ValueError:
                # As if the step had not been: the next one is checked again.
                self.term = None
                first.restore()
                raise
        self.checked = True

    def take(self) -> Tensor:
        term, self.term = self.term, None
        if term is None:
            raise ValueError(
                "there must be a training step whose mixed term was not taken yet, got "
                + ("one that was; take it once per forward pass" if self.spent else "none yet")
                + ", with the model in train mode, gradients enabled and keys enqueued inside "
                f"forward by {self.enqueue}"
            )
        self.spent = True
        return term

    def criterion(self) -> InfoNCE:
        # Read in each step, for a loop may schedule it.
        temperature = next(iter(self._temperatures()), None)
        if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
            raise TypeError(
                "the temperature must be a number in model.T or model.head.temperature, got "
                f"{temperature!r}; pass wrap(model, masks, temperature=0.2)"
            )
        queue = getattr(self.model, self.queue)
        # (C, K) -> (K, C)
        return InfoNCE(queue.T if self.layout == "CK" else queue, float(temperature))

    def _temperatures(self) -> list[object]:
        """Return ours, and that of the model."""
        head = getattr(self.model, "head", None)
        every = self.temperature, getattr(self.model, "T", None), getattr(head, "temperature", None)
        return [one for one in every if one is not None]

    def _mix(self, keys: Tensor) -> None:
        if self.term is not None:
            self.term = None
            raise ValueError(
                "keys must be enqueued once per forward pass, got a second call; a builder that "
                f"enqueues per view is not supported: {IN_FORWARD}"
            )
        n, criterion = len(self.views[0]), self.criterion()
        directions = 1 + self.symmetric
        check_keys(keys, n, directions, getattr(self.model, self.queue), self.layout)
        # The keys of the second view are the targets of the first, and the other way around: of
        # (N, C) keys both slices are all of them, of (2N, C) they are k_2 and k_1.
        pairs = list(zip(self.views[:directions], (keys[-n:], keys[:n]), strict=False))
        if self.first is not None:
            self.first.check_keys(self.views, pairs, compare=self.encode is None)
        views: list[View] = [(images, self._embed, [(criterion, k)]) for images, k in pairs]
        mean, _ = mix_views(self.mixing, views, switch=self.switch)
        self.term = directions * mean

    def _embed(self, images: Tensor) -> Tensor:
        if self.encode is not None:
            return self.encode(self.model, images)  # (N, C)
        return normalise(self.model.encoder_q(images))  # (N, C)
