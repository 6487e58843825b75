"""Exports a model for other libraries: ``dive-fast export --to transformers runs/mine exported``.

The model is a run folder, local-dir:FOLDER, hf:FOLDER or hf:owner/name (transformers), hf-hub:owner/name, or a
name of open_clip with --pretrained. The new folder is read back and compared before it gets its name.
"""

import argparse
import sys
from pathlib import Path

from dive_fast.commands import cli

FORMATS = {"transformers": "a CLIPModel or SiglipModel", "onnx": "image.onnx and text.onnx, with unit features"}


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    formats = ", ".join(f"{name}: {summary}" for name, summary in FORMATS.items())
    parser.add_argument("--to", required=True, choices=FORMATS, help=formats)
    parser.add_argument(
        "--pretrained", help="open_clip's tag or a file of weights, for a model's name of open_clip"
    )
    parser.add_argument("model", help="run folder, local-dir:, hf:, hf-hub:, or a model's name of open_clip")
    parser.add_argument("output", type=Path, help="a new folder")
    options = parser.parse_args(arguments)

    from dive_fast.errors import UserError

    try:
        return _export(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _export(options: argparse.Namespace) -> int:
    from dive_fast.errors import ConfigError
    from dive_fast.model.model_names import LOCAL, check_name, named

    if options.output.exists():
        raise ConfigError(f"{options.output} exists: name a new folder")
    config = named(options.model, options.pretrained)
    check_name(config)
    from dive_fast.model import export_onnx, export_transformers, head, towers

    _silence_transformers()
    towers.check(config)
    model, tokenizer = towers.create(config), towers.tokenizer_of(config)
    export = export_transformers.export if options.to == "transformers" else export_onnx.export
    kind, error = export(model, tokenizer, options.output)
    print(f"{options.output}: {kind}, read back; features and logits differ by at most {error:.2g}")
    folder = Path(config.name.removeprefix(LOCAL))
    if config.name.startswith(LOCAL) and (folder / head.FILE).is_file():
        print(f"{folder / head.FILE}, the trained head, is not exported: the text tower classifies instead")
    return 0


def _silence_transformers() -> None:
    """Turns off the progress bars and notes with which transformers comments on folders that it reads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
