"""Data sets of the demo: vocabulary, rendering, and the splits on disk."""
