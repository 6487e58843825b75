"""Quick checks of a data section: its files and packages are there. Opens no set, and imports no torch.

Opening a set of millions takes minutes; these checks are made for all sections before the first one is opened.
"""

import glob
from importlib.util import find_spec
from pathlib import Path

import braceexpand

from dive_fast.config.schema import DataConfig, EvaluationSet, GeometryConfig, ReferenceConfig, TargetConfig
from dive_fast.data.prompt_files import check_class_names, check_templates
from dive_fast.data.sources.huggingface import is_dataset
from dive_fast.data.sources.object_store import is_url
from dive_fast.data.sources.source import locate
from dive_fast.errors import DataError, naming

Section = TargetConfig | ReferenceConfig | EvaluationSet | GeometryConfig
"""A config section that names a set by ``format`` and ``path``."""
DEMO = "demo:"
"""Prefix of paths in the embedded demo, which is generated when it is opened."""


def check_data(data: DataConfig) -> None:
    """Checks paths, files of class names and templates, and packages of loaders of both halves.

    Raises:
        DataError: names the key and what is missing.
    """
    sections: dict[str, TargetConfig | ReferenceConfig | None] = {
        "data.target": data.target,
        "data.reference": data.reference,
    }
    check_names(data.target.class_names, data.target.templates, "data.target")
    for name, section in sections.items():
        if section is not None:
            check_loader(section, name)
            check_path(section, name)


def check_names(class_names: str | None, templates: str | None, section: str) -> None:
    """Reads the files of class names and templates of a section; skips the lists that open_clip brings.

    Raises:
        DataError: a file is missing or invalid.
    """
    if class_names is not None:
        with naming(section and f"{section}.class_names"):
            check_class_names(class_names)
    if templates is not None:
        check_templates(templates, section and f"{section}.templates")


def check_loader(config: TargetConfig | ReferenceConfig, section: str) -> None:
    """Checks that the packages of a section's loader and format are installed.

    Raises:
        DataError: one is not; names it.
    """
    if config.loader == "dali" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        raise DataError(f"{section}.loader = dali: DALI is not installed: pip install nvidia-dali-cuda130")
    if config.loader == "ffcv" and not find_spec("ffcv"):
        raise DataError(
            f"{section}.loader = ffcv: FFCV is not installed: apt-get install libopencv-dev libturbojpeg0-dev "
            "pkg-config, then pip install --no-build-isolation ffcv"
        )


def check_path(config: Section, section: str) -> None:
    """Checks that there are files at the path of a section.

    Raises:
        DataError: there are none; the message is that of opening the set.
    """
    is_stream = isinstance(config, ReferenceConfig) and config.order == "stream"
    if is_url(config.path):
        if is_stream:
            return  # listed when the run starts, which needs the store's packages and credentials
    elif config.path.startswith(DEMO) or _has_files(config):
        return
    from dive_fast.data import open_dataset

    # Fails at once: there is nothing to scan.
    if isinstance(config, ReferenceConfig) and is_stream:
        open_dataset.open_stream(config)
    elif isinstance(config, TargetConfig):
        open_dataset.open_target(config, section)
    elif isinstance(config, EvaluationSet):
        # Questions are opened as the pairs of their texts: their file is missing.
        has_texts = config.task != "classification"
        with naming(section):
            (open_dataset.open_captioned if has_texts else open_dataset.open_target)(config)
    else:
        open_dataset.open_reference(config, section)


def _has_files(config: Section) -> bool:
    """Whether a section's path exists: folder, table, manifest, or first and last tar of a range."""
    path = locate(config.path)
    if config.format in ("csv", "vqa"):
        return path.is_file()
    if config.format == "prepared":
        return (path / "manifest.json").is_file()
    if path.is_dir():
        return True
    if config.format != "webdataset":
        return False
    try:
        tars = list(braceexpand.braceexpand(config.path))
    except ValueError:
        return False
    return all(Path(tar).is_file() or bool(glob.glob(tar, recursive=True)) for tar in (tars[0], tars[-1]))


def guess_format(path: str) -> str:
    """The format of the captioned set at a path, as in ``data.reference``."""
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if (Path(path) / "manifest.json").is_file():
        return "prepared"
    if is_dataset(path):
        return "huggingface"
    has_tars = not Path(path).is_dir() or any(entry.suffix == ".tar" for entry in Path(path).iterdir())
    return "webdataset" if has_tars else "folder"
