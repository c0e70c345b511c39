"""How good a representation is: neighbours, linear probes, fine-tuning."""

from mixmask.evaluation.classifier import Training
from mixmask.evaluation.features import extract_features
from mixmask.evaluation.finetune import (
    balanced_subset,
    finetune_scores,
    linear_sgd_scores,
    listed_subset,
)
from mixmask.evaluation.knn import knn_accuracy, knn_scores
from mixmask.evaluation.linear import linear_accuracy, linear_scores
from mixmask.evaluation.metrics import Accuracy, measure_accuracy

__all__ = [
    "Accuracy",
    "Training",
    "balanced_subset",
    "extract_features",
    "finetune_scores",
    "knn_accuracy",
    "knn_scores",
    "linear_accuracy",
    "linear_scores",
    "linear_sgd_scores",
    "listed_subset",
    "measure_accuracy",
]
