"""Imports of the engine's libraries without what they would do in vain: optional packages, garbage collection."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("mlflow", "wandb")
"""Imported by DeepSpeed's autotuner and by timm's training summaries where they are installed, in seconds."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Makes imports of :data:`UNUSED` fail in the context, as if they were not installed; later ones succeed.

    Garbage is not collected meanwhile: what modules create stays, and each collection would visit all of it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    blocked = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # Python's mark of a blocked import
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]
        if was_enabled:
            gc.enable()
