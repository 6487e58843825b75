"""Predictions of memory, FLOP and time before a run starts."""
