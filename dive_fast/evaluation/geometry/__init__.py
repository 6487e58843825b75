"""Geometry of the embeddings before and after fine-tuning: measures, embedding of pairs, reports, figures."""
