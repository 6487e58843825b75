"""Fine-tune CLIP by DiVE (Difference Vector Equalization) without losing its robustness, fast.

The names below are imported when they are used: the losses need only torch, all others the extra ``train``.
"""

from importlib import import_module, metadata
from typing import Any

__all__ = [
    "Config",
    "compare",
    "contrastive_loss",
    "difference_loss",
    "distillation_loss",
    "dive_loss",
    "evaluate",
    "load",
    "train",
]
__version__ = metadata.version("dive_fast")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dive_fast' has no attribute {name!r}")
    module = "dive_fast.kernels" if name.endswith("_loss") else "dive_fast.api"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
