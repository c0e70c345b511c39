"""MixMask in lightly-train's pretraining: one call before theirs.

    import lightly_train, mixmask
    from mixmask.integrations.lightly_train import patch

    patch(mixmask.MixMask(grid_size=4))
    lightly_train.pretrain(out="out", data="images", model="torchvision/resnet18", method="simclr")

works for the methods `simclr` and `dino`; the others are refused with the reason, before training
starts. With several devices, their processes run the same script and so the same call.

lightly-train has no public interface for this. Private are: the look-up of methods by name
(`_methods.method_helpers.get_method_cls`), which is replaced, and of the methods themselves
`training_step_impl`, `TrainingStepResult`, `criterion`, `embedding_model`, `flatten`,
`projection_head` and `_forward_student`. So versions that were not tested are refused. Their
classes stay as they are: a run gets classes derived from them.

Their pretraining evaluates nothing online; the embeddings and the exported model are those of the
network, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from mixmask import losses
from mixmask.mixing import MixedBatch

TESTED = ("0.18.0",)
Mixing = Callable[[Tensor], MixedBatch]
_LEFT_OUT = {
    "densecl": "half of its loss matches places, and a mixture has places of two images",
    "dinov2": "it masks patches itself, and its patch and KoLeo losses have no weighted form",
    "dinov31": "it masks patches itself, and its patch and KoLeo losses have no weighted form",
    "distillation": "its targets are a teacher's features of the very image, already mixed",
    "distillationv1": "it mixes its images itself",
    "distillationv2": "it mixes its images itself",
    "distillationv3": "its targets are a teacher's features of the very image",
}


def patch(mixing: Mixing, *, switch: bool = True, symmetric: bool = False) -> Callable[[], None]:
    r"""Let `lightly_train.pretrain` train with the mixed term; a second call replaces the first.

    $L = L_\mathrm{theirs} + \frac{1}{N} \sum_i \lambda_i \ell(z^m_i, t_i) + (1 - \lambda_i)
    \ell(z^m_i, t_{\pi(i)})$: the first view is mixed, and t are the projections (SimCLR) or the
    teacher's distributions (DINO, with the center of before the step) of the other global view.

    Args:
        mixing: From images (N, C, H, W) to their mix, for instance `MixMask(grid_size=4)`.
        switch: False keeps the term of λ alone (the paper's ablation).
        symmetric: Mix the second view as well; the term is the mean of both.

    Returns:
        A function that takes the patch back.

    Raises:
        ImportError: If lightly-train cannot be imported or its version was not tested.
        TypeError: If `mixing` cannot be called.

    Source:
        MixMask, eq. 1-4.
    """
    if not callable(mixing):
        raise TypeError(
            f"mixing must be callable with images, got {type(mixing).__name__}; pass for "
            "instance mixmask.MixMask(grid_size=4)"
        )
    helpers = _helpers()
    original = getattr(helpers.get_method_cls, "original", helpers.get_method_cls)
    options = {"mixing": staticmethod(mixing), "switch": switch, "symmetric": symmetric}

    def get_method_cls(method: Any) -> type:
        theirs: type = original(method)
        if issubclass(theirs, _Mixed):
            return theirs
        name = method if isinstance(method, str) else theirs.__name__.lower()
        if name not in _MIXED:
            reason = _LEFT_OUT.get(name, "it was not tested")
            raise ValueError(
                f"mixmask does not support the method {name!r}: {reason}; use one of "
                f"{', '.join(_MIXED)}, or leave the call of mixmask's patch out"
            )
        more = {**options, "__module__": theirs.__module__}
        return type(theirs.__name__, (_MIXED[name], theirs), more)

    get_method_cls.original = original  # type: ignore[attr-defined]
    helpers.get_method_cls = get_method_cls

    def undo() -> None:
        helpers.get_method_cls = original

    return undo


def _helpers() -> Any:
    """Return the module of theirs that is patched, if its version is known."""
    try:
        installed = version("lightly-train")
        from lightly_train._methods import method_helpers
    except (ImportError, PackageNotFoundError) as error:
        raise ImportError(
            "mixmask.integrations.lightly_train needs lightly-train, which could not be imported "
            f"({error}); run pip install 'lightly-train=={TESTED[-1]}'"
        ) from error
    if installed not in TESTED:
        raise ImportError(
            "mixmask.integrations.lightly_train uses private parts of lightly-train, so it needs a "
            f"version that was tested, {', '.join(TESTED)}, got {installed}; run pip install "
            f"'lightly-train=={TESTED[-1]}'"
        )
    return method_helpers


class _Mixed:
    """A method of theirs with the mixed term; goes before it in the order of classes."""

    # The options of `patch`.
    mixing: Mixing
    switch: bool
    symmetric: bool
    # Provided by their class.
    criterion: Any

    def training_step_impl(self, batch: Any, batch_idx: int) -> Any:
        """Return their loss plus the mixed term."""
        with self._recorded() as calls:
            result = super().training_step_impl(batch, batch_idx)  # type: ignore[misc]
        (call,) = calls
        terms, shares = [], []
        for view in range(1 + self.symmetric):
            mixed = self.mixing(batch["views"][view])
            criterion, target = self._towards(call, view)
            z = self._embed(mixed.images)
            terms.append(
                losses.lambda_weighted_loss(criterion, z, target, mixed, switch=self.switch)
            )
            shares.append(mixed.lam.mean())
        term = torch.stack(terms).mean()
        logged = {"mixmask/loss": term.detach(), "mixmask/lambda": torch.stack(shares).mean()}
        return type(result)(result.loss + term, {**(result.log_dict or {}), **logged})

    @contextmanager
    def _recorded(self) -> Iterator[list[dict[str, Any]]]:
        """Note what their step passes to the criterion."""
        calls: list[dict[str, Any]] = []

        def note(criterion: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls.append({"arguments": arguments, **options, **self._state(criterion)})

        handle = self.criterion.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def _state(self, criterion: Any) -> dict[str, Any]:
        """Return what the criterion is about to change."""
        del criterion
        return {}

    def _towards(self, call: dict[str, Any], view: int) -> tuple[losses.Criterion, Tensor]:
        """Return the criterion, and the target of one view."""
        raise NotImplementedError

    def _embed(self, images: Tensor) -> Tensor:
        """Return what the online branch gives to the criterion."""
        raise NotImplementedError


class _SimCLR(_Mixed):
    embedding_model: Any
    flatten: Any
    projection_head: Any

    def _towards(self, call: dict[str, Any], view: int) -> tuple[losses.Criterion, Tensor]:
        gather: bool = self.criterion.gather_distributed
        criterion = losses.NTXent(self.criterion.temperature, gather_distributed=gather)
        return criterion, call["arguments"][1 - view]

    def _embed(self, images: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.flatten(self.embedding_model(images)))
        return z


class _DINO(_Mixed):
    _forward_student: Callable[[Tensor], Tensor]

    def _state(self, criterion: Any) -> dict[str, Any]:
        return {"center": criterion.center.flatten().clone()}

    def _towards(self, call: dict[str, Any], view: int) -> tuple[losses.Criterion, Tensor]:
        student, teacher = self.criterion.student_temp, float(call["teacher_temp"])
        return losses.DINO(call["center"], student, teacher), call["teacher_out"][1 - view]

    def _embed(self, images: Tensor) -> Tensor:
        return self._forward_student(images)


_MIXED: dict[str, type[_Mixed]] = {"dino": _DINO, "simclr": _SimCLR}
