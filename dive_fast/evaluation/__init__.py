"""Accuracy, retrieval, calibration and geometry of models, and weights between pre-trained and tuned ones."""
