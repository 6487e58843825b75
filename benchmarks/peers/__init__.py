"""What the engine is measured against; ``flyp`` and ``dive_published`` share no code with it."""
