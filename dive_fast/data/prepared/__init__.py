"""Prepared data sets: format, writer, reader."""
