"""The base class of config sections and the types of their values."""

import os
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, le=1)]

Scale = Annotated[float, Field(gt=0, le=1)]

Positive = Annotated[int, Field(gt=0, lt=2**63)]

NonNegative = Annotated[int, Field(ge=0, lt=2**63)]

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

HeldOut = Annotated[float, Field(gt=0, le=0.5)]

Decay = Annotated[float, Field(ge=0, lt=1)]


def _expanded(path: str) -> str:
    """With a home folder for ``~`` at the beginning, also behind ``local-dir:`` and ``hf:``.

    Raises:
        ValueError: it is empty, as where a shell's variable is not set; it would stand for the present folder.
    """
    if not path.strip():
        raise PydanticCustomError("empty", "is empty: name something, or null where the key has a default")
    scheme = next((scheme for scheme in ("local-dir:", "hf:") if path.startswith(scheme)), "")
    rest = path.removeprefix(scheme)
    # A template may begin with ~, and has {} in it.
    return path if not rest.startswith("~") or "{}" in rest else scheme + os.path.expanduser(rest)


PathText = Annotated[str, AfterValidator(_expanded)]
"""A path, or a name where one is taken too; ``~`` stands for the home folder."""


class KeyedError(ValueError):
    """A mistake at one key, found by a validator of several; the message is the complete line for the user."""

    def __init__(self, key: str, message: str) -> None:
        """Takes the dotted key and the message."""
        super().__init__(message)
        self.key = key


class Section(BaseModel):
    """Base class of config sections: strict types, unknown keys refused, docstrings as documentation."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def section_type(annotation: Any) -> type[Section] | None:
    """The section within a field's type, e.g. of ``dict[str, EvaluationSet]``; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_type(part))), None)


def sections(section: type[Section], place: str) -> Iterator[tuple[str, type[Section]]]:
    """A section and all sections within it, each with its dotted place."""
    yield place, section
    for key, field in section.model_fields.items():
        nested = section_type(field.annotation)
        if nested is not None:
            name = f"{place}.{key}".lstrip(".")
            yield from sections(nested, f"{name}.<name>" if get_origin(field.annotation) is dict else name)
