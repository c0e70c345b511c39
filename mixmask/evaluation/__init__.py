"""How good a representation is: nearest neighbours and linear probes on frozen features."""

from mixmask.evaluation.features import extract_features
from mixmask.evaluation.knn import knn_accuracy
from mixmask.evaluation.linear import linear_accuracy

__all__ = ["extract_features", "knn_accuracy", "linear_accuracy"]
