"""Shift of test sets from a training set: Mahalanobis distances of embeddings, correlations, reports, figures."""
