"""Chooses a fine-tuning method by whether there is a reference set."""

from collections.abc import Mapping

from dive_fast.errors import ConfigError, nearest

WITH_REFERENCE, WITHOUT_REFERENCE = "dive", "tracer"
"""The methods that docs/methods.md recommends for either case."""
KNOWN: Mapping[str, bool] = {"dive": True, "tracer": False, "flyp": False}
"""Whether common methods need a reference set; the registry has all methods, but imports torch."""
SOURCES = (
    "to be had: COCO captions (118,000 pairs), Flickr8k (8,000), CC3M by img2dataset (docs/data.md), your own"
)
"""Reference sets that can be had."""


def choose_method(name: str | None, has_reference: bool, has_classes: bool = True) -> str:
    """The value of ``objective.name``.

    Args:
        name: the method that the user wants; None: chosen here.
        has_reference: whether there is a reference set.
        has_classes: whether the target's images have classes.

    Raises:
        ConfigError: no such method; it needs a reference set or classes and there are none; or it would not use
            the reference set.
    """
    if name is None:
        return WITH_REFERENCE if has_reference else WITHOUT_REFERENCE
    needs_reference = KNOWN.get(name)
    if needs_reference is None:
        needs_reference = _needs_reference(name, has_classes)
    if needs_reference and not has_reference:
        raise ConfigError(
            f"--method {name} needs a reference set: name one by --reference, or use a method without, e.g. "
            f"--method {WITHOUT_REFERENCE}"
        )
    if has_reference and not needs_reference:
        raise ConfigError(
            f"--method {name} uses no reference set: remove --reference, or use --method {WITH_REFERENCE}"
        )
    return name


def _needs_reference(name: str, has_classes: bool) -> bool:
    from dive_fast.config.schema import ObjectiveConfig
    from dive_fast.methods import registry  # imports torch

    methods = list(registry.table().presets)
    if name not in methods:
        raise ConfigError(f"--method {name}: no such method (valid: {', '.join(methods)}){nearest(name, methods)}")
    needs = registry.needs(ObjectiveConfig(name=name))
    if needs.classes and not has_classes:
        raise ConfigError(f"--method {name} needs classes, and the target has prompts alone: use class folders")
    return needs.reference
