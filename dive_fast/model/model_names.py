"""Quick checks of a model's name and folder, which import neither torch nor open_clip."""

import difflib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dive_fast.config.schema import ModelConfig
from dive_fast.errors import ConfigError
from dive_fast.io.safe_read import parse_json, read_text

DESCRIPTION = "open_clip_config.json"
"""Name of open_clip's description of a model, in its folder or next to its weights."""
MODEL_DIR = Path(__file__).parents[1] / "demo/model"
"""Folder of the demo's model."""
HUB = "hf-hub:"
"""Prefix of open_clip's names of models of the Hugging Face hub."""
LOCAL = "local-dir:"
"""Prefix of the names of models in a local folder."""
SCHEME = "hf:"
"""Prefix of the names of models in transformers' format."""
BRING_WEIGHTS = (HUB, LOCAL, SCHEME)
"""Prefixes of the names of models that include weights."""


def named(name: str, pretrained: str | None = None) -> ModelConfig:
    """The config of a model by a name, or by its folder: a run, or a model of open_clip or transformers.

    Args:
        pretrained: open_clip's tag or a file of weights, for a name that does not include weights.

    Raises:
        ConfigError: the folder is not a model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        schemes = ((DESCRIPTION, LOCAL), ("config.json", SCHEME))
        scheme = next((scheme for file, scheme in schemes if (folder / file).is_file()), None)
        if scheme is None:
            raise ConfigError(f"{folder} is not a model: it has neither {DESCRIPTION} nor a config.json")
        name = f"{scheme}{folder}"
    return ModelConfig(name=name, pretrained=pretrained)


def check_name(config: ModelConfig, weights: bool = True) -> None:
    """Validates the name of a model, and its folder if it is a local one.

    Args:
        weights: whether the weights will be loaded.

    Raises:
        ConfigError: there is no such model; the message names the closest one.
    """
    name = full_name(config)
    if name.startswith(BRING_WEIGHTS):
        if config.pretrained is not None:
            raise ConfigError(
                f"model.pretrained: {config.name} brings its own weights; remove it, or name a model of open_clip"
            )
        if name.startswith(LOCAL):
            _check_folder(config, Path(name.removeprefix(LOCAL)), weights and not config.random)
        return
    models = _open_clip_models()
    if models and name not in models:
        by_lower_case = {model.lower(): model for model in models}
        word = name.replace("/", "-").lower()
        close = difflib.get_close_matches(word, list(by_lower_case), n=1, cutoff=0.5)
        hint = f"; did you mean {by_lower_case[close[0]]}?" if close else "; see open_clip.list_models()"
        raise ConfigError(f"model.name: open_clip has no model {name}{hint}")


def full_name(config: ModelConfig) -> str:
    """The name that open_clip knows a model by: the demo's and home folders are resolved."""
    if config.name.startswith(LOCAL + "~"):
        return LOCAL + str(Path(config.name.removeprefix(LOCAL)).expanduser())
    if config.name != "demo":
        return config.name
    return f"{LOCAL}{MODEL_DIR}"


def image_size(name: str) -> int:
    """The shorter side of the images of one of open_clip's models, in pixels.

    Raises:
        ConfigError: open_clip has no such model, or its description does not name a size.
    """
    check_name(ModelConfig(name=name))
    paths = [folder / f"model_configs/{name}.json" for folder in _open_clip_folders()]
    description: Any = next((parse_json(read_text(path)) for path in paths if path.is_file()), {})
    size = description.get("vision_cfg", {}).get("image_size")
    sides = size if isinstance(size, list) else [size]
    if not all(isinstance(side, int) for side in sides):
        raise ConfigError(f"open_clip's description of {name} does not name the size of its images; give a number")
    return min(sides)


def _open_clip_models() -> list[str]:
    """open_clip's names of models; empty if open_clip is not installed."""
    if "open_clip" in sys.modules:  # which may know more models than its own
        models: list[str] = sys.modules["open_clip"].list_models()
        return models
    # As open_clip lists them; importing it takes seconds.
    return sorted(file.stem for folder in _open_clip_folders() for file in folder.glob("model_configs/*.json"))


def _open_clip_folders() -> list[Path]:
    spec = find_spec("open_clip")
    return [] if spec is None else list(map(Path, spec.submodule_search_locations or []))


def _check_folder(config: ModelConfig, folder: Path, weights: bool) -> None:
    if not folder.is_dir():
        raise ConfigError(f"model: cannot load {config.name} (None): folder not found: {folder}")
    if not (folder / DESCRIPTION).is_file():
        raise ConfigError(
            f"model: cannot load {config.name} (None): the folder has no {DESCRIPTION}, which describes the model"
        )
    if weights and not any(
        file for pattern in ("*.safetensors", "*.bin", "*.pth") for file in folder.glob(pattern)
    ):
        raise ConfigError(
            f"model: cannot load {config.name} (None): weights could not be loaded: the folder has no weight "
            "file such as model.safetensors; model.random = true starts from random weights"
        )
