"""The demo: pre-training of its small CLIP on a generated world, and the comparison of fine-tuned models."""
