"""Checkpoints: the saved state of a run, resuming from it, and the exported model for open_clip."""
