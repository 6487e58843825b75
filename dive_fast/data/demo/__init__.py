"""The generated data sets of the embedded demo."""
