"""Towers: models of open_clip, their weights, preprocessing, heads and transformer blocks."""
