"""Readers of raw data sets: image folders, webdataset tars and CSV tables."""
