"""Opens known data sets whose layout or label map is their own."""

from dataclasses import replace
from pathlib import Path

from dive_fast.evaluate.datasets import imagenet, layouts, wilds
from dive_fast.evaluate.datasets.class_names import DatasetTemplate, class_names_of
from dive_fast.evaluate.datasets.evaluation_set import Captioned, Labelled

MIN_EQUAL_NAMES = 0.9
"""Share of class names that must be open_clip's for tars to count as ImageNet's classes in their usual order."""


def open_tars(root: Path) -> Labelled | None:
    found = layouts.webdataset(root)
    if found is None:
        return None
    source, names, templates = found
    return Labelled(source, names, tuple(DatasetTemplate(line) for line in templates), layout="webdataset")


def open_simple(root: Path, ways: dict[str, layouts.Layout]) -> Labelled | None:
    """The first layout that knows the folder; CLIP-benchmark's tars before all."""
    if (found := open_tars(root)) is not None:
        return found
    for name, layout in ways.items():
        if (named := layout(root)) is not None:
            return Labelled(*named, templates=(), layout=name)
    return None


def open_imagenet_tars(root: Path, subset: str = "") -> Labelled | None:
    """CLIP-benchmark's tars of ImageNet or one of its shifts; their labels count the classes as folders would."""
    found = open_tars(root)
    return None if found is None else replace(found, imagenet_rows=_checked_rows(found.class_names, subset))


def _checked_rows(names: tuple[str, ...], subset: str) -> tuple[int, ...] | None:
    """ImageNet's numbers of a subset's classes, if the names are in that order; a few have changed over time."""
    rows, thousand = imagenet.classes_of(subset), class_names_of("imagenet1k")
    equal = sum(name == thousand[row] for name, row in zip(names, rows, strict=False))
    return rows if len(names) == len(rows) and equal >= MIN_EQUAL_NAMES * len(rows) else None


def open_wordnet_folders(root: Path, subset: str, inside: tuple[str, ...]) -> Labelled | None:
    if (found := open_imagenet_tars(root, subset)) is not None:
        return found
    folder = next((root / name for name in (*inside, "") if _has_folder(root / name, "n")), None)
    if folder is None:
        return None
    names = class_names_of("imagenet1k")
    source = imagenet.open_wnid_folders(folder, subset)
    rows = imagenet.classes_of(subset)
    return Labelled(source, tuple(names[row] for row in rows), (), layout="folders", imagenet_rows=rows)


def open_imagenet_v2(root: Path) -> Labelled | None:
    if (found := open_imagenet_tars(root)) is not None:
        return found
    inside = ("ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val", "test", "")
    folder = next((root / name for name in inside if _has_folder(root / name, "0123456789")), None)
    if folder is None:
        return None
    source, names = imagenet.open_numbered_folders(folder), class_names_of("imagenet1k")
    return Labelled(source, names, (), layout="folders", imagenet_rows=imagenet.classes_of(""))


def open_objectnet_set(root: Path) -> Labelled | None:
    if (found := open_tars(root)) is not None:
        return replace(found, border=imagenet.OBJECTNET_BORDER)
    for base in (root, root / "objectnet-1.0"):
        if (base / "images").is_dir():
            mapping = next(
                (m for m in (base / "mappings", base, root) if (m / imagenet.MAPPINGS[0]).is_file()), None
            )
            source, members, _ = imagenet.open_objectnet(base / "images", mapping or base / "mappings")
            names = class_names_of("imagenet1k")
            return Labelled(
                source,
                names,
                (),
                members=members,
                border=imagenet.OBJECTNET_BORDER,
                layout="folders",
                imagenet_rows=imagenet.classes_of(""),
            )
    return None


def open_iwildcam_split(root: Path, split: str) -> Labelled | None:
    for base in (root, root / "iwildcam_v2.0"):
        if (base / "metadata.csv").is_file():
            return Labelled(*wilds.open_iwildcam(base, split), (), layout="wilds")
    return None


def open_fmow_split(root: Path, split: str) -> Labelled | None:
    for base in (root, root / "fmow_v1.1"):
        if (base / "rgb_metadata.csv").is_file():
            source, names, regions = wilds.open_fmow(base, split)
            return Labelled(source, names, (), regions=regions, layout="wilds")
    return None


def open_caption_set(root: Path, name: str) -> Captioned | None:
    return layouts.karpathy(root, name) or layouts.webdataset_captions(root)


def _has_folder(folder: Path, first: str) -> bool:
    """Whether a folder there begins with one of these letters and a digit, as WordNet ids and numbers do."""
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return any(name[:1] in first and (name[1:].isdigit() or name.isdigit()) for name in names if name)


def open_caltech(root: Path) -> layouts.Named | None:
    for folder in ("101_ObjectCategories", "caltech101/101_ObjectCategories"):
        if (root / folder).is_dir():
            without = ("BACKGROUND_Google",)
            return layouts.class_folders(root / folder, names="caltech101", without=without)
    return None


def open_eurosat(root: Path) -> layouts.Named | None:
    for folder in ("2750", "eurosat/2750"):
        if (root / folder).is_dir():
            return layouts.class_folders(root / folder, names="eurosat")
    return None
