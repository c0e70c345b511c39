"""Criteria in the form (z, target), and the λ-weighted loss that goes around any of them."""

from mixmask.losses.contrastive import InfoNCE, info_nce
from mixmask.losses.lambda_weighted import Criterion, SharingCriterion, lambda_weighted_loss

__all__ = ["Criterion", "InfoNCE", "SharingCriterion", "info_nce", "lambda_weighted_loss"]
