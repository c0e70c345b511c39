"""lightly's criteria of two views, wrapped, against eq. 4 written out."""

from __future__ import annotations

import pytest

pytest.importorskip(
    "lightly", reason="lightly is not installed; pip install '.[lightly]' for these tests"
)

import copy
import inspect
import pickle
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightly import loss as theirs
from lightly.loss import (
    KoLeoLoss,
    MMCRLoss,
    MSNLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    PatchKernelAlignmentLoss,
)
from lightly_criteria import (
    BY_SAMPLE,
    CRITERIA,
    EACH,
    EVERY,
    FEW,
    ROWS,
    SHARED,
    C,
    N,
    are_same,
    assert_same_loss,
    build_tico,
    call_copy,
    copy_buffers,
    draw_embeddings,
    draw_mixed,
    mixed_term,
)
from torch import Tensor, nn

from mixmask import LambdaWeightedLoss
from mixmask.integrations.lightly import (
    WrappedCriterion,
    WrappedDINO,
    WrappedLeJEPA,
    WrappedNTXent,
    WrappedSwaV,
    wrap,
)

# lightly's DCLWLoss copies a tensor with torch.tensor.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


every = pytest.mark.parametrize("name", CRITERIA)


@pytest.mark.parametrize(
    "name, expected",
    [
        *(("ntxent", WrappedNTXent), ("bank", WrappedNTXent), ("renamed", WrappedNTXent)),
        *(("swav", WrappedSwaV), ("dino", WrappedDINO), ("lejepa", WrappedLeJEPA)),
        *((name, WrappedCriterion) for name in ("own forward", "cosine", "vicreg", "mmcr")),
    ],
)
def test_each_criterion_finds_its_wrapper(name: str, expected: type) -> None:
    assert type(wrap(EVERY[name]())) is expected


@pytest.mark.parametrize(
    "name, per_sample", [(name, each) for name in CRITERIA for each in (False, name in BY_SAMPLE)]
)
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("views", [1, 3])
def test_the_loss_is_that_of_equation_4(
    name: str, per_sample: bool, switch: bool, views: int
) -> None:
    criterion = CRITERIA[name]().double()
    z, target, *z_mixed = draw_embeddings(2 + views)
    mixed = [draw_mixed(per_sample=per_sample) for _ in range(views)]
    slow = call_copy(criterion, z, target)
    for one, record in zip(z_mixed, mixed, strict=True):
        slow = slow + mixed_term(criterion, one, target, record, switch=switch)
    wrapped = wrap(criterion, switch=switch)
    if views == 1:
        ours = wrapped(z, target, z_mixed[0], mixed[0])
    else:
        ours = wrapped(z, target, z_mixed, mixed)
    assert_same_loss(ours, slow, [z, target, *z_mixed])


@every
@pytest.mark.parametrize("switch", [True, False])
def test_mixed_terms_alone_leave_the_state_alone(name: str, switch: bool) -> None:
    criterion = CRITERIA[name]().double()
    before = copy_buffers(criterion)
    target, *z_mixed = draw_embeddings(3)
    mixed = [draw_mixed(), draw_mixed()]
    wrapped: Any = wrap(criterion, switch=switch)
    ours = wrapped.mixed_loss(z_mixed, target, mixed)
    slow = sum(
        mixed_term(criterion, one, target, record, switch=switch)
        for one, record in zip(z_mixed, mixed, strict=True)
    )
    assert isinstance(slow, Tensor)
    assert are_same(copy_buffers(criterion), before)
    assert_same_loss(ours, slow, [target, *z_mixed])


@every
def test_without_a_mixed_view_it_is_the_criterion(name: str) -> None:
    criterion = CRITERIA[name]().double()
    untouched = copy.deepcopy(criterion)
    z, target = draw_embeddings(2)
    assert_same_loss(wrap(criterion)(z, target), untouched(z, target), [z, target])
    assert are_same(copy_buffers(criterion), copy_buffers(untouched))


@pytest.mark.parametrize("name", ["ntxent", "bank", "cosine", "barlow", "dcl"])
@pytest.mark.parametrize("switch", [True, False])
def test_the_generic_wrapper_does_the_same(name: str, switch: bool) -> None:
    criterion = CRITERIA[name]().double()
    generic = LambdaWeightedLoss(copy.deepcopy(criterion), switch=switch)
    wrapped = wrap(criterion, switch=switch)
    for _ in range(4):
        z, target, *z_mixed = draw_embeddings(4)
        mixed = [draw_mixed(), draw_mixed()]
        ours, theirs = (loss(z, target, z_mixed, mixed) for loss in (wrapped, generic))
        assert_same_loss(ours, theirs, [z, target, *z_mixed])
        assert are_same(copy_buffers(wrapped), copy_buffers(generic))


def test_a_cosine_along_another_axis_is_of_every_row() -> None:
    criterion = NegativeCosineSimilarity(dim=-1, eps=1e-3)
    z, target, z_mixed = (torch.randn(N, 3, C, dtype=torch.float64) for _ in range(3))
    z_mixed.requires_grad_()
    mixed = draw_mixed(per_sample=True)
    slow = criterion(z, target) + mixed_term(criterion, z_mixed, target, mixed)
    assert_same_loss(wrap(criterion)(z, target, z_mixed, mixed), slow, [z_mixed])


@every
def test_copies_go_on_alike(name: str) -> None:
    wrapped: Any = wrap(CRITERIA[name](), switch=False)
    step = (*draw_embeddings(3, dtype=torch.float32), draw_mixed())
    wrapped(*step)
    twins = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
    expected = wrapped(*step)
    for twin in twins:
        assert torch.equal(twin(*step), expected)
        assert are_same(copy_buffers(twin), copy_buffers(wrapped))
        assert twin.state_dict().keys() == wrapped.state_dict().keys()


@pytest.mark.parametrize("name", ["bank", "ntxent", "own forward", "cosine", "vicreg"])
@pytest.mark.parametrize(
    "arguments, text",
    [
        ((ROWS, ROWS[:3], ROWS, SHARED), r"target must hold one row .* 4 .* got \(3, 5\); pass"),
        ((ROWS, ROWS, ROWS[:3], SHARED), r"z_mixed must hold one row .* 4 .* got \(3, 5\); pass"),
        ((ROWS, ROWS, ROWS, FEW), r"must hold one row for each of the 3 mixed .* got \(4, 5\)"),
        ((ROWS, ROWS, ROWS[:3], FEW), r"must hold one row for each of the 3 .* got \(4, 5\)"),
        ((ROWS, ROWS, ROWS), r"z_mixed and mixed belong together, got only one"),
        ((ROWS, ROWS, None, SHARED), r"z_mixed and mixed belong together, got only one"),
        ((ROWS, ROWS, [ROWS], [SHARED, SHARED]), r"must have the same length, .* got 1 and 2;"),
        ((ROWS, ROWS, [ROWS, ROWS[:2]], [SHARED] * 2), r"z_mixed must hold .* got \(2, 5\)"),
        ((ROWS, ROWS, [], []), r"must have the same length, at least one, got 0 and 0"),
    ],
)
def test_nothing_is_enqueued_when_an_argument_is_refused(
    name: str, arguments: tuple[Any, ...], text: str
) -> None:
    criterion = CRITERIA[name]()
    before = copy_buffers(criterion)
    z, *rest = arguments
    with pytest.raises(ValueError, match=text):
        wrap(criterion)(z.clone().requires_grad_(), *rest)
    assert are_same(copy_buffers(criterion), before)


@pytest.mark.parametrize("name", ["barlow", "dcl", "dclw", "own forward"])
def test_one_share_a_sample_needs_a_loss_of_a_sample(name: str) -> None:
    criterion = CRITERIA[name]()
    before = copy_buffers(criterion)
    with pytest.raises(ValueError, match=r"one λ per sample needs .* \(N,\), got a scalar; .*mask"):
        wrap(criterion)(ROWS.clone().requires_grad_(), ROWS, ROWS, EACH)
    assert are_same(copy_buffers(criterion), before)


@pytest.mark.parametrize("bad", [F.mse_loss, None, NTXentLoss])
def test_only_modules_are_wrapped(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"criterion must be one of lightly's modules, got \w+; pa"):
        wrap(bad)


@pytest.mark.parametrize("name", EVERY)
def test_attributes_and_class_are_those_of_the_criterion(name: str) -> None:
    criterion = EVERY[name]()
    wrapped: Any = wrap(criterion)
    assert isinstance(wrapped, type(criterion))
    assert isinstance(wrapped, nn.Module)
    assert type(wrapped).__name__ in repr(wrapped)
    plain = vars(nn.Module())
    for key, value in vars(criterion).items():
        if key not in plain:
            assert getattr(wrapped, key) is value
            setattr(wrapped, key, 3.5)
            assert vars(criterion)[key] == getattr(wrapped, key) == 3.5
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wrapped.nothing_of_the_kind


@pytest.mark.parametrize("name", EVERY)
def test_wrapped_criteria_are_copied_whole(name: str) -> None:
    wrapped: Any = wrap(EVERY[name](), switch=False)
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert type(twin) is type(wrapped)
        assert twin.switch is False
        assert twin.criterion is not wrapped.criterion
        assert isinstance(twin, type(wrapped.criterion))


def test_what_the_criterion_takes_passes_through() -> None:
    wrapped: Any = wrap(NTXentLoss(-1.0))
    z, target = draw_embeddings(2)
    assert torch.equal(wrapped(out0=z, out1=target), NTXentLoss(-1.0)(z, target))
    assert torch.equal(wrapped(z, out1=target), NTXentLoss(-1.0)(z, target))
    koleo: Any = wrap(KoLeoLoss())
    assert torch.equal(koleo(z), KoLeoLoss()(z))


def test_ticos_covariance_moves_once_and_only_if_it_may() -> None:
    criterion = build_tico()
    untouched = copy.deepcopy(criterion)
    wrapped: Any = wrap(criterion)
    for update in (True, False, True):
        z, target, *z_mixed = draw_embeddings(4)
        mixed = [draw_mixed(), draw_mixed()]
        slow = sum(
            mixed_term(untouched, *pair) for pair in zip(z_mixed, [target] * 2, mixed, strict=True)
        )
        slow = slow + untouched(z, target, update_covariance_matrix=update)
        by_name = {"z_mixed": z_mixed, "mixed": mixed}
        ours = wrapped(z, target, update_covariance_matrix=update, **by_name)
        assert_same_loss(ours, slow, [z, target, *z_mixed])
        assert torch.equal(criterion.C, untouched.C)
    ours = wrapped(z, z_b=target, update_covariance_matrix=False)
    assert torch.equal(ours, untouched(z, target, False))
    # With or without the rest of its own arguments, ours come last.
    assert torch.isfinite(wrapped(z, target, z_mixed, mixed))
    last = wrapped(z, target, False, z_mixed, mixed)
    assert torch.equal(last, wrapped(z, target, False, **by_name))


def test_mmcr_is_that_of_equation_4() -> None:
    criterion = MMCRLoss(0.3)
    z, target, z_mixed = (
        torch.randn(N, 2, C, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    mixed = draw_mixed()
    slow = criterion(z, target) + mixed_term(criterion, z_mixed, target, mixed)
    assert_same_loss(wrap(criterion)(z, target, z_mixed, mixed), slow, [z, target, z_mixed])


@pytest.mark.parametrize(
    "criterion, arguments, text",
    [
        (
            PatchKernelAlignmentLoss(),
            (ROWS, ROWS),
            "not supported for PatchKernelAlignmentLoss: it",
        ),
        (MSNLoss(), (ROWS, ROWS, ROWS), r"mixed views are not supported for MSNLoss: its anchors"),
        (KoLeoLoss(), (ROWS,), r"need a criterion called with \(z, target\), got KoLeoLoss"),
        (NTXentLoss(), (ROWS,), r"got NTXentLoss called with \(out0\); call it without z_mixed"),
    ],
)
def test_mixed_views_are_refused_where_eq_4_has_no_meaning(
    criterion: Any, arguments: tuple[Tensor, ...], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        wrap(criterion)(*arguments, z_mixed=ROWS, mixed=SHARED)


# These take lists of crops, or several views of an image along an axis of their own.
OF_CROPS = {"DINOLoss", "LeJEPALoss", "MMCRLoss", "SwaVLoss"}
# These need arguments, warn, or, in lightly 1.5, refuse new versions of torch.
NOT_BUILT = {"PMSNCustomLoss", "SymNegCosineSimilarityLoss", "WMSELoss", "Whitening2d"}
OF_PAIRS = {
    "BarlowTwinsLoss", "DCLLoss", "DCLWLoss", "DirectCLRLoss", "MACLLoss", "NTXentLoss",
    "NegativeCosineSimilarity", "TiCoLoss", "VICRegLoss",
}  # fmt: skip
NAMES = [
    name
    for name, kind in vars(theirs).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module)
    if name not in OF_CROPS | NOT_BUILT
]


@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_of_lightly_takes_mixed_views_or_says_why_not(name: str) -> None:
    criterion = getattr(theirs, name)()
    options = inspect.signature(criterion.forward).parameters
    arguments = {key: ROWS for key, option in options.items() if option.default is option.empty}
    reason = r"^mixed views (are not supported for|need a criterion) "
    refused = pytest.raises(TypeError, match=reason)
    with nullcontext() if name in OF_PAIRS else refused:
        assert wrap(criterion)(**arguments, z_mixed=ROWS, mixed=SHARED).shape == ()


@pytest.mark.parametrize("name", ["ntxent", "bank", "cosine", "vicreg"])
def test_it_compiles(name: str) -> None:
    wrapped = wrap(CRITERIA[name]())
    z, target, z_mixed = torch.randn(3, N, C)
    mixed = draw_mixed()
    compiled = torch.compile(copy.deepcopy(wrapped), backend="eager")
    torch.testing.assert_close(
        compiled(z, target, z_mixed, mixed), wrapped(z, target, z_mixed, mixed)
    )


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_lightly_the_extra_is_named() -> None:
    _python(
        "import sys\n"
        "sys.modules['lightly'] = None\n"
        "import mixmask.integrations\n"
        "try:\n"
        "    import mixmask.integrations.lightly\n"
        "except ImportError as error:\n"
        "    assert \"pip install '.[lightly]' in the checkout\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )


def test_importing_mixmask_leaves_lightly_alone() -> None:
    _python(
        "import sys, mixmask, mixmask.losses, mixmask.integrations\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'lightly', 'pytorch_lightning', 'torchvision'}, loaded\n"
    )
