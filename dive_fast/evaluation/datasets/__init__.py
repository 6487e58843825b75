"""Evaluation sets: known data sets, their layouts and class names."""
