"""What is assumed of a MoCo builder, and how its first step is compared with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN_FORWARD = "take mixmask.lambda_weighted_loss inside forward, before the keys are enqueued"
# Cosines of the builder and of ours differ by rounding.
_TOLERANCE, _TOLERANCE_OF_HALF = 1e-3, 3e-2


class FirstStep:
    """Listens to `encoder_q` for one forward pass; a compiled one would compile again."""

    def __init__(self, builder: Any) -> None:
        encoder = builder.encoder_q
        self.builder = builder
        self.seen: list[tuple[Tensor, Any]] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.buffers = {
            name: (buffer, buffer.clone())
            for name, buffer in builder._buffers.items()
            if buffer is not None
        }
        compiled = hasattr(encoder, "_orig_mod") or encoder._compiled_call_impl is not None
        self.handle = None if compiled else encoder.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            self.seen.append((args[0].detach(), output))

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def check_keys(
        self, views: Sequence[Tensor], keys: Tensor, *, symmetric: bool, compare: bool
    ) -> None:
        """Compare what the encoder got, and what is about to be enqueued."""
        self.close()
        if self.handle is not None:
            _check_views(views, [images for images, _ in self.seen], symmetric=symmetric)
        if not torch.allclose(keys.float().norm(dim=1), keys.new_ones(()).float(), atol=0.02):
            raise ValueError(
                "keys must be of length one, as MoCo's are; normalise them in forward, or "
                + IN_FORWARD
            )
        n = len(views[0])
        for view, its_keys in zip(views[: 1 + symmetric], (keys[-n:], keys[:n]), strict=False):
            outputs = [output for images, output in self.seen if _among(view, [images])]
            for output in outputs[:1] if compare else ():
                q = normalise(output).detach()
                if q.shape != its_keys.shape:
                    raise ValueError(
                        f"encoder_q must return rows as long as the keys, got {tuple(q.shape)} and "
                        f"{tuple(its_keys.shape)}; where more follows it, pass encode=..., a "
                        "function of the model and images"
                    )
                self.pairs.append((q.float(), its_keys.float()))

    def check_output(self, output: Any, rows: Tensor | None, temperatures: Sequence[Any]) -> None:
        """Compare the logits, if there are any, with cosines; `rows` is the old queue, (K, C)."""
        rows = torch.empty(0) if rows is None else rows.float()
        shapes = [(len(q), 1 + len(rows)) for q, _ in self.pairs]
        logits = [one for one in _tensors(output) if one.shape in shapes]
        if not logits:
            self._check_weights()
            return
        # (N, 1 + K): the key first, as in MoCo's algorithm 1.
        expected = [
            torch.cat([(q * keys).sum(dim=1, keepdim=True), q @ rows.T], dim=1)
            for q, keys in self.pairs
        ]
        scales = *temperatures, 1.0
        if not any(_close(x * scale, y) for x in logits for y in expected for scale in scales):
            raise ValueError(
                "logits must be the cosines of encoder_q's output with the enqueued keys, then "
                "with the queue as it was before, over the temperature, got others: a predictor or "
                "another transform follows encoder_q, keys are enqueued in another order than the "
                "queries', the queue is filled first, or it is normalised when it is read; pass "
                f"encode=..., a function of the model and images, or {IN_FORWARD}"
            )

    def queue(self, name: str) -> Tensor | None:
        """Return the queue as it was, if it is a buffer."""
        return self.buffers[name][1] if name in self.buffers else None

    def _check_weights(self) -> None:
        encoders = [self.builder.encoder_q, self.builder.encoder_k]
        known = {id(weight) for encoder in encoders for weight in encoder.parameters()}
        other = [
            name
            for name, weight in self.builder.named_parameters()
            if weight.requires_grad and id(weight) not in known
        ]
        if other:
            raise ValueError(
                f"the model must train encoder_q alone, got {', '.join(other[:5])} as well, which "
                "may belong to the queries; pass encode=..., a function of the model and images"
            )

    def restore(self) -> None:
        """Undo what was enqueued."""
        with torch.no_grad():
            for name, (buffer, before) in self.buffers.items():
                buffer.copy_(before)
                self.builder._buffers[name] = buffer


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.detach()
    elif isinstance(output, (list, tuple, dict)):
        for one in output.values() if isinstance(output, dict) else output:
            yield from _tensors(one)


def _close(logits: Tensor, cosines: Tensor) -> bool:
    rough = torch.finfo(logits.dtype).bits < 32 or torch.is_autocast_enabled(logits.device.type)
    difference = (logits.float() - cosines).abs().max()
    return bool(difference < (_TOLERANCE_OF_HALF if rough else _TOLERANCE))


def _check_views(views: Sequence[Tensor], seen: Sequence[Tensor], *, symmetric: bool) -> None:
    if not all(_among(view, seen) for view in views[: 1 + symmetric]):
        raise ValueError(
            "encoder_q must get the images that forward takes as im_q or first, got others, of "
            f"shapes {[tuple(got.shape) for got in seen]}; where views are made or reordered "
            f"inside forward, {IN_FORWARD}"
        )
    # Further images are the builder's own mixtures, as Un-Mix has them.
    if not symmetric and any(_among(view, seen) for view in views[1:2]):
        raise ValueError(
            "encoder_q must get the queries' view alone, got the keys' view as well: the "
            "builder is symmetric; enqueue the keys of both views, cat([k_1, k_2]), and pass "
            "symmetric=True"
        )


def _among(view: Tensor, seen: Sequence[Tensor]) -> bool:
    return any(view.shape == got.shape and torch.equal(view, got) for got in seen)


def normalise(q: Any) -> Tensor:
    """Return normalised queries, (N, C), from an encoder's output."""
    if isinstance(q, Sequence) and len(q) == 1:
        q = q[0]
    if not isinstance(q, Tensor):
        raise TypeError(
            f"encoder_q must return one tensor (N, C), got {type(q).__name__}; pass "
            "wrap(model, masks, encode=...), a function of the model and images"
        )
    return F.normalize(q, dim=1)


def find_views(model: nn.Module, args: Any, options: Any) -> list[Tensor]:
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
            f"for other arguments, {IN_FORWARD}"
        )
    return flat


def find_builder(model: Any, mark: str) -> Any:
    """Return the module inside DistributedDataParallel, `torch.compile` and their like."""
    while isinstance(model, nn.Module) and not isinstance(model, nn.DataParallel):
        # A compiled module has the attributes of the one inside.
        inner = model._modules.get("_orig_mod")
        if inner is None and mark not in vars(model) and not hasattr(model, "encoder_q"):
            inner = model._modules.get("module")
        if inner is None:
            break
        model = inner
    if isinstance(model, nn.DataParallel) or not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a MoCo builder in one process per device, got {type(model).__name__}; "
            f"use DistributedDataParallel, as the family does; for nn.DataParallel, {IN_FORWARD}"
        )
    return model


def check_builder(model: Any, enqueue: str, queue: str, layout: str | None) -> None:
    """Require what `wrap` needs, by the names that it was given."""
    kind = type(model).__name__
    missing = [
        name for name in ("encoder_q", "encoder_k", queue, enqueue) if not hasattr(model, name)
    ]
    if missing:
        raise ValueError(
            f"model must have encoder_q, encoder_k, {queue}, {enqueue}, got a {kind} without "
            f"{', '.join(missing)}; name them, as in wrap(model, masks, enqueue='update_queue', "
            f"queue='memory'), or {IN_FORWARD}"
        )
    if enqueue in vars(model) or not callable(getattr(type(model), enqueue, None)):
        raise ValueError(
            f"enqueue must name a method of {kind} that its forward calls, got {enqueue!r}, which "
            "is an attribute of the model; pass the name that forward uses"
        )
    if layout not in (None, "CK", "KC"):
        raise ValueError(f"layout must be 'CK' or 'KC', got {layout!r}; leave it out for (C, K)")
    shape = tuple(getattr(model, queue).shape)
    if len(shape) != 2:
        raise ValueError(f"{queue} must be (C, K), got {shape}; for other queues, {IN_FORWARD}")
    if layout is None and shape[0] == shape[1]:
        raise ValueError(
            f"{queue} must tell its axes apart, got {shape}; pass layout='CK' if keys are its "
            "columns, as MoCo's are, or layout='KC' if they are its rows"
        )


def check_layout(queue: Tensor, keys: Tensor, layout: str) -> None:
    """Require keys as long as the queue's."""
    c = keys.shape[1]
    if queue.shape[layout.index("C")] == c:
        return
    fix = f"pass keys of the queue's own length, or {IN_FORWARD}"
    if queue.shape[layout.index("K")] == c:
        other = layout[::-1]
        stored = f"({other[0]}, {other[1]})"
        fix = f"the queue is stored as {stored}: pass wrap(model, masks, layout={other!r})"
    raise ValueError(
        f"the queue must be ({layout[0]}, {layout[1]}) with C = {c}, as the keys, got "
        f"{tuple(queue.shape)}; {fix}"
    )
