"""Triton's interpreter without the half of its time that it spends on what it has done already."""

import functools
import inspect
import os
from typing import Any


def quicken() -> None:
    """Lets each launch patch Triton's language once, and not again at every call of a device function."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    # Not before it is known that there is to be an interpreter: Triton chooses when it is imported.
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @functools.wraps(patch)
    def patch_once(fn: Any) -> Any:
        seen = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value)}
        if (seen := seen & {tl.__name__, tl.core.__name__}) <= patched:
            return interpreter._LangPatchScope()
        patched.update(seen)
        return patch(fn)

    @functools.wraps(launch)
    def launch_afresh(self: Any, *arguments: Any, **named: Any) -> Any:
        # The last launch has put back what it had patched.
        patched.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def pytest_configure() -> None:
    """As a plugin, for what a test starts: ``pytest -p interpreted``, with this folder on the path."""
    quicken()
