"""ImageNet and its shifted copies: which folder is which of the 1000 classes.

The lists of classes are timm's, which open_clip brings; ObjectNet's map comes with every copy of it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dive_fast.data.classes import repeated, synsets
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError
from dive_fast.evaluate.classifier import Members
from dive_fast.evaluate.datasets.layouts import complete
from dive_fast.io.safe_read import parse_json, read_text

OBJECTNET_BORDER = 2
"""Pixels; its README asks that the red edge be cut off."""
__all__ = ["classes_of", "open_numbered_folders", "open_objectnet", "open_wnid_folders", "synsets"]
MAPPINGS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)


def classes_of(subset: str) -> tuple[int, ...]:
    """Which of the 1000 classes the subset's are, in the order of its labels."""
    place = {wnid: row for row, wnid in enumerate(synsets())}
    return tuple(place[wnid] for wnid in synsets(subset))


def open_wnid_folders(path: Path, subset: str = "") -> Source:
    """One folder a class, called by its WordNet id.

    Raises:
        DataError: a folder is missing, is none of the subset's, or is empty.
    """
    wanted = synsets(subset)
    found = _folders(path)
    _hold_to(path, found, wanted, f"{len(wanted)} folders named by WordNet id")
    # Both are sorted, so a folder's place is its label.
    return complete(open_folder(str(path)), path)


def open_numbered_folders(path: Path) -> Source:
    """ImageNetV2's: one folder a class, called 0 to 999. As text, 10 would come before 2.

    Raises:
        DataError: a folder is missing, is no such number, or is empty.
    """
    found = _folders(path)
    _hold_to(path, found, tuple(str(label) for label in range(1000)), "folders 0 to 999")
    source = complete(open_folder(str(path)), path)
    return _relabelled(source, [int(name) for name in source.class_names])


def open_objectnet(images: Path, mappings: Path) -> tuple[Source, Members, tuple[str, ...]]:
    """ObjectNet's images of the classes that ImageNet has too.

    Args:
        mappings: the folder of the map's four files.

    Returns:
        The images; for each label, the ImageNet classes that stand for it; and the labels' names.

    Raises:
        DataError: the map or a folder is missing, or they do not fit.
    """
    maps: dict[str, Any] = {}
    for file in MAPPINGS:
        try:
            text = read_text(mappings / file)
            maps[file] = parse_json(text) if file.endswith(".json") else text.splitlines()
        except (OSError, ValueError) as error:
            raise DataError(
                f"{mappings / file}: cannot read ObjectNet's map to ImageNet: {error}; every copy has mappings/"
            ) from error
    folder_to_name, name_to_imagenet, own_ids, labels = (maps[file] for file in MAPPINGS)
    try:
        class_of_id = {int(own): int(row) for row, own in own_ids.items()}
        named = [(label.strip(), class_of_id[row]) for row, label in enumerate(labels) if label.strip()]
        # Two classes are called "crane"; ObjectNet has neither.
        twice = repeated([name for name, _ in named])
        class_of = {name: row for name, row in named if name not in twice}
        folder_of = {name: folder for folder, name in folder_to_name.items()}
        if len(folder_of) < len(folder_to_name):
            raise KeyError(f"one folder for {next(iter(repeated(list(folder_to_name.values()))))!r}")
        by_folder = {
            folder_of[name]: (name, tuple(class_of[label.strip()] for label in joined.split(";")))
            for name, joined in name_to_imagenet.items()
        }
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{mappings}: ObjectNet's map does not fit together: {error!r} is not found") from error
    wanted = sorted(by_folder)
    missing = [folder for folder in wanted if not (images / folder).is_dir()]
    if missing:
        raise DataError(f"{images}: {len(missing)} of {len(wanted)} class folders are missing, e.g. {missing[0]}")
    source = complete(open_folder(str(images)), images)
    place = {folder: label for label, folder in enumerate(wanted)}
    source = _relabelled(source, [place.get(folder, -1) for folder in source.class_names])
    return source, tuple(by_folder[folder][1] for folder in wanted), tuple(by_folder[f][0].lower() for f in wanted)


def _folders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: cannot list its folders: {error}") from error


def _hold_to(path: Path, found: list[str], wanted: tuple[str, ...], what: str) -> None:
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or surplus:
        wrong = f"{len(missing)} are missing, e.g. {missing[0]}" if missing else f"{surplus[0]} is none of them"
        raise DataError(f"{path}: expected {what}: {wrong}")


def _relabelled(source: Source, labels: list[int]) -> Source:
    """With ``labels`` in the place of the folders' numbers; samples of label -1 are left out."""
    samples = [replace(sample, label=labels[sample.label]) for sample in source.samples]
    return Source([sample for sample in samples if sample.label >= 0])
