"""Run folders: what is written into them, and what is read back."""
