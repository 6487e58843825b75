"""Evaluation of a model: zero-shot and head accuracy, retrieval, weight ensembles, geometry of the embeddings."""
