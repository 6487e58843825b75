"""Accuracy under attack: attacks on the images of evaluation sets, their rows, tables and figures."""
