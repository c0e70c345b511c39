"""lightly's criteria with mixed views on a pretended accelerator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightly.loss as theirs
import pytest
import torch
from lightly.loss.lejepa_loss import LeJEPALoss
from pretended import DEVICE, pretend
from pretended_known import LIGHTLY
from torch import Tensor, nn

from mixmask import BlockMaskGenerator, MixedBatch, mix_batch
from mixmask.integrations.lightly import wrap

N, C, Q = 8, 12, 32
CRITERIA: dict[str, Callable[[], nn.Module]] = {
    "NTXentLoss": theirs.NTXentLoss,
    "NTXentLoss, bank": lambda: theirs.NTXentLoss(memory_bank_size=(Q, C)),
    "NegativeCosineSimilarity": theirs.NegativeCosineSimilarity,
    "MMCRLoss": theirs.MMCRLoss,
    "BarlowTwinsLoss": theirs.BarlowTwinsLoss,
    "VICRegLoss": theirs.VICRegLoss,
    "TiCoLoss": theirs.TiCoLoss,
    "DCLLoss": theirs.DCLLoss,
}


# Criteria over lists of crops: called with two large crops and what was mixed of the first.
CROPS: dict[str, Callable[[], nn.Module]] = {
    "SwaVLoss": theirs.SwaVLoss,
    "DINOLoss": lambda: theirs.DINOLoss(C),
    "LeJEPALoss": LeJEPALoss,
}


def _call(name: str, criterion: Any, rows: Tensor, mixed: MixedBatch) -> Tensor:
    z, target, z_mixed = rows.unbind()
    if name == "SwaVLoss":
        found: Tensor = criterion([z, target], [], z_mixed=z_mixed, mixed=mixed, view=0)
    elif name == "DINOLoss":
        teacher = [z.detach(), target.detach()]
        found = criterion(teacher, [z, target], z_mixed=z_mixed, mixed=mixed, view=0)
    elif name == "LeJEPALoss":
        found = criterion(
            local_proj=z[None], global_proj=target[None], z_mixed=z_mixed, mixed=mixed
        )
    else:
        found = criterion(z, target.detach(), z_mixed, mixed)
    return found


@pytest.mark.parametrize("name", CRITERIA | CROPS)
def test_a_criterion_of_lightly_waits_only_where_lightly_does(name: str) -> None:
    torch.manual_seed(1)
    # MMCR takes several views of an image at once.
    rows = torch.randn(3, N, *([2] if name == "MMCRLoss" else []), C)
    images = torch.rand(N, 3, 8, 8)
    masks = BlockMaskGenerator(4)()

    def step(criterion: Any, rows: Tensor, images: Tensor) -> Tensor:
        torch.manual_seed(2)  # LeJEPA projects at random.
        rows = rows.detach().requires_grad_()  # (3, N, ..., C)
        loss = _call(name, criterion, rows, mix_batch(images, masks))
        loss.backward()
        assert rows.grad is not None
        return torch.cat([loss.detach().view(1), rows.grad.flatten()])

    criterion = (CRITERIA | CROPS)[name]()
    expected = wrap(copy.deepcopy(criterion))
    with pretend() as accelerator:
        ours = wrap(criterion.to(DEVICE))
        there = rows.to(DEVICE), images.to(DEVICE)
        torch.testing.assert_close(step(ours, *there).cpu(), step(expected, rows, images))
        with accelerator.watched(*LIGHTLY.get(name, ())):
            found = step(ours, *there)
        torch.testing.assert_close(found.cpu(), step(expected, rows, images))
