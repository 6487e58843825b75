"""Runs over a grid of settings, the choice among them, and tables and charts that compare any runs."""
