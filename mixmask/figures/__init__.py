"""Figures of masks, runs, features and detections."""
