"""Chooses a pre-trained model by name, and weights for it; downloads nothing."""

from pathlib import Path
from typing import NamedTuple

from dive_fast.errors import ConfigError, nearest

DEFAULT_MODEL, DEFAULT_TAG = "ViT-B-16-quickgelu", "openai"
"""OpenAI's CLIP ViT-B/16, the model of the DiVE and FLYP papers."""
SCHEMES = ("local-dir:", "hf-hub:", "hf:")
"""Beginnings of names that bring their weights."""
PREFERRED = ("openai", "laion", "datacomp")
"""Beginnings of pretrained tags, the preferred first."""
QUICKGELU = "-quickgelu"


class ModelChoice(NamedTuple):
    """The ``model`` section of a config."""

    name: str
    pretrained: str | None

    @property
    def is_demo(self) -> bool:
        """Whether it is the small model that the project ships, which needs larger learning rates than CLIP."""
        return self.name == "demo"


def choose_model(name: str | None, pretrained: str | None = None) -> ModelChoice:
    """The model of a name, with OpenAI's weights if there are some, otherwise LAION's or DataComp's, or any.

    Weights that were trained with QuickGELU need the architecture of that name: ``ViT-B-16`` with ``openai``
    becomes ``ViT-B-16-quickgelu``.

    Args:
        name: an open_clip name, ``demo``, or a name with one of :data:`SCHEMES`; None: the default.
        pretrained: a tag or a file of weights; None: chosen here.

    Raises:
        ConfigError: open_clip has no such model or tag, or no weights for it; names the nearest.
    """
    if name is None and pretrained in (None, DEFAULT_TAG):
        return ModelChoice(DEFAULT_MODEL, DEFAULT_TAG)
    name = name or DEFAULT_MODEL
    if name == "demo" or name.startswith(SCHEMES):
        return _with_its_weights(name, pretrained)
    import open_clip  # imports torch

    if name not in (models := open_clip.list_models()):
        name = _known_name(name, models)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        if not tags:
            raise ConfigError(
                f"--model {name}: open_clip has no weights for it: name a file of weights by --pretrained"
            )
        pretrained = next((tag for start in PREFERRED for tag in tags if tag.startswith(start)), tags[0])
    elif pretrained not in tags and not Path(pretrained).is_file():
        known = ", ".join(tags) or "which has none"
        raise ConfigError(
            f"--pretrained {pretrained}: neither a file nor a tag of {name} ({known}){nearest(pretrained, tags)}"
        )
    is_quick = bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu"))
    if is_quick and not name.endswith(QUICKGELU) and f"{name}{QUICKGELU}" in models:
        name += QUICKGELU
    return ModelChoice(name, pretrained)


def _with_its_weights(name: str, pretrained: str | None) -> ModelChoice:
    if pretrained is not None:
        raise ConfigError(f"--pretrained {pretrained}: {name} brings its weights; remove it")
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if name.startswith("local-dir:") and not (folder / "open_clip_config.json").is_file():
        raise ConfigError(
            f"--model {name}: {folder} has no open_clip_config.json, so it is not the folder of a model"
        )
    return ModelChoice(name, None)


def _known_name(name: str, models: list[str]) -> str:
    """The open_clip name that differs in case and separators alone, e.g. of ``vit-b/16``."""
    plain = {model.replace("/", "-").lower(): model for model in models}
    if (known := plain.get(name.replace("/", "-").replace("_", "-").lower())) is not None:
        return known
    hub = (
        f"; a repository of the Hugging Face Hub is named hf-hub:{name}, or hf:{name} for transformers"
        if "/" in name
        else ""
    )
    raise ConfigError(
        f"--model {name}: open_clip has no such model{nearest(name, models)}{hub} "
        "(python -c 'import open_clip; print(open_clip.list_models())' lists all)"
    )
