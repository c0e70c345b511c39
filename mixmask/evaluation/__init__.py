"""How good a representation is: neighbours, linear probes, fine-tuning.

`evaluate(load_task("runs/a"), KNN())` measures a run as `mixmask evaluate knn` does.
"""

from mixmask.evaluation.classifier import FineTuning, LinearSGD, classifier_scores
from mixmask.evaluation.features import extract_features
from mixmask.evaluation.linear import Linear, linear_accuracy, linear_scores
from mixmask.evaluation.metrics import Accuracy, measure_accuracy, wilson_interval
from mixmask.evaluation.neighbours import KNN, knn_accuracy, knn_scores, nearest_neighbours
from mixmask.evaluation.protocols import Protocol, Result, evaluate, results_file
from mixmask.evaluation.subsets import balanced_subset, listed_subset
from mixmask.evaluation.tasks import Task, load_task

__all__ = [
    "KNN", "Accuracy", "FineTuning", "Linear", "LinearSGD", "Protocol", "Result", "Task",
    "balanced_subset", "classifier_scores", "evaluate", "extract_features",
    "knn_accuracy", "knn_scores", "linear_accuracy", "linear_scores", "listed_subset", "load_task",
    "measure_accuracy", "nearest_neighbours", "results_file", "wilson_interval",
]  # fmt: skip
