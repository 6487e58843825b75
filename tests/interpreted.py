"""Speeds up Triton's interpreter, which spends half of its time on patching Triton's language repeatedly."""

import functools
import inspect
import os
from typing import Any


def speed_up() -> None:
    """Makes each launch patch Triton's language once, instead of at every call of a device function."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    # Imported only if the interpreter is enabled: Triton chooses at import.
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @functools.wraps(patch)
    def patch_once(fn: Any) -> Any:
        modules = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value)}
        if (modules := modules & {tl.__name__, tl.core.__name__}) <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(fn)

    @functools.wraps(launch)
    def launch_unpatched(self: Any, *arguments: Any, **options: Any) -> Any:
        # The previous launch has restored the language.
        patched.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_unpatched


def pytest_configure() -> None:
    """Plugin for pytest processes that a test starts: ``pytest -p interpreted``, with this folder on the path."""
    speed_up()
