"""ImageNet and its shifts: the mapping of folders to the 1000 classes.

Class lists come from timm, a dependency of open_clip; ObjectNet's map is part of the data set.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.data.classes import repeated, synsets
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.source import Source
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.layouts import complete, relabelled
from dive_fast.io.safe_read import parse_json, read_text

if TYPE_CHECKING:
    from dive_fast.evaluation.classifier import Members

OBJECTNET_BORDER = 2
"""Pixels; ObjectNet's README asks that the red edge be cut off."""
MAPPINGS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)


def classes_of(subset: str) -> tuple[int, ...]:
    """ImageNet's class numbers (0 to 999) of a subset's classes, in the order of its labels."""
    row_of = {wnid: row for row, wnid in enumerate(synsets())}
    return tuple(row_of[wnid] for wnid in synsets(subset))


def open_wnid_folders(path: Path, subset: str = "") -> Source:
    """Opens class folders named by WordNet id.

    Raises:
        DataError: a folder is missing, empty, or not a class of the subset.
    """
    expected = synsets(subset)
    _validate_folders(path, expected, f"{len(expected)} folders named by WordNet id")
    # Both are sorted, so a folder's index is its label.
    return complete(open_folder(str(path)), path)


def open_numbered_folders(path: Path) -> Source:
    """Opens ImageNetV2's class folders, named 0 to 999; labels are these numbers, not the order of the names.

    Raises:
        DataError: a folder is missing, empty, or not such a number.
    """
    _validate_folders(path, tuple(str(label) for label in range(1000)), "folders 0 to 999")
    source = complete(open_folder(str(path)), path)
    return relabelled(source, [int(name) for name in source.class_names])


def open_objectnet(images: Path, mappings: Path) -> "tuple[Source, Members, tuple[str, ...]]":
    """Opens ObjectNet's images of the classes that ImageNet has as well.

    Args:
        mappings: the folder of the four files in :data:`MAPPINGS`.

    Returns:
        The images; for each label, the ImageNet classes that count as it; and the names of the labels.

    Raises:
        DataError: the map or a folder is missing, or the files contradict each other.
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
    folder_to_name, name_to_imagenet, ids_of_2012, labels = (maps[file] for file in MAPPINGS)
    try:
        class_of_id = {int(number): int(row) for row, number in ids_of_2012.items()}
        named = [(label.strip(), class_of_id[row]) for row, label in enumerate(labels) if label.strip()]
        # Two ImageNet classes are called "crane"; ObjectNet has neither.
        duplicates = repeated([name for name, _ in named])
        class_of = {name: row for name, row in named if name not in duplicates}
        folder_of = {name: folder for folder, name in folder_to_name.items()}
        if len(folder_of) < len(folder_to_name):
            duplicate = next(iter(repeated(list(folder_to_name.values()))))
            raise ValueError(f"two folders are called {duplicate!r}")
        by_folder = {
            folder_of[name]: (name, tuple(class_of[label.strip()] for label in joined.split(";")))
            for name, joined in name_to_imagenet.items()
        }
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{mappings}: ObjectNet's map is inconsistent: {error!r}") from error
    folders = sorted(by_folder)
    missing = [folder for folder in folders if not (images / folder).is_dir()]
    if missing:
        raise DataError(f"{images}: {len(missing)} of {len(folders)} class folders are missing, e.g. {missing[0]}")
    source = complete(open_folder(str(images)), images)
    label_of = {folder: label for label, folder in enumerate(folders)}
    source = relabelled(source, [label_of.get(folder, -1) for folder in source.class_names])
    members = tuple(by_folder[folder][1] for folder in folders)
    return source, members, tuple(by_folder[folder][0].lower() for folder in folders)


def _validate_folders(path: Path, expected: tuple[str, ...], description: str) -> None:
    try:
        folders = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise DataError(f"{path}: cannot list its folders: {error}") from error
    missing, unknown = sorted(set(expected) - folders), sorted(folders - set(expected))
    if missing or unknown:
        problem = (
            f"{len(missing)} are missing, e.g. {missing[0]}" if missing else f"{unknown[0]} is not one of them"
        )
        raise DataError(f"{path}: expected {description}: {problem}")
