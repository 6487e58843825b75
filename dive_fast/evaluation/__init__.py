"""Evaluation of a model: prompts and heads, retrieval, weight ensembles, TPGM, geometry of the embeddings."""
