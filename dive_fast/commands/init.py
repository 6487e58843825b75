"""Writes a config for your own data: ``dive-fast init --target photos/ [--reference pairs.tar]``.

It looks at the data and chooses settings for it; docs/own_data.md explains them. Nothing is downloaded, and no
file of the data is changed.
"""

import argparse
import shlex
import sys
from pathlib import Path

from dive_fast.commands import cli


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    options = _parser().parse_args(arguments)

    # These imports follow the parser, so that --help is fast; they do not import torch.
    from dive_fast.errors import UserError
    from dive_fast.quickstart.new_config import Request, new_config
    from dive_fast.quickstart.summary import summary

    command = shlex.join(["dive-fast", "init", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        written = new_config(Request(command=command, **vars(options)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*summary(written.choices, written.path), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--target",
        required=True,
        help="data to learn: a folder with one folder of images per class, or with train/ and val/ of such "
        "folders; tars of image + .cls; a csv with title and filepath; a prepared set; or a data set of Hugging "
        "Face",
    )
    parser.add_argument("--val", help="data to measure on; default: the target's val/, or a part of each class")
    parser.add_argument(
        "--reference",
        help="image-caption pairs on which the model must not change: tars of image + .txt, a folder of images "
        "with a .txt next to each, a csv, a prepared set, or a data set of Hugging Face",
    )
    parser.add_argument(
        "--model", help="open_clip model, demo, local-dir:, hf-hub:, hf:; default: ViT-B-16-quickgelu"
    )
    parser.add_argument("--pretrained", help="open_clip's tag, or a file of weights; default: openai if it exists")
    parser.add_argument("--method", help="default: dive with a reference set, otherwise tracer (docs/methods.md)")
    parser.add_argument(
        "--class-names", help="imagenet, or a file with one name a line; default: the folders' names"
    )
    parser.add_argument(
        "--template", default="a photo of a {}", help="prompt; {} stands for the class; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="file to write; default: the target's name and .yaml")
    parser.add_argument(
        "--format",
        dest="file_format",
        choices=["yaml", "json"],
        help="default: by the suffix of --output, otherwise yaml",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return parser
