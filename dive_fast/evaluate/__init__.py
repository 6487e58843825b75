"""What a model is worth: zero-shot accuracy, and how far the geometry of its embeddings has moved."""
