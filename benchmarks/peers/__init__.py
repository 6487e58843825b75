"""Competitors of the engine; ``flyp`` and ``dive_published`` share no code with it."""
