"""The frozen model's embeddings of the reference set: computed at every step, or once into a cache."""
