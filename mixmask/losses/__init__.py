"""Criteria in the form (z, target), and the λ-weighted loss that goes around any of them."""

from mixmask.losses._criteria import Criterion, MatchingCriterion, SharingCriterion
from mixmask.losses.clustering import DINO, SwAV, dino, sinkhorn, swav, update_center
from mixmask.losses.contrastive import InfoNCE, NTXent, info_nce, nt_xent
from mixmask.losses.cosine import NegativeCosine, negative_cosine
from mixmask.losses.lambda_weighted import LambdaWeightedLoss, lambda_weighted_loss
from mixmask.losses.redundancy import BarlowTwins, MatchedBarlowTwins, VICReg, barlow_twins, vicreg

__all__ = [
    "DINO",
    "BarlowTwins",
    "Criterion",
    "InfoNCE",
    "LambdaWeightedLoss",
    "MatchedBarlowTwins",
    "MatchingCriterion",
    "NTXent",
    "NegativeCosine",
    "SharingCriterion",
    "SwAV",
    "VICReg",
    "barlow_twins",
    "dino",
    "info_nce",
    "lambda_weighted_loss",
    "negative_cosine",
    "nt_xent",
    "sinkhorn",
    "swav",
    "update_center",
    "vicreg",
]
