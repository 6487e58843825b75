"""Openers of known data sets: each tries the layouts of one data set; None if the folder has none of them."""

from dataclasses import replace
from pathlib import Path

from dive_fast.evaluation.datasets import imagenet, layouts, wilds
from dive_fast.evaluation.datasets.class_names import DatasetTemplate, class_names_of
from dive_fast.evaluation.datasets.evaluation_set import Captioned, Labelled

MIN_EQUAL_NAMES = 0.9
"""Share of class names that must be open_clip's for tars to count as ImageNet's classes in their usual order."""


def open_tars(root: Path) -> Labelled | None:
    """A classification set in CLIP-benchmark's tars."""
    opened = layouts.webdataset(root)
    if opened is None:
        return None
    source, names, templates = opened
    return Labelled(source, names, tuple(DatasetTemplate(line) for line in templates), layout="webdataset")


def open_first_layout(root: Path, openers: dict[str, layouts.Layout]) -> Labelled | None:
    """The set in the first layout that matches the folder; CLIP-benchmark's tars are tried first."""
    if (data := open_tars(root)) is not None:
        return data
    for name, layout in openers.items():
        if (named := layout(root)) is not None:
            return Labelled(*named, templates=(), layout=name)
    return None


def open_imagenet_tars(root: Path, subset: str = "") -> Labelled | None:
    """CLIP-benchmark's tars of ImageNet or one of its shifts, whose labels are in the order of WordNet ids."""
    data = open_tars(root)
    return None if data is None else replace(data, imagenet_rows=_checked_rows(data.class_names, subset))


def _checked_rows(names: tuple[str, ...], subset: str) -> tuple[int, ...] | None:
    """ImageNet's class numbers of a subset, if the names are in that order; a few names have changed over time."""
    rows, imagenet_names = imagenet.classes_of(subset), class_names_of("imagenet1k")
    equal = sum(name == imagenet_names[row] for name, row in zip(names, rows, strict=False))
    return rows if len(names) == len(rows) and equal >= MIN_EQUAL_NAMES * len(rows) else None


def open_wordnet_folders(root: Path, subset: str, inside: tuple[str, ...]) -> Labelled | None:
    """ImageNet or one of its subsets: tars, or class folders named by WordNet id, perhaps below ``inside``."""
    if (data := open_imagenet_tars(root, subset)) is not None:
        return data
    folder = next((root / name for name in (*inside, "") if _has_folder(root / name, "n")), None)
    if folder is None:
        return None
    names = class_names_of("imagenet1k")
    source = imagenet.open_wnid_folders(folder, subset)
    rows = imagenet.classes_of(subset)
    return Labelled(source, tuple(names[row] for row in rows), (), layout="folders", imagenet_rows=rows)


def open_imagenet_v2(root: Path) -> Labelled | None:
    """ImageNet-V2: tars, or class folders 0 to 999."""
    if (data := open_imagenet_tars(root)) is not None:
        return data
    inside = ("ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val", "test", "")
    folder = next((root / name for name in inside if _has_folder(root / name, "0123456789")), None)
    if folder is None:
        return None
    source, names = imagenet.open_numbered_folders(folder), class_names_of("imagenet1k")
    return Labelled(source, names, (), layout="folders", imagenet_rows=imagenet.classes_of(""))


def open_objectnet(root: Path) -> Labelled | None:
    """ObjectNet: tars, whose 113 names are the prompts, or folders with a map to ImageNet's classes."""
    if (data := open_tars(root)) is not None:
        return replace(data, border=imagenet.OBJECTNET_BORDER)
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
    """One split of iWildCam in WILDS' layout."""
    for base in (root, root / "iwildcam_v2.0"):
        if (base / "metadata.csv").is_file():
            return Labelled(*wilds.open_iwildcam(base, split), (), layout="wilds")
    return None


def open_fmow_split(root: Path, split: str) -> Labelled | None:
    """One split of FMoW in WILDS' layout."""
    for base in (root, root / "fmow_v1.1"):
        if (base / "rgb_metadata.csv").is_file():
            source, names, regions = wilds.open_fmow(base, split)
            return Labelled(source, names, (), regions=regions, layout="wilds")
    return None


def open_caption_set(root: Path, name: str) -> Captioned | None:
    """A retrieval set: Karpathy's test split, or CLIP-benchmark's tars with captions."""
    return layouts.karpathy(root, name) or layouts.webdataset_captions(root)


def _has_folder(folder: Path, initials: str) -> bool:
    """Whether a subfolder starts with one of the initials and is otherwise a number: a WordNet id or 0 to 999."""
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return any(name[:1] in initials and (name[1:].isdigit() or name.isdigit()) for name in names if name)


def open_caltech(root: Path) -> layouts.Named | None:
    """Caltech-101 in torchvision's layout, without its background class."""
    for folder in ("101_ObjectCategories", "caltech101/101_ObjectCategories"):
        if (root / folder).is_dir():
            exclude = ("BACKGROUND_Google",)
            return layouts.class_folders(root / folder, names="caltech101", exclude=exclude)
    return None


def open_eurosat(root: Path) -> layouts.Named | None:
    """EuroSAT in torchvision's layout."""
    for folder in ("2750", "eurosat/2750"):
        if (root / folder).is_dir():
            return layouts.class_folders(root / folder, names="eurosat")
    return None
