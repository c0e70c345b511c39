"""MixMask in the MoCo builder that everyone copies, without an edit of the builder.

    model = wrap(model, masks)                                          # once, before DDP
    loss = criterion(*model(im_q, im_k)) + mixed_loss(model)            # each step

A builder of the family has `encoder_q`, `encoder_k`, a `queue (C, K)` and calls
`_dequeue_and_enqueue(keys)` inside `forward`: facebookresearch/moco, szq0214/Un-Mix,
kirill-vish/MixMask, Westlake-AI/openmixup and their descendants. The mixed term is taken where the
keys and the old queue are both at hand: just before the keys are enqueued.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask._partners import Partner
from mixmask.losses import InfoNCE, lambda_weighted_loss
from mixmask.masks import MaskGenerator
from mixmask.mixing import mix_batch

Encode = Callable[[Any, Tensor], Tensor]

_ATTRIBUTES = ("encoder_q", "encoder_k", "queue", "_dequeue_and_enqueue")
_NAME = "_mixmask"


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
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Let a MoCo builder take the mixed term of its own training steps (MixMask, eq. 4).

    The model stays what it is: the same object and class, the same `state_dict`, and the same
    `forward`, but for one more pass of the mixed queries through `encoder_q`. In eval mode and
    without gradients it does nothing. Take the term with `mixed_loss(model)`, once per step.

    The first step is checked: `encoder_q` must get the images that are mixed, and the keys must be
    of length one. Nothing is enqueued before that.

    Args:
        model: A builder with `encoder_q`, `encoder_k`, `queue (C, K)` and
            `_dequeue_and_enqueue(keys)`, which its `forward` calls with the batch's own keys
            (N, C), not yet gathered. The queries are its `forward`'s argument `im_q`, or else the
            first one; of a list, the first entry. A model in DistributedDataParallel is wrapped
            inside.
        masks: What `mix_batch` takes: a generator, or a bool tensor.
        switch: False keeps the term of λ alone (the paper's ablation).
        partner: See `mix_batch`.
        per_sample: Draw one mask per sample instead of one per batch.
        symmetric: The builder contrasts both views, and enqueues `cat([k_1, k_2])`, the keys of
            its first and second argument; both views are mixed then, for two more passes.
        temperature: τ; the default is the model's `T`, or its `head.temperature`, as it is in
            each step.
        encode: (model, images) -> (N, C) normalised queries. Default: `encoder_q`, then
            normalised.
        generator: A CPU generator for masks and partners. Default: torch's global one.

    Returns:
        The model that was passed.

    Raises:
        ValueError: If the model lacks an attribute, has no temperature, or is already wrapped.
        TypeError: If it is no module, or copies itself to several devices (`nn.DataParallel`).

    Source:
        He et al., "MoCo", algorithm 1; MixMask, eq. 4 and algorithm 1.

    Example:
        >>> import copy, mixmask
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
    builder = _unwrapped(model)
    if isinstance(builder, nn.DataParallel) or not isinstance(builder, nn.Module):
        raise TypeError(
            f"model must be a MoCo builder in one process per device, got "
            f"{type(builder).__name__}; use DistributedDataParallel, as the family does"
        )
    if _NAME in vars(builder):
        raise ValueError(
            f"model must not be wrapped yet, got a {type(builder).__name__} that is; call wrap once"
        )
    missing = [name for name in _ATTRIBUTES if not hasattr(builder, name)]
    if missing:
        raise ValueError(
            f"model must have {', '.join(_ATTRIBUTES)}, got a {type(builder).__name__} without "
            f"{', '.join(missing)}; name them so, or take mixmask.lambda_weighted_loss in the loop"
        )
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
    mixture = _Mixture(builder)
    mixture.masks, mixture.switch, mixture.partner = masks, switch, partner
    mixture.per_sample, mixture.symmetric = per_sample, symmetric
    mixture.temperature, mixture.encode, mixture.generator = temperature, encode, generator
    mixture.criterion()
    # Both live in the instance: its class, parameters and buffers are those of before.
    setattr(builder, _NAME, mixture)
    builder._dequeue_and_enqueue = mixture  # type: ignore[assignment]
    builder.register_forward_pre_hook(mixture.before, with_kwargs=True)
    builder.register_forward_hook(mixture.after, always_call=True)
    return model


def mixed_loss(model: nn.Module) -> Tensor:
    """Return the mixed term of the forward pass that has just run, to be added with weight one.

    Args:
        model: What `wrap` returned, or DistributedDataParallel or `torch.compile` around it.

    Returns:
        () scalar. It is handed out once, and nothing of the step is kept.

    Raises:
        ValueError: If the model is not wrapped, if no training step of it has run yet, or if the
            term was taken already.
    """
    builder = _unwrapped(model)
    mixture = vars(builder).get(_NAME)
    if mixture is None:
        raise ValueError(
            f"model must be wrapped, got a {type(builder).__name__} that is not; "
            "call model = wrap(model, masks) first"
        )
    return mixture.take()  # type: ignore[no-any-return]


class _Mixture:
    """What `wrap` adds to one model; it stands in place of `_dequeue_and_enqueue`."""

    masks: Any
    switch: bool
    partner: Partner
    per_sample: bool
    symmetric: bool
    temperature: float | None
    encode: Encode | None
    generator: torch.Generator | None

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.views: list[Tensor] = []
        self.term: Tensor | None = None
        self.probe: _Probe | None = None
        self.checked = self.spent = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of the model leave the step that is under way behind."""
        return {**vars(self), "views": [], "term": None, "probe": None}

    def before(self, model: nn.Module, args: Any, options: Any) -> None:
        """Find the images of a training step, before its `forward`."""
        if not (model.training and torch.is_grad_enabled()):
            return
        if self.term is not None:
            raise ValueError(
                "the mixed term of the last forward pass was not taken, so its loss lacked it; add "
                "mixed_loss(model) to each step's loss, take it also where a step is skipped, and "
                "call the model in eval mode or under torch.no_grad() where nothing is trained"
            )
        self.views = _views(model, args, options)
        if not self.checked:
            self.probe = _Probe(self.model.encoder_q)

    def after(self, *_: Any) -> None:
        """Let go of the images, also where `forward` failed."""
        self.views = []
        if self.probe is not None:
            self.probe.close()
            self.probe = None

    def __call__(self, keys: Tensor, *args: Any, **options: Any) -> Any:
        """Take the mixed term with the old queue, then enqueue."""
        if self.views:
            with torch.enable_grad():
                self._mix(keys)
        return type(self.model)._dequeue_and_enqueue(self.model, keys, *args, **options)

    def take(self) -> Tensor:
        term, self.term = self.term, None
        if term is None:
            raise ValueError(
                "there must be a training step whose mixed term was not taken yet, got "
                + ("one that was; take it once per forward pass" if self.spent else "none yet")
                + ", with the model in train mode, gradients enabled and keys enqueued inside "
                "forward"
            )
        self.spent = True
        return term

    def criterion(self) -> InfoNCE:
        temperature = self.temperature
        for owner, name in ((self.model, "T"), (getattr(self.model, "head", None), "temperature")):
            if temperature is None:
                temperature = getattr(owner, name, None)
        if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
            raise TypeError(
                "the temperature must be a number in model.T or model.head.temperature, got "
                f"{temperature!r}; pass wrap(model, masks, temperature=0.2)"
            )
        queue = self.model.queue
        if queue.ndim != 2:
            raise ValueError(
                f"queue must be (C, K), got {tuple(queue.shape)}; take "
                "mixmask.lambda_weighted_loss in the loop for other queues"
            )
        return InfoNCE(queue.T, float(temperature))

    def _mix(self, keys: Tensor) -> None:
        if self.term is not None:
            self.term = None
            raise ValueError(
                "keys must be enqueued once per forward pass, got a second call; a builder that "
                "enqueues per view is not supported: take mixmask.lambda_weighted_loss in the loop"
            )
        if self.symmetric and len(self.views) < 2:
            raise ValueError(
                "forward must take both views with symmetric=True, got one batch of images; leave "
                "it out for a builder with one query"
            )
        query, criterion = self.views[0], self.criterion()
        n = len(query)
        if keys.ndim != 2 or len(keys) != (2 * n if self.symmetric else n):
            raise ValueError(
                f"keys must be ({'2N' if self.symmetric else 'N'}, C) with N = {n} images, got "
                f"{tuple(keys.shape)}; pass symmetric=True for a builder that enqueues the keys of "
                "both its views, cat([k_1, k_2]), and gather keys inside _dequeue_and_enqueue"
            )
        if self.probe is not None:
            self._check(keys)
        term = self._direction(query, keys[-n:], criterion)
        if self.symmetric:
            term = term + self._direction(self.views[1], keys[:n], criterion)
        self.term = term

    def _direction(self, images: Tensor, keys: Tensor, criterion: InfoNCE) -> Tensor:
        masks = self.masks
        if self.per_sample:
            masks = masks(len(images), device=images.device, generator=self.generator)
        mixed = mix_batch(images, masks, partner=self.partner, generator=self.generator)
        encode = _encode if self.encode is None else self.encode
        q_mixed = encode(self.model, mixed.images)  # (N, C)
        return lambda_weighted_loss(criterion, q_mixed, keys, mixed, switch=self.switch)

    def _check(self, keys: Tensor) -> None:
        """Compare the first step with what is assumed of all."""
        assert self.probe is not None
        seen, self.probe = self.probe.close(), None
        if seen is not None:
            self._check_views(seen)
        if not torch.allclose(keys.float().norm(dim=1), keys.new_ones(()).float(), atol=0.02):
            raise ValueError(
                "keys must be of length one, as MoCo's are; normalise them in forward, or take "
                "mixmask.lambda_weighted_loss in the loop"
            )
        self.checked = True

    def _check_views(self, seen: Sequence[Tensor]) -> None:
        mixed = 2 if self.symmetric else 1
        if not all(_among(view, seen) for view in self.views[:mixed]):
            raise ValueError(
                "encoder_q must get the images that forward takes as im_q or first, got others, of "
                f"shapes {[tuple(got.shape) for got in seen]}; views that are made or reordered "
                "inside forward are not supported: take mixmask.lambda_weighted_loss there"
            )
        # Further images are the builder's own mixtures, as Un-Mix has them.
        if mixed == 1 and any(_among(view, seen) for view in self.views[1:2]):
            raise ValueError(
                "encoder_q must get the queries' view alone, got the keys' view as well: the "
                "builder is symmetric; enqueue the keys of both views, cat([k_1, k_2]), and pass "
                "symmetric=True"
            )


class _Probe:
    """Keeps what an encoder gets during one forward pass; nothing if it is compiled."""

    def __init__(self, encoder: nn.Module) -> None:
        self.seen: list[Tensor] = []
        # A hook would make a compiled encoder compile again.
        compiled = hasattr(encoder, "_orig_mod") or encoder._compiled_call_impl is not None
        self.handle = None if compiled else encoder.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen += [one.detach() for one in args[:1] if isinstance(one, Tensor)]

    def close(self) -> list[Tensor] | None:
        if self.handle is None:
            return None
        self.handle.remove()
        return self.seen


def _among(view: Tensor, seen: Sequence[Tensor]) -> bool:
    return any(view.shape == got.shape and torch.equal(view, got) for got in seen)


def _encode(model: Any, images: Tensor) -> Tensor:
    """Return normalised queries, (N, C)."""
    q = model.encoder_q(images)
    if isinstance(q, Sequence) and len(q) == 1:
        q = q[0]
    if not isinstance(q, Tensor):
        raise TypeError(
            f"encoder_q must return one tensor (N, C), got {type(q).__name__}; pass "
            "wrap(model, masks, encode=...), a function of the model and images"
        )
    return F.normalize(q, dim=1)


def _views(model: nn.Module, args: Any, options: Any) -> list[Tensor]:
    """Return the images among the arguments of `forward`, the queries first."""
    bound = inspect.signature(type(model).forward).bind(model, *args, **options).arguments
    named = dict(list(bound.items())[1:])
    ordered = [named.pop("im_q", None), *named.values()]
    flat = [
        one
        for value in ordered
        for one in (value if isinstance(value, list | tuple) else [value])
        if isinstance(one, Tensor) and one.ndim == 4
    ]
    if not flat:
        got = ", ".join(f"{name}: {type(value).__name__}" for name, value in named.items())
        raise ValueError(
            f"forward must take the queries (N, C, H, W) as im_q or first, got {got or 'nothing'}; "
            "take mixmask.lambda_weighted_loss in the loop for other arguments"
        )
    return flat


def _unwrapped(model: Any) -> Any:
    """Return the module inside DistributedDataParallel, `torch.compile` and their like."""
    while isinstance(model, nn.Module) and not isinstance(model, nn.DataParallel):
        # A compiled module has the attributes of the one inside.
        inner = model._modules.get("_orig_mod")
        if inner is None and not hasattr(model, _ATTRIBUTES[-1]):
            inner = model._modules.get("module")
        if inner is None:
            break
        model = inner
    return model
