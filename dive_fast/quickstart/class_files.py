"""The class names of a target and of its splits, and the files that they are written to."""

from pathlib import Path
from typing import NamedTuple

from dive_fast.errors import DataError
from dive_fast.quickstart.inspect_data import CLASS_FILES, LabelledSet, Target
from dive_fast.quickstart.prompt_names import PromptNames, class_file_text, prompt_names


class ClassFiles(NamedTuple):
    """Class names, and the files of a config that hold them."""

    names: PromptNames
    """Of the training set."""
    path_of: dict[str, str]
    """The file of each set: ``train``, ``val`` and ``test``, as far as they exist."""
    texts: dict[Path, str]
    """The content of each file."""


def class_files(target: Target, class_names: str | None, output: Path) -> ClassFiles:
    """The class names of a target with classes.

    Args:
        class_names: the user's list, ``imagenet`` or a file; None: names from the class folders.
        output: the config, next to which the files are written.

    Raises:
        DataError: the classes have no names, or the user's list does not fit them.
    """
    names = _train_names(target, class_names)
    path = Path(f"{output.with_suffix('')}_classes.txt")
    files = ClassFiles(names, {"train": str(path)}, {path: class_file_text(names.names)})
    folders = target.train.source.class_names
    name_of = dict(zip(folders, names.names, strict=True)) if folders else {}
    for split, data in (("val", target.val), ("test", target.test)):
        if data is None:
            continue
        if data.source.class_names in (folders, ()):
            _require_names(data, names.names)
            files.path_of[split] = str(path)
        else:
            split_file = Path(f"{output.with_suffix('')}_{split}_classes.txt")
            cleaned = prompt_names(data.source.class_names).names
            listed = [
                name_of.get(folder, name) for folder, name in zip(data.source.class_names, cleaned, strict=True)
            ]
            files.path_of[split], files.texts[split_file] = str(split_file), class_file_text(listed)
    return files


def _train_names(target: Target, class_names: str | None) -> PromptNames:
    source = target.train.source
    if class_names is None and target.class_file is not None:
        class_names = str(target.class_file)
    if class_names is not None:
        from dive_fast.data.classes import join_names  # imports torch
        from dive_fast.data.prompt_files import read_class_names

        return PromptNames(join_names(source, read_class_names(class_names), class_names), ())
    if not source.class_names:
        count = len(target.train.class_sizes())
        raise DataError(
            f"{target.train.path}: labels 0 to {count - 1}, without names: list one a line, in label order, "
            f"in {CLASS_FILES[0]} next to the tars, or name such a file (or imagenet) by --class-names"
        )
    return prompt_names(source.class_names)


def _require_names(data: LabelledSet, names: tuple[str, ...]) -> None:
    if (count := len(data.class_sizes())) > len(names):
        raise DataError(f"{data.path}: label {count - 1}, but the training set has {len(names)} classes")
