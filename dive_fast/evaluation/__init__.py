"""Evaluation of a model: zero-shot and head accuracy, retrieval, weight ensembles, TPGM, geometry of the embeddings."""
