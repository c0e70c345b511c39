"""What is taken for a criterion, and what is refused because it would train on something else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weighed import ROWS, SHARED, C, squares

from mixmask import (
    BlockMaskGenerator,
    LambdaWeightedLoss,
    lambda_weighted_loss,
    mix_batch,
)

# What is passed as criterion, and what to it.


class Model(nn.Module):
    """A whole model, which takes views and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3 * 8 * 8, C)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return squares(self.encoder(x1.flatten(1)), self.encoder(x2.flatten(1)))


class Projecting(nn.Module):
    """A criterion with a layer of its own, over dense embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(C, C)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return squares(self.layer(z.movedim(1, -1)), target.movedim(1, -1))


class Distance(nn.CosineSimilarity):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return 1 - super().forward(x1, x2)


PROBABILITIES = torch.rand(4, C).softmax(dim=1)
LOGITS = torch.randn(4, 9)
IMAGES = torch.rand(4, 3, 8, 8)
NEITHER = torch.randn(4, C)
WRONG: dict[str, tuple[Any, Tensor, Tensor, type[Exception], str]] = {
    "similarity": (nn.CosineSimilarity(), ROWS, ROWS, TypeError, r"use losses\.NegativeCosine"),
    "similarity's function": (F.cosine_similarity, ROWS, ROWS, TypeError, "must be a loss, got a"),
    "similarity's partial": (
        functools.partial(F.cosine_similarity, dim=1),
        ROWS,
        ROWS,
        TypeError,
        "must be a loss, got a cosine similarity",
    ),
    "cross-entropy with keys": (
        nn.CrossEntropyLoss(),
        ROWS,
        NEITHER,
        ValueError,
        "must be distributions .* look like embeddings",
    ),
    "its function": (F.cross_entropy, ROWS, NEITHER, ValueError, "must be distributions"),
    "its partial": (
        functools.partial(F.cross_entropy, reduction="none"),
        ROWS,
        NEITHER,
        ValueError,
        "must be distributions",
    ),
    "positive keys": (nn.CrossEntropyLoss(), ROWS, ROWS + 1, ValueError, "must be distributions"),
    "MoCo's logits and labels": (
        nn.CrossEntropyLoss(),
        LOGITS,
        torch.zeros(4, dtype=torch.long),
        ValueError,
        "all class 0.* MoCo's or SimCLR's logits and labels; pass losses.InfoNCE",
    ),
    "the same after log_softmax": (
        nn.NLLLoss(),
        LOGITS.log_softmax(dim=1),
        torch.zeros(4, dtype=torch.long),
        ValueError,
        "all class 0",
    ),
    "KL with keys": (
        nn.KLDivLoss(reduction="batchmean"),
        ROWS.log_softmax(dim=1),
        NEITHER,
        ValueError,
        "targets of a KL divergence must be distributions",
    ),
    "KL of embeddings": (
        nn.KLDivLoss(reduction="batchmean"),
        ROWS + 1,
        PROBABILITIES,
        ValueError,
        "needs log-probabilities as z",
    ),
    "binary": (nn.BCEWithLogitsLoss(), ROWS, NEITHER, ValueError, r"lie within 0 \.\.\. 1"),
    "whole model": (
        Model(),
        IMAGES,
        IMAGES,
        TypeError,
        r"got the module Model, .* images \(4, 3, 8, 8\); pass the loss alone, and encode\(mixed",
    ),
}
RIGHT: dict[str, tuple[Any, Tensor, Tensor]] = {
    "distance": (nn.PairwiseDistance(), ROWS, ROWS),
    "similarity turned round": (Distance(), ROWS, ROWS),
    "probabilities": (nn.CrossEntropyLoss(), ROWS, PROBABILITIES),
    "probabilities in bfloat16": (nn.CrossEntropyLoss(), ROWS, PROBABILITIES.bfloat16().float()),
    "labels": (nn.CrossEntropyLoss(reduction="none"), LOGITS, torch.arange(4)),
    "one class of few": (nn.CrossEntropyLoss(), LOGITS[:, :2], torch.zeros(4, dtype=torch.long)),
    "KL": (nn.KLDivLoss(reduction="batchmean"), ROWS.log_softmax(dim=1), PROBABILITIES),
    "KL of logarithms": (
        functools.partial(F.kl_div, log_target=True, reduction="batchmean"),
        ROWS.log_softmax(dim=1),
        PROBABILITIES.log(),
    ),
    "binary": (nn.BCEWithLogitsLoss(), ROWS, PROBABILITIES),
    "dense embeddings": (
        Projecting(),
        torch.randn(4, C, 2, 2, requires_grad=True),
        torch.randn(4, C, 2, 2),
    ),
    "images, nothing trained": (nn.MSELoss(), IMAGES, IMAGES),
}


@pytest.mark.parametrize("criterion, z, target, error, text", WRONG.values(), ids=WRONG)
def test_what_is_no_criterion_is_refused(
    criterion: Any, z: Tensor, target: Tensor, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        lambda_weighted_loss(criterion, z, target, SHARED)
    for arguments in ((z, target), (z, target, z, SHARED)):
        with pytest.raises(error, match=text):
            LambdaWeightedLoss(criterion)(*arguments)
    if isinstance(criterion, Model):
        assert all(p.grad is None for p in criterion.parameters())


def test_simclrs_logits_and_labels_are_refused() -> None:
    """The positive of each of the 2N views comes first, then the 2N - 2 negatives."""
    both = mix_batch(torch.rand(8, 3, 8, 8), BlockMaskGenerator(2))
    labels = torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match=r"SimCLR's logits and labels; pass .* losses\.NTXent"):
        lambda_weighted_loss(F.cross_entropy, torch.randn(8, 7), labels, both)
    lambda_weighted_loss(F.cross_entropy, torch.randn(8, 7), labels + 1, both)


@pytest.mark.parametrize("criterion, z, target", RIGHT.values(), ids=RIGHT)
def test_what_is_a_criterion_is_not_refused(criterion: Any, z: Tensor, target: Tensor) -> None:
    plain = 0.5 * criterion(z, target) + 0.5 * criterion(z, target[SHARED.partner])
    torch.testing.assert_close(lambda_weighted_loss(criterion, z, target, SHARED), plain.mean())
    loss = LambdaWeightedLoss(criterion)(z, target, z, SHARED)
    torch.testing.assert_close(loss, plain.mean() + criterion(z, target).mean())


@pytest.mark.parametrize(
    "z, target, error, text",
    [
        ((ROWS, ROWS), ROWS, TypeError, r"^z_mixed must be .* got tuple; .* z_mixed\[0\]"),
        ([ROWS], ROWS, TypeError, r"^z_mixed must be a tensor \(N, \.\.\.\), got list"),
        ({"z": ROWS}, ROWS, TypeError, r"^z_mixed must be .* got dict; pass .* out of 'z'"),
        (ROWS, (ROWS, ROWS), TypeError, r"^target must be .* got tuple; .* target\[0\]"),
        (ROWS, None, TypeError, r"^target must be a tensor .* got NoneType"),
        (torch.rand(8, C), ROWS, ValueError, r"^z_mixed must .* \(8, 5\); both .*z_mixed\.chunk"),
        (ROWS, torch.rand(8, C), ValueError, r"^target must .* \(8, 5\); both .*target\.chunk"),
        (ROWS, ROWS[:2], ValueError, r"^target must .*; both .* mixed one at .* images\.chunk"),
    ],
)
def test_what_is_no_embedding_is_refused(
    z: Any, target: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        lambda_weighted_loss(F.mse_loss, z, target, SHARED)
