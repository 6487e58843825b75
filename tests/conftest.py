"""Puts this folder on the import path, so that every test can say ``from distributed import run_ranks``.

The folders of tests are not packages on purpose: pytest would put the top of the repository on the path, and
its ``kernels`` would hide Hugging Face's package of that name.
"""
