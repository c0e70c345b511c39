"""Mixing on a pretended accelerator, and that the watch on it notices what it should."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mutations import mutate
from pretended import DEVICE, Accelerator, BreachError, PretendedTensor, pretend
from pretended_known import Known
from torch import Tensor

from mixmask import (
    BlockMaskGenerator,
    DiscreteMaskGenerator,
    MixedBatch,
    MixMask,
    cutmix_batch,
    erase_batch,
    mix_batch,
    mixing,
    mixup_batch,
)
from mixmask.masks import cells_to_pixels

Mix = Callable[..., MixedBatch]

N = 7
BLOCKS, CELLS = BlockMaskGenerator(4), DiscreteMaskGenerator(4, (0.25, 0.75))
GENERATORS = {
    "blocks": BLOCKS,
    "short blocks": BlockMaskGenerator(4, 0.75, exact=False),
    "rolled blocks": BlockMaskGenerator(4, (0.25, 0.75), roll=True),
    "small grid": BlockMaskGenerator(2),
    "large grid": BlockMaskGenerator(24),
    "discrete": CELLS,
}
ON_HOST = torch.tensor([[True, False], [False, True]])


def _mixes() -> Iterator[tuple[str, Mix]]:
    for name, masks in GENERATORS.items():
        yield f"mix, {name}", lambda x, g, m=masks: mix_batch(x, m, generator=g)
        yield (
            f"mix, {name} per sample",
            lambda x, g, m=masks: mix_batch(
                x, m(len(x), device=x.device, generator=g), generator=g
            ),
        )
    yield "mix, mask of the host", lambda x, g: mix_batch(x, ON_HOST, generator=g)
    yield "mix, masks of the host", lambda x, g: mix_batch(x, BLOCKS(N, generator=g))
    yield (
        "mix, pixels of the host",
        lambda x, g: mix_batch(x, cells_to_pixels(CELLS(N, generator=g), *x.shape[-2:])),
    )
    for partner in ("reverse", "random", torch.arange(N).roll(1)):
        name = partner if isinstance(partner, str) else "index"
        yield f"mix, {name}", lambda x, g, p=partner: mix_batch(x, BLOCKS, partner=p, generator=g)
        for per_sample in (False, True):
            options: dict[str, Any] = {"partner": partner, "per_sample": per_sample}
            more = f"{name}{', per sample' * per_sample}"
            yield f"mixup, {more}", lambda x, g, o=options: mixup_batch(x, generator=g, **o)
            yield f"cutmix, {more}", lambda x, g, o=options: cutmix_batch(x, generator=g, **o)
            if isinstance(partner, str):
                mix = MixMask(4, per_sample=per_sample, partner=partner, roll=per_sample)
                yield f"module, {more}", lambda x, g, m=mix: m(x, generator=g)


def _erasures() -> Iterator[tuple[str, Mix]]:
    yield "shared", lambda x, g: erase_batch(x, BLOCKS, generator=g)
    yield (
        "per sample",
        lambda x, g: erase_batch(
            x, BLOCKS(N, device=x.device, generator=g), mean=0.5, std=0.0, generator=g
        ),
    )
    for count in (1, N):
        yield (
            f"per channel, {count}",
            lambda x, g, n=count: erase_batch(
                x, CELLS(3 * n, generator=g).view(n, 3, 4, 4), std=0.5, generator=g
            ),
        )


MIXES, ERASURES = dict(_mixes()), dict(_erasures())


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with pretend() as accelerator:
        yield accelerator


def _on_host(tensor: Tensor | None) -> Any:
    assert isinstance(tensor, PretendedTensor | None)
    return None if tensor is None else tensor.held


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("name", MIXES)
def test_mixing_never_waits_and_gives_what_the_cpu_gives(
    name: str, dtype: torch.dtype, seeded: bool, accelerator: Accelerator
) -> None:
    images = (255 * torch.rand(N, 3, 24, 30)).to(dtype)
    moved = images.to(DEVICE)
    torch.manual_seed(5)
    expected = MIXES[name](images, _seeded() if seeded else None)
    torch.manual_seed(5)
    with accelerator.watched():
        mixed = MIXES[name](moved, _seeded() if seeded else None)
    for field in ("images", "lam", "partner", "mask"):
        ours, theirs = _on_host(getattr(mixed, field)), getattr(expected, field)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("name", ERASURES)
def test_erasing_draws_its_noise_on_the_device(
    name: str, seeded: bool, accelerator: Accelerator
) -> None:
    images = torch.rand(N, 3, 24, 30).to(DEVICE)
    torch.manual_seed(5)
    with accelerator.watched():
        mixed = ERASURES[name](images, _seeded() if seeded else None)
    kept, mask = _on_host(mixed.images) == _on_host(images), _on_host(mixed.mask)
    assert torch.equal(
        kept,
        mask.expand_as(kept)
        if mask.ndim > 2 and mask.shape[1] == 3
        else (mask.view(-1, 1, 24, 30).expand_as(kept)),
    )
    torch.testing.assert_close(_on_host(mixed.lam).mean(), mask.float().mean())


def test_mixing_has_its_gradient_on_the_device(accelerator: Accelerator) -> None:
    images = torch.rand(N, 3, 24, 24).to(DEVICE).requires_grad_()
    with accelerator.watched():
        mix_batch(images, BLOCKS).images.sum().backward()
    assert torch.equal(_on_host(images.grad).sum(), torch.tensor(N * 3.0 * 24 * 24))


@pytest.mark.parametrize("count", [4, 32])
def test_masks_of_boxes_at_pixel_size(count: int, accelerator: Accelerator) -> None:
    """What is small is staged at once, and so is not on the list."""
    images = torch.zeros(count, 1, 64, 64).to(DEVICE)
    with accelerator.watched():
        cutmix_batch(images, per_sample=True)


def test_masks_of_a_large_batch(accelerator: Accelerator) -> None:
    """A fine grid for each of many images is more than what is staged."""
    with accelerator.watched():
        BLOCKS(256, device=DEVICE)
        CELLS(256, device=DEVICE)
    with accelerator.watched():
        BlockMaskGenerator(24)(256, device=DEVICE)
        DiscreteMaskGenerator(24)(256, device=DEVICE)


def test_a_record_is_pinned_and_moved(accelerator: Accelerator) -> None:
    record = mix_batch(torch.rand(N, 3, 64, 64), BLOCKS(N))
    pinned = record.pin_memory()
    with accelerator.watched():
        moved = pinned.to(DEVICE, non_blocking=True)
    assert torch.equal(_on_host(moved.images), record.images)
    with pytest.raises(BreachError, match="blocks at mixmask/mixing"), accelerator.watched():
        pinned.to(DEVICE)
    with pytest.raises(BreachError, match="from pageable memory"), accelerator.watched():
        record.to(DEVICE, non_blocking=True)
    with pytest.raises(BreachError, match="copies to the host"), accelerator.watched():
        moved.to("cpu")


# A line of the package, what it becomes, and what is then said.
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "copy to the host": (
        "mix_batch", "lam = mask.mean(", "lam = mask.cpu().mean(",
        "_to_copy copies to the host at mixmask/mixing.py:{} in mix_batch",
    ),
    "item": (
        "mix_batch", "return MixedBatch(", "mask.sum().item()\n    return MixedBatch(",
        "_local_scalar_dense needs values on the host at mixmask/mixing.py:{} in mix_batch",
    ),
    "equal": (
        "mix_batch", "return MixedBatch(", "torch.equal(mask, ~mask)\n    return MixedBatch(",
        "equal needs values on the host at mixmask/mixing.py:{} in mix_batch",
    ),
    "list": (
        "mix_batch", "return MixedBatch(", "index.tolist()\n    return MixedBatch(",
        "tolist copies to the host at mixmask/mixing.py:{} in mix_batch",
    ),
    "truth": (
        "_fill", "    if not plain", "    if mask.all():\n        return images\n    if not plain",
        "_local_scalar_dense needs values on the host at mixmask/mixing.py:{} in _fill",
    ),
    "boolean index": (
        "_fill", "    if not plain", "    images[:, :, ~mask[0]]\n    if not plain",
        "index needs values on the host at mixmask/mixing.py:{} in _fill",
    ),
    "where": (
        "_fill", "    if not plain", "    torch.where(mask)\n    if not plain",
        "nonzero needs values on the host at mixmask/mixing.py:{} in _fill",
    ),
    "no device": (
        "_reverse", "torch.arange(n, device=device)", "torch.arange(n)",
        r"index_select got tensors of cuda:0 and a host's \(8,\) at mixmask/mixing.py:{} in _fill",
    ),
    "no device, of pixels": (
        "cells_to_pixels", "torch.arange(height, device=masks.device)", "torch.arange(height)",
        r"index_select got .* host's \(24,\) at mixmask/masks.py:{} in cells_to_pixels",
    ),
    "blocking copy": (
        "choose_partners", "return move(_check_partner(partner, n), device)",
        "return _check_partner(partner, n).to(device)",
        r"_to_copy copies \(8,\) to cuda:0 and blocks at mixmask/_partners.py:{} in choose_.*",
    ),
    "copy of numbers": (
        "choose_partners", "return move(_check_partner(partner, n), device)",
        "return torch.tensor(partner.tolist(), device=device)",
        r"_to_copy copies \(8,\) to cuda:0 and blocks at mixmask/_partners.py:{} in choose_.*",
    ),
    "generator of the host": (
        "make_generator", "torch.Generator(device)", "torch.Generator()",
        r"normal_ on cuda:0 got a generator of the host at mixmask/mixing.py:\d+ in _draw_noise",
    ),
    "generator of the device": (
        "make_generator", "torch.Generator(device)", 'torch.Generator("cuda")',
        r"rand on the host got a generator of cuda:0 at mixmask/_blocks.py:\d+ in _draw",
    ),
}  # fmt: skip


def _everything(images: Tensor) -> None:
    mix_batch = mixing.mix_batch
    mix_batch(images, BLOCKS(len(images)))
    mix_batch(images, BLOCKS, partner=torch.arange(len(images)).roll(1))
    erase_batch(images, BLOCKS, generator=_seeded())


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_package_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    function, old, new, message = MUTATIONS[name]
    images = torch.rand(8, 3, 24, 24).to(DEVICE)
    with accelerator.watched():
        _everything(images)
    mutate(monkeypatch, function, old, new)
    message = message.replace(".py", r"\.py").format(r"\d+")
    with pytest.raises(BreachError, match=f"^{message}$"), accelerator.watched():
        _everything(images)


@pytest.mark.usefixtures("accelerator")
def test_only_the_steady_state_must_not_wait() -> None:
    x = torch.ones(3).to(DEVICE)
    assert [x.sum().item(), float(x.cpu().sum()), *x.tolist()] == [3.0, 3.0, 1.0, 1.0, 1.0]
    # What a device refuses is refused at all times.
    with pytest.raises(
        BreachError, match=r"add got .* at test_pretended_device.py:\d+ in test_only"
    ):
        x + torch.ones(3)
    with pytest.raises(BreachError, match="generator of the host"):
        torch.rand(3, device=DEVICE, generator=_seeded())


def test_a_listed_wait_passes_and_has_to_occur(
    monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    images = torch.rand(8, 3, 24, 24).to(DEVICE)
    known = Known("_local_scalar_dense", "mixing.py:mix_batch", "a test")
    gone = re.escape("listed, but no longer there: _local_scalar_dense in mixing.py:mix_batch; ")
    with pytest.raises(BreachError, match=gone), accelerator.watched(known):
        _everything(images)
    mutate(monkeypatch, *MUTATIONS["item"][:3])
    with accelerator.watched(known):
        _everything(images)


class Reading(torch.autograd.Function):
    """The identity, whose gradient is looked at on the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        del ctx
        return grad * float(grad.max())


def test_a_wait_is_noticed_though_its_error_is_caught(accelerator: Accelerator) -> None:
    x = torch.ones(3).to(DEVICE)
    caught = contextlib.suppress(AssertionError)
    with pytest.raises(BreachError, match="needs values"), accelerator.watched(), caught:
        x.sum().item()


def test_a_wait_in_backward_is_noticed(accelerator: Accelerator) -> None:
    x = torch.ones(3).to(DEVICE).requires_grad_()
    with pytest.raises(BreachError, match=r"needs values .* in backward"), accelerator.watched():
        Reading.apply(x).sum().backward()


def test_without_the_device_nothing_is_left_behind() -> None:
    with pretend():
        x = torch.ones(3).to(DEVICE)
        assert torch.Generator(DEVICE).device == DEVICE
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
    assert torch.Generator().device.type == "cpu"
    assert "Pretended" not in torch.Generator.__name__
