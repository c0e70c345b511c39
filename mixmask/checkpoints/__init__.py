"""Checkpoints of ours and of others: read safely, loaded as a backbone, exported."""

from mixmask.checkpoints.export import export_backbone
from mixmask.checkpoints.load import Loaded, load_backbone

__all__ = ["Loaded", "export_backbone", "load_backbone"]
