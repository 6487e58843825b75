"""Prepares a data set: ``dive-fast prepare --format folder --input imagenet/train --output ready``."""

import argparse
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from dive_fast.data.prepared.convert import Options
from dive_fast.data.sources.object_store import is_url, shown


def _side(value: str) -> int | str:
    """A number of pixels, or the name of a model."""
    return int(value) if value.lstrip("-").isdecimal() else value


def _max_side(options: argparse.Namespace) -> int | None:
    """The maximum shorter side in pixels; None: no image is resized."""
    if isinstance(options.max_side, int):
        return options.max_side or None
    from dive_fast.data.prepared.convert import side_for
    from dive_fast.model.model_names import image_size

    share = 0.9 if options.crop_share is None else options.crop_share
    size = image_size(options.max_side)
    side = side_for(size, share)
    print(f"--max-side {options.max_side}: {side} pixels, for images of {size} and crops of at least {share:g}")
    return side


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 2 after a one-line message if options or data are invalid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--format",
        choices=["folder", "csv", "webdataset", "huggingface", "torchvision", "wilds"],
        help="format of the raw data: one folder per class; a tab-separated table with title and filepath, as "
        "FLYP writes it; webdataset tars, as img2dataset writes them; a data set that Hugging Face's datasets "
        "saved to disk; a data set of torchvision or WILDS",
    )
    parser.add_argument("--input", help="folder, CSV file, tars, or root folder of the torchvision or WILDS set")
    parser.add_argument("--name", help="torchvision: the class, e.g. Flowers102; wilds: the data set, e.g. fmow")
    parser.add_argument(
        "--split",
        help="torchvision and wilds: the split; default: train. huggingface: the split of a set that has several",
    )
    parser.add_argument("--image-column", help="huggingface: default: the first image column")
    parser.add_argument("--label-column", help="huggingface: default: the only ClassLabel column")
    parser.add_argument("--text-column", help="huggingface with --text txt: default: the only column of texts")
    parser.add_argument(
        "--text",
        choices=["cls", "txt"],
        default="cls",
        help="folder, webdataset, huggingface: labels or captions; default: %(default)s. In a folder, "
        "the captions of x.jpg are in x.txt",
    )
    parser.add_argument(
        "--pairs", action="store_true", help="csv: each row is a separate pair (for a reference set)"
    )
    parser.add_argument(
        "--image-root",
        help="csv: folder that relative file paths start from; default: the folder of the CSV file",
    )
    parser.add_argument(
        "--output", help="folder of the prepared set; after an interruption, the same command resumes"
    )
    parser.add_argument(
        "--container",
        choices=["tar", "beton"],
        default="tar",
        help="file format of the images; beton is for the loader ffcv; default: %(default)s",
    )
    parser.add_argument(
        "--max-side",
        type=_side,
        default=512,
        metavar="PIXELS|MODEL",
        help="maximum shorter side in pixels; 0: no image is resized; an open_clip model: the least side of which "
        "it needs no enlarged crop, 288 for 224-pixel models; default: %(default)s",
    )
    parser.add_argument(
        "--crop-share",
        type=float,
        metavar="SHARE",
        help="with --max-side MODEL: the smallest share of an image's area that training crops cover, as in "
        "data.target.crop_scale; default: 0.9",
    )
    parser.add_argument(
        "--min-side",
        type=int,
        default=8,
        help="minimum shorter side in pixels; smaller images are left out; default: %(default)s",
    )
    parser.add_argument(
        "--quality", type=int, default=95, help="JPEG quality of re-encoded images; default: %(default)s"
    )
    parser.add_argument(
        "--shard-samples", type=int, default=2000, help="number of raw samples per shard; default: %(default)s"
    )
    parser.add_argument(
        "--tokenizer",
        help="open_clip model whose tokenizer encodes the captions; default: no tokens are stored",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="number of processes; default: all available CPUs, here %(default)s",
    )
    parser.add_argument("--verify", metavar="FOLDER", help="only validate a prepared set against its hashes")
    options = parser.parse_args(arguments)
    if options.verify is None and not (options.format and options.input and options.output):
        parser.error("--format, --input and --output are required, or --verify")
    if options.crop_share is not None and (isinstance(options.max_side, int) or not 0 < options.crop_share <= 1):
        parser.error("--crop-share is a share of 1, and goes with a model in --max-side")
    if (
        options.quality not in range(1, 101)
        or (isinstance(options.max_side, int) and options.max_side < 0)
        or min(options.min_side, options.shard_samples) < 1
    ):
        parser.error(
            "--quality must be 1 to 100, --max-side at least 0, --min-side and --shard-samples at least 1"
        )
    for option, value, formats in (
        ("--pairs", options.pairs, ("csv",)),
        ("--image-root", options.image_root, ("csv",)),
        ("--name", options.name, ("torchvision", "wilds")),
        ("--split", options.split, ("huggingface", "torchvision", "wilds")),
        ("--image-column", options.image_column, ("huggingface",)),
        ("--label-column", options.label_column, ("huggingface",)),
        ("--text-column", options.text_column, ("huggingface",)),
        ("--text", options.text == "txt", ("folder", "webdataset", "huggingface")),
    ):
        if value and options.verify is None and options.format not in formats:
            parser.error(f"{option} is for --format {' or '.join(formats)}; remove it")
    if options.verify is None and options.text == "txt" and options.label_column is not None:
        parser.error("--label-column is for --text cls; remove one of them")
    if options.verify is None and options.text == "cls" and options.text_column is not None:
        parser.error("--text-column is for --text txt; add it")
    for option in ("input", "output", "image_root", "verify"):
        if getattr(options, option) is not None:
            setattr(options, option, os.path.expanduser(getattr(options, option)))

    if options.verify is None and options.format == "folder":
        source, output_path = os.path.realpath(options.input), os.path.realpath(options.output)
        if os.path.commonpath([source, output_path]) == source:
            parser.error("--output lies in --input, where it would become a class; choose another folder")

    if options.verify is None and is_url(options.input):
        remedy = "each image is read by its position; copy the set to a disk and prepare it there"
        print(f"error: --input {shown(options.input)}: an object store is not read: {remedy}", file=sys.stderr)
        return 2
    if options.verify is None and options.format != "webdataset" and not os.path.exists(options.input):
        # Before torch is imported, which takes seconds.
        kind = "file" if options.format == "csv" else "folder"
        print(f"error: {options.input}: no such {kind}", file=sys.stderr)
        return 2

    from dive_fast.data.prepared.format import MANIFEST, SKIPPED
    from dive_fast.data.prepared.read import verify
    from dive_fast.data.prepared.write import prepare
    from dive_fast.errors import UserError

    try:
        if options.verify is not None:
            manifest, state = verify(options.verify), ", hashes match"
        else:
            settings = Options(
                options.container,
                _max_side(options),
                options.min_side,
                options.quality,
                options.shard_samples,
                options.tokenizer,
            )
            raw, output = _raw(options), Path(options.output)
            raw.report()
            state = ", already prepared" if (output / MANIFEST).is_file() else ""
            manifest = prepare(raw, output, settings, options.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    folder = options.verify or options.output
    print(f"{folder}: {manifest.samples} samples in {len(manifest.files)} files{state}")
    for reason, count in sorted(manifest.converted.items()):
        print(f"  re-encoded: {count} ({reason})")
    for reason, count in sorted(manifest.skipped.items()):
        print(f"  left out: {count} ({reason})")
    if manifest.skipped:
        print(f"  all of them are listed in {Path(folder) / SKIPPED}")
    return 0


def _raw(options: argparse.Namespace) -> Any:
    """Opens the raw data set that the options name."""
    from dive_fast.data.prepared.raw import RawDataset, RawSource
    from dive_fast.data.sources.captioned_folder import open_captioned_folder
    from dive_fast.data.sources.csv_table import open_csv
    from dive_fast.data.sources.folder import open_folder
    from dive_fast.data.sources.huggingface import Columns, open_huggingface
    from dive_fast.data.sources.webdataset import open_webdataset
    from dive_fast.errors import DataError

    if options.format == "folder":
        return RawSource((open_folder if options.text == "cls" else open_captioned_folder)(options.input))
    if options.format == "huggingface":
        columns = Columns(options.image_column, options.label_column, options.text_column)
        source = open_huggingface(options.input, columns, options.split, has_texts=options.text == "txt")
        return RawSource(source)
    if options.format == "csv":
        return RawSource(open_csv(options.input, options.image_root, group=not options.pairs))
    if options.format == "webdataset":
        try:
            return RawSource(open_webdataset(options.input, f".{options.text}", strict=False))
        except DataError as error:
            hint = "; use --text txt for captions" if "no .cls" in str(error) else ""
            raise DataError(f"{error}{hint}") from error
    if options.name is None:
        raise DataError(f"--format {options.format} requires --name")
    try:
        # Third-party classes can raise any exception.
        dataset = _torchvision(options) if options.format == "torchvision" else _wilds(options)
    except DataError as error:
        raise DataError(f"--format {options.format} --name {options.name}: {error}") from error
    except ModuleNotFoundError as error:
        raise DataError(f"--format {options.format}: {error}; pip install {error.name}") from error
    except Exception as error:
        raise DataError(
            f"--format {options.format} --name {options.name}: {type(error).__name__}: {error}"
        ) from error
    return RawDataset(dataset, f"{options.name}/{options.split or 'train'}")


def _wilds(options: argparse.Namespace) -> Any:
    from wilds import get_dataset

    from dive_fast.io.safe_read import forbid_code_execution

    with forbid_code_execution():
        dataset = get_dataset(options.name, root_dir=options.input, download=False)
    return dataset.get_subset(options.split or "train")


def _torchvision(options: argparse.Namespace) -> Any:
    from PIL import EpsImagePlugin
    from torchvision import datasets

    from dive_fast.errors import DataError
    from dive_fast.io.safe_read import forbid_code_execution

    if not inspect.isclass(getattr(datasets, options.name, None)):
        raise DataError("torchvision has no such data set")
    dataset_class: Any = getattr(datasets, options.name)
    if options.name.startswith("LSUN"):
        raise DataError("torchvision reads it with a pickle stored next to the data; prepare it as a folder")
    # torchvision's loader would run Ghostscript on PostScript files named .jpg.
    EpsImagePlugin.gs_binary = False
    parameters = inspect.signature(dataset_class).parameters
    if next(iter(parameters), None) != "root":
        raise DataError("it does not read a folder")
    # Some download by default.
    keywords: dict[str, Any] = {"download": False} if "download" in parameters else {}
    part = next((name for name in ("split", "image_set", "train") if name in parameters), None)
    if part is None and options.split is not None:
        raise DataError("it has no splits; remove --split")
    if part == "train" and options.split not in (None, "train", "test"):
        raise DataError(f"--split {options.split}: it has train and test only")
    if part is not None:
        keywords[part] = (options.split or "train") == "train" if part == "train" else options.split or "train"
    with forbid_code_execution():
        return dataset_class(options.input, **keywords)
