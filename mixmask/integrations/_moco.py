"""What is assumed of a MoCo builder, and how its first step is compared with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask._checks import check_choice

MARK = "_mixmask"
IN_FORWARD = "take mixmask.lambda_weighted_loss inside forward, before the keys are enqueued"
# The builder's cosines and ours differ by rounding.
_TOLERANCE, _TOLERANCE_OF_HALF = 1e-3, 3e-2


class FirstStep:
    """Records `encoder_q` in one forward pass, and undoes the enqueueing if a check fails."""

    def __init__(self, builder: Any) -> None:
        encoder, self.builder = builder.encoder_q, builder
        self.seen: list[tuple[Tensor, object]] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        buffers = builder._buffers.items()
        self.buffers = {name: (one, one.clone()) for name, one in buffers if one is not None}
        # With a hook, a compiled encoder would be compiled again: its images go unchecked.
        compiled = hasattr(encoder, "_orig_mod") or encoder._compiled_call_impl is not None
        self.handle = None if compiled else encoder.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[object, ...], output: object) -> None:
        if args and isinstance(args[0], Tensor):
            self.seen.append((args[0].detach(), output))

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def check_keys(
        self, views: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], *, compare: bool
    ) -> None:
        """Compare what the encoder got, and the keys of each query view, (N, C)."""
        self.close()
        if self.handle is not None:
            _check_views(views, len(pairs), [images for images, _ in self.seen])
        for view, keys in pairs:
            lengths = keys.float().norm(dim=1)  # (N,)
            if not torch.allclose(lengths, torch.ones_like(lengths), atol=0.02):
                raise ValueError(
                    "keys must have unit length, as MoCo's do; normalise them in forward, or "
                    + IN_FORWARD
                )
            # By the images, for a builder may encode its own mixtures first.
            outputs = [output for images, output in self.seen if _among(view, [images])]
            for output in outputs[:1] if compare else ():
                q = normalise(output).detach()
                if q.shape != keys.shape:
                    raise ValueError(
                        f"encoder_q must return rows as long as the keys, got {tuple(q.shape)} and "
                        f"{tuple(keys.shape)}; where more follows it, pass encode=..., a function "
                        "of the model and images"
                    )
                self.pairs.append((q.float(), keys.float()))

    def check_output(
        self, output: object, queue: str, layout: str, temperatures: Sequence[Any]
    ) -> None:
        """Compare the logits, if there are any, with cosines of the keys and the old queue."""
        # From before the step: by now the builder has enqueued.
        old = self.buffers[queue][1].float() if queue in self.buffers else torch.empty(0)
        rows = old.T if layout == "CK" else old  # (K, C)
        shapes = [(len(q), 1 + len(rows)) for q, _ in self.pairs]
        logits = [one for one in _list_tensors(output) if one.shape in shapes]
        if not logits:
            self._check_weights()
            return
        # (N, 1 + K): the key first, as in MoCo's algorithm 1.
        expected = [
            torch.cat([(q * keys).sum(dim=1, keepdim=True), q @ rows.T], dim=1)
            for q, keys in self.pairs
        ]
        # Over τ, or not yet, where the loss divides by it.
        scales = *temperatures, 1.0
        if not any(_is_close(x * scale, y) for x in logits for y in expected for scale in scales):
            raise ValueError(
                "logits must be the cosines of encoder_q's output with the enqueued keys, then "
                "with the queue as it was before, over the temperature, got others: a predictor or "
                "another transform follows encoder_q, keys are enqueued in another order than the "
                "queries', the queue is filled first, or it is normalised when it is read; pass "
                f"encode=..., a function of the model and images, or {IN_FORWARD}"
            )

    def _check_weights(self) -> None:
        encoders = self.builder.encoder_q, self.builder.encoder_k
        known = {id(weight) for encoder in encoders for weight in encoder.parameters()}
        trained = [(n, p) for n, p in self.builder.named_parameters() if p.requires_grad]
        if other := [name for name, weight in trained if id(weight) not in known]:
            raise ValueError(
                f"the model must train encoder_q alone, got {', '.join(other[:5])} as well, which "
                "may belong to the queries; pass encode=..., a function of the model and images"
            )

    def restore(self) -> None:
        """Undo what was enqueued."""
        with torch.no_grad():
            for name, (buffer, before) in self.buffers.items():
                self.builder._buffers[name] = buffer.copy_(before)


def _list_tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.detach()
    elif isinstance(output, (list, tuple, dict)):
        for one in output.values() if isinstance(output, dict) else output:
            yield from _list_tensors(one)


def _is_close(logits: Tensor, cosines: Tensor) -> bool:
    rough = torch.finfo(logits.dtype).bits < 32 or torch.is_autocast_enabled(logits.device.type)
    difference = (logits.float() - cosines).abs().max()
    return bool(difference < (_TOLERANCE_OF_HALF if rough else _TOLERANCE))


def _check_views(views: Sequence[Tensor], directions: int, seen: Sequence[Tensor]) -> None:
    if not all(_among(view, seen) for view in views[:directions]):
        raise ValueError(
            "encoder_q must get the images that forward takes as im_q or first, got others, of "
            f"shapes {[tuple(got.shape) for got in seen]}; where views are made, split or "
            f"reordered inside forward, {IN_FORWARD}"
        )
    # Further images are the builder's own mixtures, as Un-Mix has them.
    if directions == 1 and any(_among(view, seen) for view in views[1:2]):
        raise ValueError(
            "encoder_q must get the queries' view alone, got the keys' view as well: the builder "
            "is symmetric; enqueue the keys of both views, cat([k_1, k_2]), and pass symmetric=True"
        )


def _among(view: Tensor, seen: Sequence[Tensor]) -> bool:
    return any(view.shape == got.shape and torch.equal(view, got) for got in seen)


def normalise(q: object) -> Tensor:
    """Return normalised queries, (N, C), from an encoder's output."""
    if isinstance(q, Sequence) and len(q) == 1:
        q = q[0]
    if not isinstance(q, Tensor):
        raise TypeError(
            f"encoder_q must return one tensor (N, C), got {type(q).__name__}; pass "
            "wrap(model, masks, encode=...), a function of the model and images"
        )
    return F.normalize(q, dim=1)


def find_views(model: nn.Module, args: Any, options: Any, directions: int) -> list[Tensor]:
    """Return the images among the arguments of `forward`, the queries first."""
    bound = inspect.signature(type(model).forward).bind(model, *args, **options).arguments
    named = dict(list(bound.items())[1:])  # Without self.
    ordered = sorted(named, key=lambda name: name != "im_q")
    listed = [
        named[name] if isinstance(named[name], list | tuple) else [named[name]] for name in ordered
    ]
    images = [one for views in listed for one in views if isinstance(one, Tensor) and one.ndim == 4]
    if len(images) < directions:
        got = ", ".join(f"{name}: {type(value).__name__}" for name, value in named.items())
        raise ValueError(
            "forward must take the queries (N, C, H, W) as im_q or first, and both views with "
            f"symmetric=True, got {got or 'nothing'}; for other arguments, {IN_FORWARD}"
        )
    return images


def find_builder(model: object) -> Any:
    """Return the module inside DistributedDataParallel, `torch.compile` and similar wrappers."""
    while isinstance(model, nn.Module) and not isinstance(model, nn.DataParallel):
        # A compiled module has the attributes of the one inside.
        inner = model._modules.get("_orig_mod")
        if inner is None and MARK not in vars(model) and not hasattr(model, "encoder_q"):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner
    raise TypeError(
        f"model must be a MoCo builder in one process per device, got {type(model).__name__}; "
        f"use DistributedDataParallel, as the family does; for nn.DataParallel, {IN_FORWARD}"
    )


def check_builder(model: object, enqueue: str, queue: str, layout: str | None) -> None:
    """Require the attributes that `wrap` needs, under the given names."""
    kind = type(model).__name__
    if MARK in vars(model):
        raise ValueError(f"model must not be wrapped yet, got a {kind} that is; call wrap once")
    needed = "encoder_q", "encoder_k", queue, enqueue
    if missing := [name for name in needed if not hasattr(model, name)]:
        raise ValueError(
            f"model must have {', '.join(needed)}, got a {kind} without {', '.join(missing)}; name "
            "them, as in wrap(model, masks, enqueue='update_queue', queue='memory'), or "
            + IN_FORWARD
        )
    if enqueue in vars(model) or not callable(getattr(type(model), enqueue, None)):
        raise ValueError(
            f"enqueue must name a method of {kind} that its forward calls, got {enqueue!r}, which "
            "is an attribute of the model; pass the name that forward uses"
        )
    if layout is not None:
        check_choice("layout", layout, ("CK", "KC"))
    shape = tuple(getattr(model, queue).shape)
    if len(shape) != 2 or (layout is None and shape[0] == shape[1]):
        raise ValueError(
            f"{queue} must be (C, K), got {shape}; for a square one, pass layout='CK' if keys are "
            "its columns, as MoCo's are, or layout='KC' if they are its rows; for other axes, "
            + IN_FORWARD
        )


def check_keys(keys: Tensor, n: int, directions: int, queue: Tensor, layout: str) -> None:
    """Require keys (N, C), or (2N, C) in two directions, as long as the queue's."""
    if keys.ndim != 2 or len(keys) != directions * n:
        fix = (
            "pass symmetric=True for a builder that enqueues the keys of both its views, "
            "cat([k_1, k_2]), and gather keys inside _dequeue_and_enqueue"
        )
        if keys.ndim == 2 and 2 * len(keys) == n:
            fix = f"for both views in one tensor, as images.chunk(2), {IN_FORWARD}"
        raise ValueError(
            f"keys must be ({'2N' if directions == 2 else 'N'}, C) with N = {n} images, got "
            f"{tuple(keys.shape)}; {fix}"
        )
    c = keys.shape[1]
    if queue.shape[layout.index("C")] != c:
        fix = f"pass keys of the queue's own length, or {IN_FORWARD}"
        if queue.shape[layout.index("K")] == c:
            other = layout[::-1]
            stored = f"({other[0]}, {other[1]})"
            fix = f"the queue is stored as {stored}: pass wrap(model, masks, layout={other!r})"
        raise ValueError(
            f"the queue must be ({layout[0]}, {layout[1]}) with C = {c}, as the keys, got "
            f"{tuple(queue.shape)}; {fix}"
        )
