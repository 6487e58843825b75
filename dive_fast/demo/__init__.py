"""The embedded demo: a small generated world, the small CLIP pre-trained on it, and the comparison that it ends in."""
