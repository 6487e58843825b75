"""Identities: everything that determines a result, as a tree of JSON values.

Run folders, teacher caches, evaluation results and prepared sets build an :data:`Identity`, store it, and compare
it before they use stored files. An identity holds contents (weights, pixels, texts) as digests and never as paths:
moved data is the same data, other data at the same path is not.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

Identity = dict[str, Any]
"""JSON values, nested by section."""

PACKAGES = ("torch", "torchvision", "open_clip_torch", "deepspeed", "numpy", "pillow", "transformers", "timm")
"""Packages whose version may change the last bits of a result."""
SHOWN = 60
"""Maximum characters of a value in a message; digests are cut to :data:`SHOWN_DIGEST`."""
SHOWN_DIGEST = 12


def digest(identity: Any) -> str:
    """SHA-256 of a JSON value; equal if and only if the values are equal.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value is not JSON.
    """
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Difference(NamedTuple):
    """A key whose values differ between two identities."""

    key: str
    """Dotted path of the key: ``train.seed``."""
    stored: Any
    """Stored value; None if the stored identity lacks the key."""
    current: Any
    """Current value; None if the current identity lacks the key."""

    def shown(self) -> tuple[str, str]:
        """The stored and the current value, shortened for a message."""
        return shown(self.stored, self.current)

    def __str__(self) -> str:
        stored, current = self.shown()
        return f"{self.key}: {stored} there, {current} here"


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[Difference]:
    """All values that differ, in the order of the current identity; a list is compared as one value.

    Args:
        stored: identity of the stored results, as read from JSON.
        current: identity of the current settings.
    """
    return list(_differences(json.loads(json.dumps(stored)), json.loads(json.dumps(current)), ""))


def _differences(stored: Any, current: Any, path: str) -> Iterator[Difference]:
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in [*current, *(key for key in stored if key not in current)]:
            yield from _differences(stored.get(key), current.get(key), f"{path}.{key}".lstrip("."))
    elif type(stored) is not type(current) or stored != current:
        yield Difference(path, stored, current)


def shown(one: Any, other: Any) -> tuple[str, str]:
    """Two different values as texts for a message, shortened to the part where they differ."""
    if isinstance(one, list) and isinstance(other, list):
        return _shown_lists(one, other)
    texts = [_text(value) for value in (one, other)]
    if all(len(text) <= SHOWN for text in texts):
        return texts[0], texts[1]
    start = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, start - SHOWN // 3)
    first, second = (
        f"{'... ' if start else ''}{text[start : start + SHOWN]}{' ...' if len(text) > start + SHOWN else ''}"
        for text in texts
    )
    return first, second


def _shown_lists(one: Sequence[Any], other: Sequence[Any]) -> tuple[str, str]:
    if len(one) != len(other):
        return f"{len(one)} entries", str(len(other))
    at = next(at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    first, second = shown(one[at], other[at])
    return f"entry {at} is {first}", second


def _text(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:SHOWN_DIGEST]
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    installed = {"python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
