"""Quick checks before torch is imported, a model is built and any data set is opened.

A typing error is therefore reported within a second, instead of after minutes in which a large set is scanned.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from dive_fast.config.schema import Config, EvaluationSet
from dive_fast.data.data_paths import check_data, check_loader, check_names, check_path
from dive_fast.errors import ConfigError, naming
from dive_fast.evaluation.datasets.catalog import candidate_folders, find_dataset, open_known
from dive_fast.evaluation.datasets.class_names import has_own_names, has_own_templates
from dive_fast.model.model_names import check_name

MODEL = "model.safetensors"
"""Name of the exported weights in a run folder."""
PROMPTS = "prompts.safetensors"
"""Name of learned prompts in a run folder, which has no exported weights then."""


def find_weights(weights: Path | None, option: str, run: Path) -> Path:
    """The checkpoint that a command uses: the value of its option, by default the run's exported weights.

    Args:
        weights: value of the option; None if it is not set.
        option: name of the option, for messages, e.g. ``--weights``.

    Raises:
        ConfigError: the file or folder does not exist.
    """
    if weights is not None:
        if not weights.exists():
            raise ConfigError(f"{option} {weights}: no such file or folder")
        return weights
    exported = run / MODEL
    if not exported.is_file() and (run / PROMPTS).is_file():
        raise ConfigError(f"{run} has learned prompts and no weights of its own; this command needs weights")
    if not exported.is_file():
        raise ConfigError(f"{exported} is missing: train first, or name other weights by {option}")
    return exported


def find_prompts(path: Path, option: str) -> Path:
    """The file of learned prompts at a path, or in the run folder there.

    Args:
        option: name of the option, for messages, e.g. ``--prompts``.

    Raises:
        ConfigError: it does not exist.
    """
    file = path / PROMPTS if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{option} {path}: no such file" + (f" as {PROMPTS} in it" if path.is_dir() else ""))
    return file


def check_output(folder: Path) -> None:
    """Checks that results can be written to a folder, which need not exist yet; creates nothing.

    Raises:
        ConfigError: the folder, or its nearest existing parent, is not a folder or not writable.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{folder}: results cannot be written there: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: results cannot be written there: no permission to write to {existing}")


def check_training(config: Config) -> None:
    """Checks everything small that a training run reads: the model's name, evaluation sets, files and paths.

    Raises:
        ConfigError, DataError: names the key and what is wrong with it.
    """
    check_name(config.model)
    check_sets(config.evaluate.sets)
    check_data(config.data)
    if config.evaluate.geometry is not None:
        check_path(config.evaluate.geometry, "evaluate.geometry")


def check_reference(config: Config) -> None:
    """Checks the model's name, and packages and path of ``data.reference`` if there is one.

    Raises:
        ConfigError, DataError: as :func:`check_training`.
    """
    check_name(config.model)
    if config.data.reference is not None:
        check_loader(config.data.reference, "data.reference")
        check_path(config.data.reference, "data.reference")


def check_tuned(config: Config, run: Path, weights: Path | None, output: Path | None) -> None:
    """Checks what a command on a run's weights reads and writes: model, evaluation sets, weights, output folder.

    Args:
        run: the run folder, which both default to.
        weights, output: values of ``--weights`` and ``--output``.

    Raises:
        ConfigError, DataError: as :func:`find_weights`, :func:`check_output` and :func:`check_training`.
    """
    find_weights(weights, "--weights", run)
    check_output(output or run)
    check_name(config.model)
    check_sets(config.evaluate.sets)


def check_sets(
    sets: Mapping[str, EvaluationSet], place: str = "evaluate.sets", skips_missing: bool = False
) -> None:
    """Checks names, paths, class names and templates of evaluation sets.

    Args:
        place: config section of the sets, for messages; empty where they are not those of a config.
        skips_missing: whether sets without files are left out later.

    Raises:
        ConfigError: no data set is known by a name.
        DataError: a path or a file is missing, or a file is invalid.
    """
    for name, config in sets.items():
        section = place and f"{place}.{name}"
        if config.dataset is not None:
            with naming(section and f"{section}.dataset"):
                find_dataset(config.dataset)
        class_names, templates = config.class_names, config.templates
        check_names(
            None if class_names is None or has_own_names(class_names) else class_names,
            None if templates is None or has_own_templates(templates) else templates,
            section,
        )
    for name, config in sets.items():
        if not skips_missing:
            _check_files(config, place and f"{place}.{name}")


def _check_files(config: EvaluationSet, section: str) -> None:
    if config.dataset is None:
        check_path(config, section)
    elif not any(folder.is_dir() for folder in candidate_folders(config.dataset, config.path)):
        with naming(section):
            open_known(config.dataset, config.path)  # fails at once, with the accepted layouts
