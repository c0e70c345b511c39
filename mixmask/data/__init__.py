"""Data sets, streamed folders, and the random views that are made of their images."""
