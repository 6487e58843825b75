"""Export of a model as a CLIPModel or SiglipModel of transformers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import atomic_folder
from dive_fast.io.safe_read import forbid_code_execution
from dive_fast.model.huggingface import architecture, image_processor, keymap, siglip_tower, tokenizers
from dive_fast.model.huggingface.import_model import keymap_of
from dive_fast.model.probe import TOLERANCE, Probe, difference, measure, picture
from dive_fast.model.towers import Towers

_PIXELS = 4 / 255
"""Largest difference of pixels in [0, 1]: transformers rounds resized images in other steps than PIL."""


def export(towers: Towers, tokenizer: Tokenizer, output: Path) -> tuple[str, float]:
    """Writes ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and the tokenizer into a folder.

    transformers reads the folder back, and features, logits, tokens and pixels are compared, before the folder
    gets its name.

    Args:
        towers: from :func:`dive_fast.model.towers.create`, on the CPU.
        tokenizer: of the model.
        output: a new folder.

    Returns:
        The class in transformers, and the largest difference of features or logits.

    Raises:
        ConfigError: transformers has no counterpart of the model; the message says why.
    """
    assert towers.config is not None and towers.model_cfg is not None
    try:
        vision = towers.model_cfg["vision_cfg"]
        tower = siglip_tower.read(towers.visual.trunk) if vision.get("timm_model_name") else None
        config = architecture.transformers_config(towers.model_cfg, tower)
        with atomic_folder(output) as folder, forbid_code_execution():
            config.save_pretrained(str(folder))
            save_file(_state(towers, config.model_type), folder / "model.safetensors", {"format": "pt"})
            image_processor.write(towers.preprocess, folder)
            tokenizers.save(tokenizer, towers.model_cfg["text_cfg"].get("context_length", 77), folder)
            error = _compare(towers, measure(towers.eval(), tokenizer), folder, config.architectures[0])
    except ValueError as error:
        raise ConfigError(f"{towers.config.name} cannot be exported to transformers: {error}") from error
    return config.architectures[0], error


def _state(towers: Towers, family: str) -> dict[str, Tensor]:
    state = {name: tensor.detach() for name, tensor in towers.state_dict().items()}
    converted = keymap.to_transformers(state, keymap_of(family, towers))
    if family == "clip":
        converted["logit_scale"] = converted["logit_scale"].reshape(())
    return converted


@torch.no_grad()
def _compare(towers: Towers, probe: Probe, folder: Path, name: str) -> float:
    """Reads the folder back; returns the largest difference of features or logits.

    Raises:
        ValueError: a difference is larger than rounding.
    """
    import transformers

    model, info = getattr(transformers, name).from_pretrained(str(folder), output_loading_info=True)
    if problems := [
        name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]
    ]:
        raise ValueError(f"transformers does not read all tensors: {problems[:3]}")
    result = model.eval()(input_ids=probe.tokens, pixel_values=probe.images)
    error = difference(probe, result.image_embeds, result.text_embeds, result.logits_per_image)
    if not error <= TOLERANCE:
        raise ValueError(
            f"features or logits differ by {error:.2g}, more than {TOLERANCE:g}; the weights may be huge"
        )
    _compare_pixels(towers.preprocess, folder)
    return error


def _compare_pixels(preprocess: Preprocess, folder: Path) -> None:
    from transformers import AutoProcessor

    image = picture(preprocess.size)
    processor: Any = AutoProcessor.from_pretrained(str(folder))
    theirs = processor.image_processor(images=image, return_tensors="pt").pixel_values[0]
    ours = preprocess.to_tensor(preprocess.transform(image, None))
    error = float(((theirs - ours).abs().amax((1, 2)) * torch.tensor(preprocess.std)).max())
    if theirs.shape != ours.shape or not error <= _PIXELS:
        raise ValueError(f"transformers preprocesses a picture differently, by {error * 255:.1f} of 255 levels")
