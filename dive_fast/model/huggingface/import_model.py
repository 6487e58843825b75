"""A model of transformers as one of open_clip: architecture, preprocessing, tokenizer and weights."""

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from dive_fast.io.safe_read import forbid_code_execution
from dive_fast.model.huggingface import architecture, hub_files, image_processor, keymap, siglip_tower, tokenizers


@dataclass(frozen=True)
class ForeignModel:
    """A folder of transformers, described in open_clip's terms."""

    folder: Path
    family: str
    """`clip` or `siglip`."""
    model_cfg: dict[str, Any]
    """open_clip's architecture."""
    preprocess_cfg: dict[str, Any]
    """open_clip's preprocess config."""

    def build(self, custom_text: bool = True) -> nn.Module:
        """The model of open_clip with initial weights.

        Args:
            custom_text: whether it is a CustomTextCLIP; otherwise open_clip's choice for the architecture.
        """
        siglip_tower.register(self.model_cfg["vision_cfg"].get("timm_model_name"))
        fields = {key: value for key, value in self.model_cfg.items() if key != "custom_text"}
        kind = CustomTextCLIP if custom_text or self.model_cfg.get("custom_text") else CLIP
        model: Any = kind(**fields)
        set_model_preprocess_cfg(model, merge_preprocess_dict(asdict(PreprocessCfg()), self.preprocess_cfg))
        return model  # type: ignore[no-any-return]

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights, in the names and shapes of a CustomTextCLIP.

        Raises:
            ValueError: they are not those of this architecture; the message names a tensor.
        """
        return convert_weights(hub_files.read_weights(self.folder), self.family, model)

    def tokenizer(self, context: int | None = None) -> Any:
        """The tokenizer as an object of open_clip, by default for the model's context."""
        return tokenizers.load(self.folder, self.model_cfg["text_cfg"], context)


def convert_weights(state: dict[str, Tensor], family: str, model: Any) -> dict[str, Tensor]:
    """Weights of transformers for ``model``, a CustomTextCLIP.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no counterpart.
    """
    table = keymap_of(family, model)
    names = {name for entry in table for name, _ in entry.theirs}
    if missing := sorted(names - state.keys()):
        raise ValueError(f"the weights lack {len(missing)} tensors of config.json: {', '.join(missing[:3])}")
    if unknown := sorted(state.keys() - names):
        raise ValueError(f"{len(unknown)} tensors have no counterpart in open_clip: {', '.join(unknown[:3])}")
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    converted = keymap.to_open_clip(state, table)
    for name, tensor in converted.items():
        if tensor.numel() == 1:
            converted[name] = tensor.reshape(expected[name])
        elif tensor.shape != expected[name]:
            theirs = next(entry.theirs[0][0] for entry in table if name in dict(entry.ours))
            shapes = f"{tuple(tensor.shape)} instead of {tuple(expected[name])}"
            raise ValueError(f"the weights do not fit config.json: {theirs} (open_clip's {name}) is {shapes}")
    return converted


def keymap_of(family: str, model: Any) -> list[keymap.Entry]:
    """The tensors of a CustomTextCLIP, or of the towers of one, and of its counterpart in transformers."""
    image = model.visual.transformer.resblocks if family == "clip" else model.visual.trunk.blocks
    return keymap.entries(family, len(image), len(model.text.transformer.resblocks))


def read(name: str, weights: bool = True) -> ForeignModel:
    """Describes the model of a name with ``hf:``, a folder or a hub id, without loading weights.

    Args:
        weights: whether there must be files of weights, which the hub's client then downloads.

    Raises:
        ValueError: there is no such model, or open_clip has no counterpart; the message says why.
    """
    folder = hub_files.folder_of(name, weights)
    if weights:
        hub_files.weight_files(folder)
    return _read(folder, hub_files.repository_of(name), _digest(folder))


@lru_cache(maxsize=8)
def _read(folder: Path, repository: str | None, digest: str) -> ForeignModel:
    """Reads a folder.

    Args:
        folder: the folder.
        repository: hub id, which names the tokenizer; None names it by the digest, since paths do not last.
        digest: of the files that are read.
    """
    with forbid_code_execution():
        config = architecture.parse(hub_files.read_config(folder))
        model_cfg = architecture.open_clip_config(config)
        preprocess_cfg = image_processor.read(folder, config.vision_config.image_size)
        tokenizer_name = repository or f"sha256-{digest[:16]}"
        model_cfg["text_cfg"] |= tokenizers.describe(folder, model_cfg, config.model_type, tokenizer_name)
    return ForeignModel(folder, config.model_type, model_cfg, preprocess_cfg)


def _digest(folder: Path) -> str:
    """A digest of all files of a folder that describe the model."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.json", "*.txt", "*.model") for path in folder.glob(pattern)):
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
