"""The embedded demo: a small generated world, the CLIP pre-trained on it, and the comparison it ends in."""
