"""Image preprocessing: ``preprocessor_config.json`` of transformers from and to open_clip's preprocess config."""

import re
from pathlib import Path
from typing import Any

from dive_fast.data.transforms import Preprocess

_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters that open_clip has."""
FILES = ("preprocessor_config.json", "processor_config.json")
"""Files in which transformers writes an image processor; the second one holds it in a section since version 5."""


def read(folder: Path, image_size: int) -> dict[str, Any]:
    """open_clip's preprocess config for the image processor in a folder.

    Args:
        image_size: height and width of the model's images.

    Raises:
        ValueError: there is none, or open_clip cannot do the same; the message names the field.
    """
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"no {FILES[0]}, which says how images are preprocessed; copy it into the folder")
    try:
        processor: Any = AutoImageProcessor.from_pretrained(str(folder))
    except Exception as error:  # transformers raises errors of many types
        raise ValueError(f"{FILES[0]} cannot be used: {' '.join(str(error).split())[:200]}") from error
    kind = type(processor).__name__
    if re.fullmatch(r"(CLIP|Siglip)(ImageProcessor|FeatureExtractor)(Fast|Pil)?", kind) is None:
        raise ValueError(f"{FILES[0]}: image_processor_type = {kind} is not that of CLIP or SigLIP")
    try:
        return _preprocess_cfg(processor.to_dict(), image_size)
    except ValueError as error:
        raise ValueError(f"{FILES[0]}: {error}") from error


def _preprocess_cfg(fields: dict[str, Any], image_size: int) -> dict[str, Any]:
    for key in ("do_resize", "do_rescale"):
        if not fields.get(key, True):
            raise ValueError(f"{key} = false: open_clip resizes all images and scales pixels to [0, 1]")
    if fields.get("do_pad"):
        raise ValueError("do_pad = true: open_clip does not pad images")
    factor = fields.get("rescale_factor")
    if factor is None or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor = {factor} is not 1/255")
    normalises = fields.get("do_normalize", True)
    resample = int(fields.get("resample", -1))
    if resample not in _RESAMPLING:
        raise ValueError(f"resample = {resample} is neither bilinear (2) nor bicubic (3)")
    return {
        "size": image_size,
        "mean": list(fields["image_mean"]) if normalises else [0.0] * 3,
        "std": list(fields["image_std"]) if normalises else [1.0] * 3,
        "interpolation": _RESAMPLING[resample],
        "resize_mode": _resize_mode(fields, image_size),
    }


def _resize_mode(fields: dict[str, Any], image_size: int) -> str:
    size = {key: value for key, value in dict(fields["size"]).items() if value is not None}
    crop = {key: value for key, value in dict(fields.get("crop_size") or {}).items() if value is not None}
    crops, square = bool(fields.get("do_center_crop")), {"height": image_size, "width": image_size}
    if crops and crop != square:
        raise ValueError(f"crop_size = {crop} differs from the model's image_size = {image_size}")
    if size == square:
        return "squash"
    if set(size) != {"shortest_edge"}:
        raise ValueError(f"size = {size} is neither the model's image_size = {image_size} nor a shortest_edge")
    if size["shortest_edge"] != image_size:
        raise ValueError(
            f"size.shortest_edge = {size['shortest_edge']}: open_clip resizes the shorter side to the model's "
            f"image_size = {image_size} and then crops"
        )
    if not crops:
        raise ValueError("do_center_crop = false with size.shortest_edge: images would keep their aspect ratio")
    return "shortest"


def write(preprocess: Preprocess, folder: Path) -> None:
    """Writes ``preprocessor_config.json``.

    Raises:
        ValueError: transformers cannot do the same; the message names the field.
    """
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    numbers = {name: number for number, name in _RESAMPLING.items()}
    if preprocess.interpolation not in numbers:
        raise ValueError(f"preprocess_cfg.interpolation = {preprocess.interpolation} has no counterpart")
    height, width = preprocess.size
    shared: Any = {
        "resample": numbers[preprocess.interpolation],
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    square = {"height": height, "width": width}
    processor: Any
    if preprocess.resize_mode == "squash":
        processor = SiglipImageProcessor(size=square, **shared)
    elif preprocess.resize_mode == "shortest" and height == width:
        processor = CLIPImageProcessor(size={"shortest_edge": height}, crop_size=square, **shared)
    else:
        raise ValueError(f"preprocess_cfg.resize_mode = {preprocess.resize_mode} has no counterpart")
    processor.save_pretrained(str(folder))
