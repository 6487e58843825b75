"""The frozen model's embeddings of the reference set, computed at every step or read from a cache."""
