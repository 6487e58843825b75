"""Scripts that start the commands of :mod:`dive_fast.commands`; also installed as ``dive_fast.launch``."""
