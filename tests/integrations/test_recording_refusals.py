"""What a recorded criterion cannot know is refused, and what it can is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_models import SIZE, C, Inline, N, build, draw, same, scaled, view_pairs
from torch import Tensor, nn

import mixmask
from mixmask import RecordingCriterion, losses
from mixmask.integrations.recording import RecordingView, record_embeddings


def test_embeddings_of_a_forgotten_step_are_refused() -> None:
    model = build(Inline)
    criterion = record_embeddings(model.projector, losses.VICReg())
    x_1, x_2 = view_pairs()[0]
    mixed = draw(0, x_1)
    model(x_1, x_2)
    model(x_2, x_1)
    with pytest.raises(ValueError, match="got 5 calls; take mixed_loss in every step"):
        criterion.mixed_loss(model.embed(mixed.images), mixed)
    with torch.no_grad():
        model(x_2, x_1)
    model(x_1, x_2)
    criterion.mixed_loss(model.embed(mixed.images), mixed)
    with pytest.raises(ValueError, match="got 1 calls"):
        criterion.mixed_loss(model.embed(mixed.images), mixed)
    copy.deepcopy(model)(x_1, x_2)


def test_arguments_that_have_no_name_are_refused() -> None:
    def loss(*rows: Tensor) -> Tensor:
        return scaled(rows[0], rows[1])

    z = torch.randn(3, N, C, requires_grad=True)
    with pytest.raises(TypeError, match="name those after the first two in forward"):
        RecordingCriterion(loss)(*z)
    with pytest.raises(TypeError, match="must take two tensors first"):
        RecordingCriterion(F.mse_loss)([z[0]], z[1])


class Distance(nn.CosineSimilarity):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return -super().forward(x1, x2)


class Classes(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input @ target.T, torch.arange(len(input)))


@pytest.mark.parametrize("criterion", [Distance(), Classes()], ids=["distance", "classes"])
def test_losses_made_of_others_are_accepted(criterion: Any) -> None:
    z, target = torch.randn(2, N, C)
    mixed, recording = draw(0, torch.randn(N, 3, SIZE, SIZE)), RecordingCriterion(criterion)
    recording(z.requires_grad_(), target)
    slow = mixmask.lambda_weighted_loss(criterion, 2 * z, target, mixed)
    same(recording.mixed_loss(2 * z, mixed), slow, 1e-6)


@pytest.mark.parametrize(
    "criterion",
    [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits],
    ids=["module", "function"],
)
def test_losses_of_probabilities_are_refused_with_embeddings(criterion: Any) -> None:
    z, target = torch.randn(2, N, C)
    recording = RecordingCriterion(criterion)
    recording(z.requires_grad_(), target)
    with pytest.raises(ValueError, match="look like embeddings"):
        recording.mixed_loss(z, draw(0, torch.randn(N, 3, SIZE, SIZE)))


@pytest.mark.parametrize("after", [lambda z: z, lambda z: F.normalize(z, dim=1), lambda z: z[:]])
@pytest.mark.parametrize("at", [0, 1])
def test_a_mixed_view_embedded_before_a_clean_one_is_refused(
    at: int, after: Callable[[Tensor], Tensor]
) -> None:
    model = build(Inline)
    criterion = record_embeddings(model.projector, losses.VICReg())
    x_1, x_2 = view_pairs()[0]
    mixed = draw(0, x_1)
    z = [model.embed(x) for x in [*(x_1, x_2)[:at], mixed.images, *(x_1, x_2)[at:]]]
    with pytest.raises(ValueError, match="call the model before the mixed images"):
        criterion.mixed_loss(after(z[at]), mixed)
    z = [model.embed(x) for x in (x_1, x_2, mixed.images)]
    assert criterion.mixed_loss(after(z[2]), mixed).isfinite()


def test_a_name_that_was_imported_elsewhere_and_replicas_are_named_where_nothing_came() -> None:
    criterion = RecordingCriterion(F.mse_loss, calls=2)
    z, mixed = torch.randn(N, C), draw(0, torch.randn(N, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match="replace the name in the module that calls it"):
        criterion.mixed_loss(z, mixed)
    for _ in range(2):
        criterion(z.requires_grad_(), z)
    with pytest.raises(ValueError, match=r"nn\.DataParallel, .* is not supported"):
        criterion(z, z)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a similarity": (
        lambda: RecordingCriterion(nn.CosineSimilarity()),
        TypeError,
        "NegativeCosine",
    ),
    "of logits": (lambda: RecordingCriterion(nn.CrossEntropyLoss()), TypeError, "takes logits"),
    "no criterion": (lambda: RecordingCriterion(0.1), TypeError, "got float"),  # type: ignore[arg-type]
    "no calls": (lambda: RecordingCriterion(F.mse_loss, calls=0), ValueError, "at least 1, got 0"),
    "half a call": (
        lambda: RecordingCriterion(F.mse_loss, calls=1.5),  # type: ignore[arg-type]
        TypeError,
        "must be an integer",
    ),
    "no module": (
        lambda: record_embeddings(partial(int), losses.VICReg()),  # type: ignore[arg-type]
        TypeError,
        r"pass model\.projector",
    ),
    "no augmentation": (lambda: RecordingView(None), TypeError, "got NoneType"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_labels_are_no_targets() -> None:
    criterion = RecordingCriterion(F.cross_entropy)
    with pytest.raises(TypeError, match="not the cross-entropy of its logits"):
        criterion(torch.randn(N, C, requires_grad=True), torch.zeros(N, dtype=torch.long))


MISFITS: dict[str, tuple[Any, Any, Any, str]] = {
    "one embedding for two": (torch.randn(N, C), [0, 0], None, "got 1, 2 and 2"),
    "a call that is not": (torch.randn(N, C), 0, 2, r"must name the calls 0 ... 1, got \[2\]"),
    "other sizes": (torch.randn(N + 1, C), 0, None, "one row for each of the 6 mixed images"),
}


@pytest.mark.parametrize(("z", "records", "call", "text"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_belong_together_is_refused(
    z: Tensor, records: Any, call: Any, text: str
) -> None:
    mixed = draw(0, torch.randn(N, 3, SIZE, SIZE))
    criterion = RecordingCriterion(losses.NegativeCosine(), calls=2)
    for _ in range(2):
        criterion(torch.randn(N, C, requires_grad=True), torch.randn(N, C))
    with pytest.raises(ValueError, match=text):
        criterion.mixed_loss(z, [mixed] * 2 if isinstance(records, list) else mixed, call=call)


def test_a_loss_of_four_embeddings_is_no_criterion() -> None:
    """Its first argument may be the detached one, and the trained ones come later."""

    def simsiam(z_1: Tensor, z_2: Tensor, p_1: Tensor, p_2: Tensor) -> Tensor:
        distance = losses.NegativeCosine()
        return (distance(p_1, z_2.detach()) + distance(p_2, z_1.detach())) / 2

    criterion: Any = RecordingCriterion(simsiam)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"two embeddings, got others as p_1, p_2; .* one pair"):
        criterion(*(torch.randn(N, C, requires_grad=True) for _ in range(4)))
    criterion = RecordingCriterion(lambda z, target: (z.detach() * target).sum())
    criterion(torch.randn(N, C, requires_grad=True), torch.randn(N, C))
    mixed = draw(0, torch.randn(N, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match="the mixed term has no gradient"):
        criterion.mixed_loss(torch.randn(N, C, requires_grad=True), mixed)
