"""Class names and templates of known data sets: CLIP-benchmark's, CLIP's for UCF-101, WiSE-FT's for WILDS."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dive_fast.data.prompt_files import Template, read_class_names, read_templates
from dive_fast.errors import DataError
from dive_fast.io.safe_read import read_text

_VIEWS = ("satellite", "aerial")
_REGIONS = ("asia", "africa", "the americas", "europe", "oceania")
EXTRA_TEMPLATES: dict[str, tuple[str, ...]] = {
    # WiSE-FT's, which FLYP and the paper's baselines use. <a> stands for the article and the name as words.
    "iwildcam": ("a photo of {}.", "{} in the wild."),
    "fmow": (
        *(f"{view} photo of a {{}}." for view in _VIEWS),
        *(f"{view} photo of <a>." for view in _VIEWS),
        *(f"{view} photo of a {{}} in {region}." for region in _REGIONS for view in _VIEWS),
        "a photo of a {}.",
        "{}.",
    ),
    # CLIP's 48 for UCF-101; CLIP-benchmark has none.
    "ucf101": tuple(
        f"a {medium} of {person} {verb}{{}}."
        for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
        for person in ("a person", "the person")
        for medium in ("photo", "video", "example", "demonstration")
    ),
}
CLIP_BENCHMARK_TEMPLATES = (
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


OWN_NAMES = ("caltech101", "eurosat", "flowers", "pets")
"""Data sets whose class names CLIP-benchmark has."""


def has_own_names(name: str) -> bool:
    """Whether class names are chosen by the name of a data set, and not by a file."""
    return name in ("imagenet1k", *OWN_NAMES)


def has_own_templates(name: str) -> bool:
    """Whether templates are chosen by the name of a data set, and not by a file."""
    return name in CLIP_BENCHMARK_TEMPLATES or name in EXTRA_TEMPLATES


def templates_of(name: str) -> tuple[Template, ...]:
    """Templates by a data set's name, or whatever :func:`dive_fast.data.prompt_files.read_templates` accepts.

    Raises:
        DataError: the file is missing or invalid, or CLIP-benchmark is not installed.
    """
    if name == "imagenet1k":
        return read_templates("imagenet")
    lines = EXTRA_TEMPLATES.get(name)
    if name in CLIP_BENCHMARK_TEMPLATES:
        lines = _from_clip_benchmark("templates", name)
    return read_templates(name) if lines is None else tuple(DatasetTemplate(line) for line in lines)


def class_names_of(name: str) -> tuple[str, ...]:
    """Class names by a data set's name, or whatever :func:`dive_fast.data.prompt_files.read_class_names` accepts.

    Raises:
        DataError: the file is missing or invalid, or CLIP-benchmark is not installed.
    """
    if name == "imagenet1k":
        return read_class_names("imagenet")
    if name not in OWN_NAMES:
        return read_class_names(name)
    names = _from_clip_benchmark("class names", name)
    # The first is Caltech's background class, whose images are not measured.
    return names[1:] if name == "caltech101" else names


class DatasetTemplate(Template):
    """Template of a known data set: ``{}`` or ``{c}`` is the name, ``<a>`` an article and the name as words."""

    def __init__(self, template: str) -> None:
        super().__init__(template.replace("{c}", "{}"))

    def __call__(self, class_name: str) -> str:
        if "<a>" in self.template:
            words = class_name.replace("_", " ")
            return self.template.replace("<a>", f"{'an' if words[:1] in set('aeiou') else 'a'} {words}")
        return super().__call__(class_name)


def read_lines(path: Path) -> tuple[str, ...]:
    """Non-empty lines of a text file, stripped.

    Raises:
        DataError: the file cannot be read, or has no such line.
    """
    try:
        lines = read_text(path, "utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
    stripped = tuple(line.strip() for line in lines if line.strip())
    if not stripped:
        raise DataError(f"{path}: the file is empty")
    return stripped


def _from_clip_benchmark(kind: Literal["templates", "class names"], name: str) -> tuple[str, ...]:
    file = "en_classnames.json" if kind == "class names" else "en_zeroshot_classification_templates.json"
    texts: list[str] = _read_package_json(file, f"the {kind} of {name}")[name]
    return tuple(texts)


@cache
def _read_package_json(file: str, wanted: str) -> dict[str, Any]:
    """A JSON file of the clip_benchmark package, which is read without being imported.

    Args:
        wanted: what is read from it, for messages.
    """
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"{wanted} are CLIP-benchmark's: pip install clip-benchmark, or set class_names and templates to files"
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / file
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read {wanted}: {error}; reinstall clip-benchmark") from error
    return content
