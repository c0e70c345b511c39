"""How good a representation is: neighbours, linear probes, fine-tuning.

`evaluate(load_task(Path("runs/a")), KNN())` measures a run as `mixmask evaluate knn` does.
"""

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
from mixmask.evaluation.neighbours import nearest_neighbours
from mixmask.evaluation.protocols import (
    KNN,
    FineTuning,
    Linear,
    LinearSGD,
    Protocol,
    Result,
    evaluate,
)
from mixmask.evaluation.tasks import Task, load_task

__all__ = [
    "KNN",
    "Accuracy",
    "FineTuning",
    "Linear",
    "LinearSGD",
    "Protocol",
    "Result",
    "Task",
    "Training",
    "balanced_subset",
    "evaluate",
    "extract_features",
    "finetune_scores",
    "knn_accuracy",
    "knn_scores",
    "linear_accuracy",
    "linear_scores",
    "linear_sgd_scores",
    "listed_subset",
    "load_task",
    "measure_accuracy",
    "nearest_neighbours",
]
