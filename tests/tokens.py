"""open_clip's tokenizer without the tenth of a second that each takes to read its merges: a run makes three."""

import functools
from typing import Any

from open_clip.tokenizer import SimpleTokenizer


def keep() -> None:
    """Lets tokenizers of the same arguments share what they have read."""
    initialise = SimpleTokenizer.__init__
    if hasattr(initialise, "__wrapped__"):
        return
    known: dict[str, dict[str, Any]] = {}

    @functools.wraps(initialise)
    def initialise_once(self: Any, *arguments: Any, **named: Any) -> None:
        key = repr((arguments, named))
        if key not in known:
            initialise(self, *arguments, **named)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key], cache=dict(known[key]["cache"]))

    SimpleTokenizer.__init__ = initialise_once
    SimpleTokenizer()
