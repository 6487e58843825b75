"""The training step on DeepSpeed."""
