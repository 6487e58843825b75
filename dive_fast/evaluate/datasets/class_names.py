"""Class names and templates by the name of a data set: CLIP-benchmark's, and those that WiSE-FT has for WILDS."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dive_fast.data.prompts import Template, read_class_names, read_templates
from dive_fast.errors import DataError
from dive_fast.io.safe_read import read_text

_VIEWS = ("satellite", "aerial")
_PLACES = ("asia", "africa", "the americas", "europe", "oceania")
OWN: dict[str, tuple[str, ...]] = {
    # WiSE-FT's, which FLYP and the paper's baselines use. <a> is the article and the name as words.
    "iwildcam": ("a photo of {}.", "{} in the wild."),
    "fmow": (
        *(f"{view} photo of a {{}}." for view in _VIEWS),
        *(f"{view} photo of <a>." for view in _VIEWS),
        *(f"{view} photo of a {{}} in {place}." for place in _PLACES for view in _VIEWS),
        "a photo of a {}.",
        "{}.",
    ),
    # CLIP's 48 for UCF-101, which CLIP-benchmark does not have.
    "ucf101": tuple(
        f"a {medium} of {who} {verb}{{}}."
        for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
        for who in ("a person", "the person")
        for medium in ("photo", "video", "example", "demonstration")
    ),
}
CLIP_BENCHMARK = (
    "caltech101",
    "cars",
    "dtd",
    "eurosat",
    "fgvc_aircraft",
    "flowers",
    "food101",
    "imagenet1k",
    "pets",
    "sun397",
)


def templates_of(name: str) -> tuple[Template, ...]:
    """Templates by a data set's name, or as :func:`dive_fast.data.prompts.read_templates` has them.

    Raises:
        DataError: they cannot be had.
    """
    if name == "imagenet1k":
        return read_templates("imagenet")
    lines = OWN.get(name) or (_clip_benchmark("templates", name) if name in CLIP_BENCHMARK else None)
    return read_templates(name) if lines is None else tuple(DatasetTemplate(line) for line in lines)


def class_names_of(name: str) -> tuple[str, ...]:
    """Class names by a data set's name, or as :func:`dive_fast.data.prompts.read_class_names` has them.

    Raises:
        DataError: they cannot be had.
    """
    if name == "imagenet1k":
        return read_class_names("imagenet")
    if name not in ("caltech101", "eurosat", "flowers", "pets"):
        return read_class_names(name)
    names = _clip_benchmark("class names", name)
    # Its first class holds pictures of anything, and is none here.
    return names[1:] if name == "caltech101" else names


class DatasetTemplate(Template):
    """A template of a known data set: ``{c}`` is the name too, as in CLIP-benchmark, ``<a>`` adds an article."""

    def __init__(self, template: str) -> None:
        super().__init__(template.replace("{c}", "{}"))

    def __call__(self, class_name: str) -> str:
        if "<a>" in self.template:
            words = class_name.replace("_", " ")
            return self.template.replace("<a>", f"{'an' if words[:1] in set('aeiou') else 'a'} {words}")
        return super().__call__(class_name)


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        lines = read_text(path, "utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise DataError(f"{path}: it is empty")
    return found


def _clip_benchmark(what: Literal["templates", "class names"], name: str) -> tuple[str, ...]:
    file = "en_classnames.json" if what == "class names" else "en_zeroshot_classification_templates.json"
    found: list[str] = _data(file, f"the {what} of {name}")[name]
    return tuple(found)


@cache
def _data(file: str, what: str) -> dict[str, Any]:
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"{what} are CLIP-benchmark's: pip install clip-benchmark, or name files of your own as class_names "
            "and templates"
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / file
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read {what}: {error}; reinstall clip-benchmark") from error
    return found
