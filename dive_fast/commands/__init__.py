"""The commands: each module has a ``main`` that takes arguments and returns the exit code."""
