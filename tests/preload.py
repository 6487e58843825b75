"""Imports and preparations of the process that ranks and scripts are forked from, once for all of them."""

import functools
import importlib
import os
from importlib import metadata

import tokens
import torch

PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # which compiles, and so imports inductor, at a run's start
    "dive_fast.data.loaders.dali",
    "dive_fast.training.loop",
    "transformers",
)

# Only this process is to look for modules in this folder, and no other that is started from those forked of it.
_, _, others = os.environ.pop("PYTHONPATH", "").partition(os.pathsep)
if others:
    os.environ["PYTHONPATH"] = others
for name in PRELOADED:
    importlib.import_module(name)
# Interpreted kernels would take most of the time; tests of the blocks choose them.
importlib.import_module("dive_fast.model.fast_blocks").FastModule.backend = "torch"
tokens.keep()
# A run asks for the versions of eight packages several times, which reads and parses their files each time.
metadata.version = functools.cache(metadata.version)
importlib.import_module("dive_fast.identity").versions()
# DeepSpeed formats every parameter for a debug log, which is a tenth of the time of ZeRO-3's start.
torch.nn.Parameter.__repr__ = object.__repr__
