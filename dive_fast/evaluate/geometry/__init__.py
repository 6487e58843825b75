"""How far fine-tuning moved the geometry of the embeddings."""
