"""Export of both towers as ONNX files, each with a dynamic batch and unit features."""

import json
import logging
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dive_fast.data.text_tokenizer import Tokenizer
from dive_fast.errors import ConfigError
from dive_fast.io.atomic_files import atomic_folder
from dive_fast.io.safe_read import forbid_code_execution
from dive_fast.model.huggingface import image_processor, tokenizers
from dive_fast.model.probe import TOLERANCE, difference, measure
from dive_fast.model.towers import Towers

OPSET = 20
"""Version of the operators; the first one with GELU."""
DESCRIPTION = "model.json"
"""File next to both graphs, with what is needed to use them."""
MAX_FILE_BYTES = 1_500_000_000
"""Bytes of weights up to which a tower is one file; protobuf allows 2 GB. Larger ones have a `.data` file."""
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class _Unit(nn.Module):
    """A tower with unit features."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.tower(inputs), dim=-1)


def export(towers: Towers, tokenizer: Tokenizer, output: Path) -> tuple[str, float]:
    """Writes ``image.onnx``, ``text.onnx``, ``model.json``, and preprocessing and tokenizer as in transformers.

    The images are normalised, ``(B, 3, H, W)`` fp32; the tokens are ``(B, context)`` int64; the features are unit
    rows, so that their products are cosines. ONNX Runtime runs both graphs, for batches of several sizes, before
    the folder gets its name.

    Args:
        towers: from :func:`dive_fast.model.towers.create`, on the CPU.
        tokenizer: of the model.
        output: a new folder.

    Returns:
        The format and its operators, and the largest difference of features or logits.

    Raises:
        ConfigError: a package is missing, or torch cannot export the model.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"the export to ONNX needs {', '.join(missing)}: pip install 'dive_fast[onnx]'")
    assert towers.config is not None
    towers.eval()
    probe = measure(towers, tokenizer)
    with atomic_folder(output) as folder, forbid_code_execution():
        try:
            _write(_Unit(towers.visual), "images", probe.images, folder / "image.onnx")
            _write(_Unit(towers.text), "tokens", probe.tokens, folder / "text.onnx")
        except Exception as error:  # the exporter raises errors of many types
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{towers.config.name} cannot be exported to ONNX by torch: {reason}") from error
        image, text = (
            _run(folder / f"{name}.onnx", inputs)
            for name, inputs in (("image", probe.images), ("text", probe.tokens))
        )
        bias = 0.0 if towers.logit_bias is None else float(towers.logit_bias)
        largest = difference(probe, image, text, probe.scale * image @ text.T + bias)
        if not largest <= TOLERANCE:
            raise ConfigError(
                f"{towers.config.name}: features of ONNX Runtime differ by {largest:.2g}, more than {TOLERANCE:g}"
            )
        left_out = _write_inputs(towers, tokenizer, folder)
        description = {
            "opset": OPSET,
            "unit_features": True,
            "width": image.shape[1],
            "context_length": probe.tokens.shape[1],
            "pad_id": getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", 0),
            "logit_scale": probe.scale,
            "logit_bias": bias,
            "preprocess": asdict(towers.preprocess),
            "largest_difference": largest,
            "left_out": left_out,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return f"ONNX, opset {OPSET}", largest


def _write(tower: nn.Module, name: str, example: Tensor, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower,
            (example,),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=["features"],
            dynamic_shapes={"inputs": {0: torch.export.Dim("batch")}},
            external_data=_bytes(tower) > MAX_FILE_BYTES,
            verbose=False,
        )


def _bytes(tower: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())


def _run(path: Path, inputs: Tensor) -> Tensor:
    """The features of ONNX Runtime, of one sample and of the others."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts: list[Any] = [session.run(None, {name: part.numpy()})[0] for part in (inputs[:1], inputs[1:])]
    return torch.cat([torch.from_numpy(part) for part in parts])


def _write_inputs(towers: Towers, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Writes preprocessing and tokenizer as files of transformers; returns the reasons for those left out."""
    left_out = []
    context = int((towers.model_cfg or {}).get("text_cfg", {}).get("context_length", 77))
    for write in (
        lambda: image_processor.write(towers.preprocess, folder),
        lambda: tokenizers.save(tokenizer, context, folder),
    ):
        try:
            write()
        except ValueError as error:
            left_out.append(str(error))
    return left_out
