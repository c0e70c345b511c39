"""lightly's criteria over lists of crops, wrapped, against eq. 4 written out."""

from __future__ import annotations

import pytest

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install '.[lightly]' for these tests"
)

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from lightly.loss import (
    DINOLoss,
    LeJEPALoss,
    SwaVLoss,
)
from lightly.loss.swav_loss import sinkhorn
from lightly_criteria import (
    FEW,
    ROWS,
    SHARED,
    C,
    K,
    N,
    are_same,
    assert_same_loss,
    call_copy,
    copy_buffers,
    draw_embeddings,
    draw_mixed,
)
from torch import Tensor

from mixmask import MixedBatch
from mixmask.integrations.lightly import (
    wrap,
)

# lightly's DCLWLoss copies a tensor with torch.tensor.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


# SwAV and DINO take lists of crops.

VIEWS: list[tuple[int | list[int], int]] = [(0, 1), (1, 1), (3, 1), ([0], 1), ([1, 0, 4], 3)]


def _crops(large: int, small: int, *, needs_grad: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    crops = [
        torch.randn(N, K, dtype=torch.float64, requires_grad=needs_grad)
        for _ in range(large + small)
    ]
    return crops[:large], crops[large:]


def _as_list(view: int | list[int]) -> list[int]:
    return [view] if isinstance(view, int) else view


def _mixed_views(count: int, *, per_sample: bool) -> tuple[list[Tensor], list[MixedBatch]]:
    scores = [torch.randn(N, K, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    return scores, [draw_mixed(per_sample=per_sample) for _ in range(count)]


def _eq_4(
    loss: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    targets: list[Tensor],
    mixed: MixedBatch,
    *,
    switch: bool,
) -> Tensor:
    """Eq. 4 image by image, then its mean over the targets of several crops."""
    total = torch.zeros((), dtype=z.dtype)
    for target in targets:
        for i in range(len(z)):
            share = (mixed.lam[i] if mixed.lam.ndim else mixed.lam).to(z.dtype)
            total = total + share * loss(z[i : i + 1], target[i : i + 1])
            if switch:
                j = int(mixed.partner[i])
                total = total + (1 - share) * loss(z[i : i + 1], target[j : j + 1])
    return total / len(z) / len(targets)


@pytest.mark.parametrize("queue", [0, 9])
@pytest.mark.parametrize("view, count", VIEWS)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("switch", [True, False])
def test_swav_is_that_of_equation_4(
    queue: int, view: int | list[int], count: int, per_sample: bool, switch: bool
) -> None:
    criterion = SwaVLoss(temperature=0.3, sinkhorn_iterations=4, sinkhorn_epsilon=0.2)
    large, small = _crops(2, 3)
    queued = [torch.randn(queue, K, dtype=torch.float64) for _ in large] if queue else None
    scores, mixed = _mixed_views(count, per_sample=per_sample)
    slow = criterion(large, small, queued)
    codes = [
        sinkhorn(
            torch.cat([crop.detach(), queued[index]]) if queued else crop.detach(),
            iterations=4,
            epsilon=0.2,
        )[:N]
        for index, crop in enumerate(large)
    ]
    for z, record, crop in zip(scores, mixed, _as_list(view), strict=True):
        targets = [code for index, code in enumerate(codes) if index != crop]
        slow = slow + _eq_4(criterion.subloss, z, targets, record, switch=switch)
    wrapped = wrap(criterion, switch=switch)
    given: dict[str, Any] = {"z_mixed": scores, "mixed": mixed}
    if isinstance(view, int):
        given = {"z_mixed": scores[0], "mixed": mixed[0]}
    ours = wrapped(large, small, queued, view=view, **given)
    assert ours.shape == slow.shape == (1,)
    assert_same_loss(ours, slow, [*large, *small, *scores])


def test_swav_without_a_mixed_view_is_lightlys() -> None:
    large, small = _crops(2, 2)
    wrapped = wrap(SwaVLoss())
    assert torch.equal(wrapped(large, small), SwaVLoss()(large, small))
    assert torch.equal(wrapped(large, []), SwaVLoss()(large, []))
    assert not wrapped.state_dict()


TEMPERATURES: dict[str, dict[str, Any]] = {
    "own": {},
    "given": {"teacher_temp": 0.11},
    "warming up": {"epoch": 2},
    "warm": {"epoch": 5},
    "long warm": {"epoch": 9},
    "given in an epoch": {"teacher_temp": 0.11, "epoch": 2},
}


def _dino() -> Any:
    criterion = DINOLoss(
        K,
        warmup_teacher_temp=0.2,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=5,
        student_temp=0.3,
        center_momentum=0.6,
    ).double()
    # Some steps in, so that the center is not zero.
    criterion([_crops(1, 0)[0][0].detach() + 1] * 2, _crops(2, 0)[0])
    assert float(criterion.center.abs().max()) > 0.1
    return criterion


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("view, count", VIEWS)
@pytest.mark.parametrize("per_sample, switch", [(True, True), (False, True), (True, False)])
def test_dino_is_that_of_equation_4(
    temperature: str, view: int | list[int], count: int, per_sample: bool, switch: bool
) -> None:
    criterion = _dino()
    untouched = copy.deepcopy(criterion)
    options = TEMPERATURES[temperature]
    teacher, _ = _crops(2, 0, needs_grad=False)
    student = list(itertools.chain(*_crops(2, 3)))
    scores, mixed = _mixed_views(count, per_sample=per_sample)

    def loss(z: Tensor, target: Tensor) -> Tensor:
        # lightly leaves out pairs of one index, so the mixed crop comes second.
        return call_copy(untouched, [target], [torch.zeros_like(z), z], **options)

    slow = call_copy(untouched, teacher, student, **options)
    for z, record, crop in zip(scores, mixed, _as_list(view), strict=True):
        targets = [logits for index, logits in enumerate(teacher) if index != crop]
        slow = slow + _eq_4(loss, z, targets, record, switch=switch)
    wrapped = wrap(criterion, switch=switch)
    given: dict[str, Any] = {"z_mixed": scores, "mixed": mixed}
    if isinstance(view, int):
        given = {"z_mixed": scores[0], "mixed": mixed[0]}
    ours = wrapped(teacher, student, view=view, **options, **given)
    assert_same_loss(ours, slow, [*student, *scores])
    untouched(teacher, student, **options)
    assert are_same(copy_buffers(criterion), copy_buffers(untouched))


def test_dinos_center_moves_once_a_step() -> None:
    criterion = DINOLoss(K)
    untouched = copy.deepcopy(criterion)
    naive = copy.deepcopy(criterion)
    wrapped = wrap(criterion)
    for step in range(4):
        teacher = [torch.randn(N, K) for _ in range(2)]
        student = [torch.randn(N, K, requires_grad=True) for _ in range(4)]
        z_mixed, mixed = torch.randn(N, K, requires_grad=True), draw_mixed()
        with torch.set_grad_enabled(step != 3):
            ours = wrapped(teacher, student, z_mixed=z_mixed, mixed=mixed)
            untouched(teacher, student)
        assert are_same(copy_buffers(criterion), copy_buffers(untouched))
        if step == 0:
            continue
        # As eq. 4 looks in code: by the second and third calls the center has moved.
        partners = [logits[mixed.partner] for logits in teacher]
        crops = [z_mixed, *student[1:]]
        wrong = naive(teacher, student)
        wrong = wrong + mixed.lam * naive(teacher, crops)
        wrong = wrong + (1 - mixed.lam) * naive(partners, crops)
        assert not are_same(copy_buffers(naive), copy_buffers(untouched))
        assert wrong.item() != pytest.approx(ours.item(), abs=1e-3)


def test_dino_without_a_mixed_view_is_lightlys() -> None:
    criterion = _dino()
    untouched = copy.deepcopy(criterion)
    teacher, student = _crops(2, 0, needs_grad=False)[0], _crops(4, 0)[0]
    ours, theirs = wrap(criterion)(teacher, student, 0.1), untouched(teacher, student, 0.1)
    assert torch.equal(ours, theirs)
    assert are_same(copy_buffers(criterion), copy_buffers(untouched))


@pytest.mark.parametrize("name", ["swav", "dino"])
@pytest.mark.parametrize(
    "large, given, text",
    [
        (2, {"view": 3}, r"view must name a crop from 0 to 2 for each of the 1 .* got 3; pass"),
        (2, {"view": -1}, r"view must name a crop from 0 to 2 .* got -1; pass for instance view=0"),
        (2, {"view": [0, 1]}, r"for each of the 1 mixed views, got \[0, 1\]; pass"),
        (1, {}, r"compared with the other large crops, got none; pass at least two"),
        (2, {"mixed": None}, r"z_mixed and mixed belong together, got only one"),
        (2, {"mixed": FEW}, r"must hold one row for each of the 3 mixed images, got \(4, 5\)"),
        (2, {"z_mixed": ROWS[:2]}, r"z_mixed must hold .* 4 mixed images, got \(2, 5\)"),
        (
            2,
            {"z_mixed": [ROWS] * 2, "mixed": [SHARED] * 2},
            r"for each of the 2 mixed views, got 0; pass .* view=\[0, 1\] for two",
        ),
        (
            2,
            {"z_mixed": [ROWS] * 2, "mixed": [SHARED] * 2, "view": [0, 7]},
            r"from 0 to 2 for each of the 2 mixed views, got \[0, 7\]",
        ),
    ],
)
def test_crops_that_do_not_fit_are_refused(
    name: str, large: int, given: dict[str, Any], text: str
) -> None:
    criterion = SwaVLoss() if name == "swav" else DINOLoss(C)
    before = copy_buffers(criterion)
    crops, small = [ROWS] * large, [ROWS] * (3 - large)
    lists = (crops, small) if name == "swav" else (crops, crops + small)
    with pytest.raises(ValueError, match=text):
        wrap(criterion)(*lists, **{"z_mixed": ROWS, "mixed": SHARED, **given})
    assert are_same(copy_buffers(criterion), before)


def test_a_small_crop_meets_a_single_large_one() -> None:
    assert wrap(SwaVLoss())([ROWS], [ROWS], z_mixed=ROWS, mixed=SHARED, view=1).shape == (1,)
    assert wrap(DINOLoss(C))([ROWS], [ROWS] * 2, z_mixed=ROWS, mixed=SHARED, view=1).shape == ()


def test_a_center_is_read_and_set() -> None:
    criterion = DINOLoss(K)
    wrapped: Any = wrap(criterion)
    assert wrapped.center is criterion.center
    wrapped.center = torch.ones(1, 1, K)
    assert float(criterion.center.sum()) == K
    assert "center" in dict(criterion.named_buffers())
    del wrapped.center
    assert not hasattr(criterion, "center")
    wrapped.eval()
    assert not criterion.training
    wrapped.note = 1
    assert not hasattr(criterion, "note")


@pytest.mark.parametrize("per_sample, switch", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("views", [1, 2])
def test_lejepa_is_that_of_equation_4(per_sample: bool, switch: bool, views: int) -> None:
    criterion = LeJEPALoss(0.2, sigreg_num_vectors=5).double()
    local = torch.randn(3, N, C, dtype=torch.float64, requires_grad=True)
    large = torch.randn(2, N, C, dtype=torch.float64, requires_grad=True)
    z_mixed = draw_embeddings(views)
    mixed = [draw_mixed(per_sample=per_sample) for _ in range(views)]
    torch.manual_seed(0)
    slow = criterion(local_proj=local, global_proj=large)
    centers = large.detach().mean(dim=0)

    def distance(z: Tensor, target: Tensor) -> Tensor:
        return (z - target).square().mean()

    for z, record in zip(z_mixed, mixed, strict=True):
        slow = slow + 0.8 * _eq_4(distance, z, [centers], record, switch=switch)
        slow = slow + 0.2 * criterion.sigreg(z)
    torch.manual_seed(0)
    given = (
        {"z_mixed": z_mixed, "mixed": mixed}
        if views > 1
        else {"z_mixed": z_mixed[0], "mixed": mixed[0]}
    )
    ours = wrap(criterion, switch=switch)(local_proj=local, global_proj=large, **given)
    assert_same_loss(ours, slow, [local, large, *z_mixed])
    torch.manual_seed(0)
    plain = wrap(criterion)(local_proj=local, global_proj=large)
    torch.manual_seed(0)
    assert torch.equal(plain, criterion(local_proj=local, global_proj=large))
